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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec.networks import lean_rows
from compass_codec.networks.arrays import in_unit, to_device
from compass_codec.networks.lean import PlainBlock, even, from_zero
from compass_codec.networks.liff import bicubic, nearest
from compass_codec.networks.places import first as first_of

# Places that are in hand between a block's 1x1 convolutions, so that they stay in a processor's caches.
MIXED_PLACES = {"cpu": 2**10, "cuda": 2**18}


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
        place = torch.arange(size[0], device=row.device) - first_of(row, h, size[0])
        added = look_up(self.features(low - 0.5), row, place, -(-size[0] // h), column, *along)
        return bicubic(low.float(), size) + added.transpose(1, 2).float()

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` (first, last + 1) of ``forward`` for one picture, some at a time. ``low`` may be uint8."""
        found: Tensor = lean_rows.predict(self, low, size, rows)
        return found

    # what lean_rows.Parts asks for

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def array(self, x: NDArray[Any]) -> Tensor:
        return to_device(x, self.device)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def through(self) -> list[Callable[[Tensor], Tensor]]:
        return [_block(block) for block in self.blocks]

    def embedded(self, low: Tensor, span: tuple[int, int]) -> Tensor:
        first, end = span
        weight, half = self._embedding(), (low.shape[-2] + 1) // 2
        x = in_unit(low[..., 2 * max(0, first - 1) : 2 * end + 2, :]) - 0.5
        x = F.pixel_unshuffle(even(x.to(weight.dtype)), 2)
        x = F.pad(x, (1, 1, int(first == 0), int(end == half)), mode="replicate")
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight)

    def added(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        fixed = 2 * size[0] % low[0] == 0 and 2 * size[1] % low[1] == 0
        return (self._fixed if fixed else self._looked_up)(low, size, rows)

    def _looked_up(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        """What turns a strip of features that starts at a row, and a span of ``rows``, to what is added there."""
        (row, dy), (column, dx) = (
            nearest(a, b, span, self.device) for a, b, span in zip(low, size, (rows, (0, size[1])), strict=True)
        )
        a, b = self.phi(low, size, dy, dx)
        place = torch.arange(*rows, device=self.device) - first_of(row, low[0], size[0])
        most = -(-size[0] // low[0])
        weights = self.out.weight[..., 0, 0].unflatten(0, (2, -1)).transpose(1, 2)

        def added(x: Tensor, first: int, span: tuple[int, int]) -> Tensor:
            k = slice(span[0] - rows[0], span[1] - rows[0])
            # even rows come first, then odd ones
            features = (x.flatten(0, 1)[None] @ weights).view(1, 2 * len(x), 2 * x.shape[1], -1)
            at = row[k] % 2 * len(x) + row[k] // 2 - first
            return look_up(features, at, place[k], most, column, a[k], b)[0]

        return added

    def _fixed(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        """The same where every two pixels along an axis have the same places: a part of the last convolution."""
        m = [2 * b // a for a, b in zip(low, size, strict=True)]
        (row, dy), (column, dx) = (nearest(a, b, (0, c), self.device) for a, b, c in zip(low, size, m, strict=True))
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
