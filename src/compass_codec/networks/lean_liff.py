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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks import flow
from compass_codec.networks.lean import PlainBlock, even, from_zero
from compass_codec.networks.liff import as_matrix, bicubic, bicubic_taps, nearest
from compass_codec.networks.strips import spans

# What is in hand at a time, so that it stays in a processor's caches and launches on a GPU are few: places at half of
# the lower layer's size, and those of them between a block's 1x1 convolutions; of bicubic interpolation target columns,
# the lower layer's rows that are widened, and those that rows of the target are then made from.
PLACES, MIXED_PLACES = {"cpu": 2**12, "cuda": 2**18}, {"cpu": 2**10, "cuda": 2**18}
CUBIC_COLUMNS, CUBIC_ROWS_WIDENED, CUBIC_ROWS = 64, {"cpu": 32, "cuda": 512}, 8


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
        x = F.conv2d(x, self._embedding())
        for block in self.blocks:
            x = block(x)
        x = self.out(x).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)).transpose(2, 3)
        found: Tensor = x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return found

    def _embedding(self) -> Tensor:
        """The weights of the first convolution, which ignore the mean of each colour."""
        weight: Tensor = self.embed.weight.unflatten(1, (3, 4))
        return (weight - weight.mean((2, 3, 4), keepdim=True)).flatten(1, 2)

    def phi(self, low: tuple[int, int], size: tuple[int, int], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, taps] along rows and columns at offsets [N], from a layer of size ``low`` to one of ``size``."""
        cells = [2 * a / b for a, b in zip(low, size, strict=True)]
        return self.rows_phi(rows, *cells), self.columns_phi(columns, *reversed(cells))

    def forward(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Prediction [B, 3, *size], about 0..1, from the layer below ``low`` [B, 3, h, w] in 0..1."""
        h, w = low.shape[-2:]
        (row, dy), (column, dx) = (nearest(a, b, (0, b), low.device) for a, b in ((h, size[0]), (w, size[1])))
        along = self.phi((h, w), size, dy, dx)
        place = torch.arange(size[0], device=row.device) - _first(row, h, size[0])
        added = look_up(self.features(low - 0.5), row, place, -(-size[0] // h), column, *along)
        return bicubic(low.float(), size) + added.transpose(1, 2).float()

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` (first, last + 1) of ``forward`` for one picture, some at a time. ``low`` may be uint8."""
        height, width = low.shape[-2:]
        out = _cubic_rows(low, size, rows)
        fixed = 2 * size[0] % height == 0 and 2 * size[1] % width == 0
        added = (self._fixed if fixed else self._looked_up)((height, width), size, rows, low.device)
        first, last = ((2 * i + 1) * height // (2 * size[0]) // 2 for i in (rows[0], rows[1] - 1))
        for i, x in self._strips(low, first, last + 1):
            span = [min(max(rows[0], _first(2 * k, height, size[0])), rows[1]) for k in (i, i + x.shape[0])]
            out[span[0] - rows[0] : span[1] - rows[0]] += added(x, i, (span[0], span[1]))
        return out.transpose(0, 1)[None]

    def _strips(self, low: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """What the last convolution sees in rows ``first`` to ``last`` - 1 at half of the lower layer's size: the row
        that a strip starts at, and the strip [n, w / 2, channels]."""
        half = (low.shape[-2] + 1) // 2
        reach = len(self.blocks) + 1
        top, bottom = max(0, first - reach), min(half, last + reach)
        step = max(1, PLACES[low.device.type] // ((low.shape[-1] + 1) // 2))
        weight = self._embedding()

        def embedded() -> Iterator[flow.Strip]:
            for i in range(top, bottom, step):
                end = min(i + step, bottom)
                x = even(_pixels(low[..., 2 * max(0, i - 1) : 2 * end + 2, :]).sub_(0.5).to(weight.dtype))
                x = F.pad(F.pixel_unshuffle(x, 2), (1, 1, int(i == 0), int(end == half)), mode="replicate")
                yield F.conv2d(x.contiguous(memory_format=torch.channels_last), weight), end == bottom

        for strip, _ in flow.blocks([_block(block) for block in self.blocks], embedded()):
            x = strip[0].permute(1, 2, 0)
            wanted = x[max(0, first - top) : max(0, last - top)]
            if len(wanted):
                yield max(first, top), wanted
            top += len(x)

    def _looked_up(
        self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int], device: torch.device
    ) -> Callable[[Tensor, int, tuple[int, int]], Tensor]:
        """What turns a strip of ``_strips`` that starts at a row, and a span of ``rows``, to what is added there."""
        (row, dy), (column, dx) = (
            nearest(a, b, span, device) for a, b, span in zip(low, size, (rows, (0, size[1])), strict=True)
        )
        a, b = self.phi(low, size, dy, dx)
        place = torch.arange(*rows, device=device) - _first(row, low[0], size[0])
        most = -(-size[0] // low[0])
        weights = self.out.weight[..., 0, 0].unflatten(0, (2, -1)).transpose(1, 2)

        def added(x: Tensor, first: int, span: tuple[int, int]) -> Tensor:
            k = slice(span[0] - rows[0], span[1] - rows[0])
            # even rows come first, then odd ones
            features = (x.flatten(0, 1)[None] @ weights).view(1, 2 * len(x), 2 * x.shape[1], -1)
            at = row[k] % 2 * len(x) + row[k] // 2 - first
            return look_up(features, at, place[k], most, column, a[k], b)[0]

        return added

    def _fixed(
        self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int], device: torch.device
    ) -> Callable[[Tensor, int, tuple[int, int]], Tensor]:
        """The same where every two pixels along an axis have the same places: a part of the last convolution."""
        m = [2 * b // a for a, b in zip(low, size, strict=True)]
        (row, dy), (column, dx) = (nearest(a, b, (0, c), device) for a, b, c in zip(low, size, m, strict=True))
        a, b = self.phi(low, size, dy, dx)
        weights = self.out.weight[..., 0, 0].unflatten(0, (2, 2, 3, self.taps))[row][:, column]
        weight = torch.einsum("yk,xk,yxckd->ycxd", a, b, weights.float()).to(weights.dtype).flatten(0, 2)

        def added(x: Tensor, first: int, span: tuple[int, int]) -> Tensor:
            y: Tensor = (
                F.linear(x, weight).unflatten(2, (m[0], 3, m[1])).permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(0, 1)
            )
            return y[span[0] - first * m[0] : span[1] - first * m[0], :, : size[1]]

        return added


def _block(block: Any) -> Callable[[Tensor], Tensor]:
    """A PlainBlock for inference on [1, C, rows + 2, W], the row above and the one below with it, channels last."""
    first, last = (layer.weight[..., 0, 0] for layer in (block.p1, block.p2))

    def apply(x: Tensor) -> Tensor:
        h = F.conv2d(x, block.dw.weight, padding=(0, 1), groups=x.shape[1]).permute(0, 2, 3, 1)
        out = x[:, :, 1:-1].permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        step = MIXED_PLACES[x.device.type]
        for h_part, part in zip(h.flatten(0, 2).split(step), out.flatten(0, 2).split(step), strict=True):
            part.addmm_(F.relu(h_part @ first.T, inplace=True), last.T)
        return out.permute(0, 3, 1, 2)

    return apply


def look_up(features: Tensor, row: Tensor, place: Tensor, most: int, column: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The sum over taps: features [B, h, w, 3 * taps], nearest rows [H] and columns [W], values [H, taps] and [W, taps]
    along them, to [B, H, 3, W]. A row is the nearest of ``most`` target rows at most; ``place`` is which of them."""
    lines = torch.arange(features.shape[:2].numel(), device=column.device) * features.shape[2]
    near = features.flatten(0, 2).index_select(0, (lines[:, None] + column).flatten())
    near = near.view(*features.shape[:2], len(column), -1) * b.to(features.dtype).repeat(1, 3)
    # all target rows of a row of features at once, each colour of its own taps
    each = (a[:, None, None] * torch.eye(3, device=a.device)[..., None]).flatten(2).to(near.dtype)
    at = row * most + place
    values = near.new_zeros(features.shape[1] * most, *each.shape[1:]).index_copy(0, at, each)
    out: Tensor = values.unflatten(0, (-1, most)).flatten(1, 2) @ near.transpose(2, 3)
    out = out.unflatten(2, (most, 3)).flatten(1, 2)
    return out.index_select(1, at)


def _first(row: Any, low: int, high: int) -> Any:
    """The first of ``high`` target samples along an axis whose nearest of ``low`` samples is ``row`` or one after it;
    integers or tensors of them."""
    return -((low - 2 * high * row) // (2 * low))


def _pixels(low: Tensor) -> Tensor:
    """A copy in 0..1."""
    return low.float().div_(255) if low.dtype == torch.uint8 else low.to(torch.float32, copy=True)


def _cubic_rows(low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """Bicubic interpolation at ``rows``: [rows, 3, W]."""
    height, width = low.shape[-2:]
    out = torch.empty(rows[1] - rows[0], 3, size[1], device=low.device)
    down = bicubic_taps(height, size[0], rows, low.device)
    taps = bicubic_taps(width, size[1], (0, size[1]), low.device)
    columns = []
    for first, last in spans(size[1], CUBIC_COLUMNS):
        x = _sources(width, size[1], first, last)
        columns.append((slice(*x), as_matrix((taps[0][first:last], taps[1][first:last]), *x).T))
    few, many = (max(1, n * size[0] // height) for n in (CUBIC_ROWS, CUBIC_ROWS_WIDENED[low.device.type]))
    for start in range(*rows, many):
        end = min(start + many, rows[1])
        top, bottom = _sources(height, size[0], start, end)
        part = _pixels(low[0, :, top:bottom].transpose(0, 1)).flatten(0, 1)
        wide = torch.cat([part[:, x] @ weights for x, weights in columns], 1).view(bottom - top, -1)
        for first in range(start, end, few):
            last = min(first + few, end)
            k, y = slice(first - rows[0], last - rows[0]), _sources(height, size[0], first, last)
            weights = as_matrix((down[0][k], down[1][k]), *y)
            torch.mm(weights, wide[y[0] - top : y[1] - top], out=out[k].flatten(1))
    return out


def _sources(low: int, high: int, first: int, last: int) -> tuple[int, int]:
    """The source samples (first, last + 1) of bicubic interpolation at target samples ``first`` to ``last`` - 1."""
    top, bottom = ((2 * i + 1) * low // (2 * high) for i in (first, last - 1))
    return max(0, top - 2), min(low, bottom + 3)


def multiply_accumulates(liff: LeanLIFF, factor: float) -> float:
    """kMAC a pixel of the target at a scale factor; functions along rows and columns are none of each pixel's."""
    layers = [m for m in liff.modules() if isinstance(m, nn.Conv2d)]
    features = sum(layer.weight.numel() for layer in layers) / 4  # a pixel of the lower layer
    per_row = 3 * (liff.taps + 4)  # look-up and bicubic interpolation, along columns and then along rows
    return (features / factor**2 + per_row / factor + per_row) / 1000
