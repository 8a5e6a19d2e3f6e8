"""Lean LIFF: the prediction of a layer from the one below it at any scale factor, for a tenth of the arithmetic.

The local implicit filter function of the paper (3.2) makes a filter for every target pixel from the features at the
nearest pixel of the lower layer, the place within that pixel (the local grid) and the cell. Here it is factored, at a
low rank. What target pixel (y, x) adds to bicubic interpolation is, for each colour,

    sum over k of a_k(y) b_k(x) f_k[nearest pixel].

The features f_k, ``taps`` for each colour, come from blocks at half of the lower layer's size, and do not know the
factor. a_k and b_k depend on local grid and cells alone, along one axis each: they are evaluated once for each row and
each column of the target, not for each pixel. They are cosines plus a learned correction; with nine taps the cosines
alone tell apart all places within a pixel at factors 2 and 3.

The network of features has no biases and its first convolution ignores the mean of each colour. So what LIFF adds grows
with the contrast of the lower layer, and is exactly zero where that layer is flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks.lean import PlainBlock, even, from_zero
from compass_codec.networks.liff import bicubic, bicubic_matrix, nearest
from compass_codec.networks.strips import spans

# What is in hand at a time on a CPU, so that it stays in its caches: target pixels that look up features, columns of
# bicubic interpolation, and pixels of the lower layer that get features (their margin is computed twice).
LOOK_UP_PIXELS, CUBIC_COLUMNS, FEATURE_PIXELS = 2**15, 128, 2**16


class AlongAxis(nn.Module):
    """Functions of the place along one axis: cosines of frequencies ``orders`` plus a learned correction."""

    def __init__(self, orders: list[int], hidden: int) -> None:
        super().__init__()
        self.orders = orders
        self.first, self.second = nn.Linear(3, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, len(orders))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, offset: Tensor, cell: float, across: float) -> Tensor:
        """Offsets [N] in -1..1, the cell along this axis and across it, to values [N, taps]."""
        cosines = (0.5 * math.pi * offset.new_tensor(self.orders) * (offset[:, None] + 1)).cos()
        cells = offset.new_tensor([cell, across]).expand(len(offset), 2)
        h = torch.cat([offset[:, None], cells], 1).to(self.first.weight.dtype)
        h = F.silu(self.second(F.silu(self.first(h))))
        correction: Tensor = self.last(h)
        return cosines + correction.float()


class LeanLIFF(nn.Module):
    """Predicts a picture of any larger or the same size from a smaller one; it starts as bicubic interpolation.

    ``channels`` and ``blocks`` at half of the lower layer's size, ``taps`` functions of the place in a pixel.
    """

    def __init__(self, channels: int = 48, blocks: int = 2, taps: int = 9, hidden: int = 32) -> None:
        super().__init__()
        self.dimensions = {"channels": channels, "blocks": blocks, "taps": taps, "hidden": hidden}
        self.taps = taps
        self.embed = nn.Conv2d(12, channels, 3, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(channels, bias=False) for _ in range(blocks))
        self.out = from_zero(nn.Conv2d(channels, 4 * 3 * taps, 1, bias=False))  # rows, columns, colours, taps
        side = math.isqrt(taps - 1) + 1
        self.rows_phi = AlongAxis([k // side for k in range(taps)], hidden)
        self.columns_phi = AlongAxis([k % side for k in range(taps)], hidden)

    def features(self, low: Tensor) -> Tensor:
        """Lower layer [B, 3, h, w], centred on zero, to features [B, h, w, 3 * taps]."""
        height, width = low.shape[-2:]
        x = F.pixel_unshuffle(even(low.to(self.embed.weight.dtype)), 2)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate").contiguous(memory_format=torch.channels_last)
        weight = self.embed.weight.unflatten(1, (3, 4))
        x = F.conv2d(x, (weight - weight.mean((2, 3, 4), keepdim=True)).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        x = self.out(x).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)).transpose(2, 3)
        found: Tensor = x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return found

    def phi(self, low: tuple[int, int], size: tuple[int, int], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, taps] along rows and columns at offsets [N], from a layer of size ``low`` to one of ``size``."""
        cells = [2 * a / b for a, b in zip(low, size, strict=True)]
        return self.rows_phi(rows, *cells), self.columns_phi(columns, *reversed(cells))

    def forward(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Prediction [B, 3, *size], about 0..1, from the layer below ``low`` [B, 3, h, w] in 0..1."""
        h, w = low.shape[-2:]
        (row, dy), (column, dx) = (nearest(a, b, (0, b), low.device) for a, b in ((h, size[0]), (w, size[1])))
        along = self.phi((h, w), size, dy, dx)
        return bicubic(low.float(), size) + look_up(self.features(low - 0.5), row, column, *along).float()

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` (first, last + 1) of ``forward`` for one picture, some at a time. ``low`` may be uint8."""
        low_size = (low.shape[-2], low.shape[-1])
        (row, dy), (column, dx) = (
            nearest(a, b, span, low.device) for a, b, span in zip(low_size, size, (rows, (0, size[1])), strict=True)
        )
        a, b = self.phi(low_size, size, dy, dx)
        tiles = [_cubic(low_size[1], size[1], t, low.device) for t in spans(size[1], CUBIC_COLUMNS)]
        chunk = max(1, LOOK_UP_PIXELS // size[1])
        out = []
        for first, last, y0, part, features in self._strips(low, size, rows):
            for i in range(first, last, chunk):
                k = slice(i - rows[0], min(i + chunk, last) - rows[0])
                added = look_up(features, row[k] - y0, column, a[k], b)
                span = (i, min(i + chunk, last))
                y, weights = _cubic(low_size[0], size[0], span, low.device)
                cubic = weights @ part[..., y.start - y0 : y.stop - y0, :]
                out.append(torch.cat([cubic[..., x] @ w.T for x, w in tiles], 3).add_(added))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    def _strips(
        self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]
    ) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """Target rows ``first`` to ``last`` - 1, and what they are made from: the lower layer [1, 3, n, w] in 0..1 from
        its row ``y0`` on, and its features."""
        height, width = low.shape[-2:]
        # rows that a feature sees to either side beyond its own pair, and bicubic interpolation at least
        reach = 2 * (len(self.blocks) + 1)
        step = max(1, FEATURE_PIXELS // width * size[0] // height)
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            top, bottom = ((2 * i + 1) * height // (2 * size[0]) for i in (first, last - 1))
            y0, y1 = max(0, top // 2 * 2 - reach), min(height, bottom // 2 * 2 + 2 + reach)
            part = low[..., y0:y1, :]
            part = part.float() / 255 if part.dtype == torch.uint8 else part.float()
            yield first, last, y0, part, self.features(part - 0.5)


def look_up(features: Tensor, row: Tensor, column: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The sum over taps: features [B, h, w, 3 * taps], nearest rows [H] in ascending order and columns [W], values
    [H, taps] and [W, taps] along them, to [B, 3, H, W]."""
    taps, first, count = a.shape[1], int(row[0]), int(row[-1] - row[0]) + 1
    near = features[:, first : first + count].unflatten(3, (3, taps)).index_select(2, column)
    near = near * b[:, None].to(near.dtype)
    # all target rows of a row of features at once: [W * 3, taps] times [taps, as many as it has at most]
    row, place = row - first, torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    most = int(place.max()) + 1
    values = near.new_zeros(count, most, taps).index_put((row, place), a.to(near.dtype))
    out: Tensor = near.flatten(2, 3) @ values.transpose(1, 2)
    out = out.unflatten(2, (-1, 3)).permute(0, 3, 1, 4, 2).flatten(2, 3)
    return out.index_select(2, row * most + place)


def _cubic(low: int, high: int, span: tuple[int, int], device: torch.device) -> tuple[slice, Tensor]:
    """The source samples that ``span`` of the target samples are interpolated from along an axis, and their weights."""
    first, last = ((2 * i + 1) * low // (2 * high) for i in (span[0], span[1] - 1))
    first, last = max(0, first - 2), min(low, last + 3)
    return slice(first, last), bicubic_matrix(low, high, span, first, last, device)


def multiply_accumulates(liff: LeanLIFF, factor: float) -> float:
    """kMAC a pixel of the target at a scale factor; functions along rows and columns are none of each pixel's."""
    layers = [m for m in liff.modules() if isinstance(m, nn.Conv2d)]
    features = sum(layer.weight.numel() for layer in layers) / 4  # a pixel of the lower layer
    per_row = 3 * (liff.taps + 4)  # look-up and bicubic interpolation, along columns and then along rows
    return (features / factor**2 + per_row / factor + per_row) / 1000
