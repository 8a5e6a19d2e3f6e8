"""LIFF: prediction of a layer from the reconstruction below it, at any scale factor (paper, section 3.2).

RDN features F of the lower layer, 3x3 unfolding, nearest-neighbour lookup at every target pixel, and an MLP on
[unfolded features, local grid, cell] that makes a filter per pixel, applied to the same unfolded features. All of
that is evaluated in an exact factored form: unfolding followed by a linear map is a 3x3 convolution of F, so the
MLP's first layer and its last layer together with the dot product become convolutions at the lower resolution.
A bicubic skip is added: the network predicts what bicubic interpolation misses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec.networks import liff_rows, places
from compass_codec.networks.arrays import to_device


class ResidualDenseBlock(nn.Module):
    """3x3 convolutions, each seeing all before it, fused by a 1x1 convolution and added to the input."""

    def __init__(self, channels: int, growth: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(convs))
        self.fuse = nn.Conv2d(channels + convs * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for conv in self.convs:
            features = torch.cat([features, F.relu(conv(features), inplace=True)], 1)
        fused: Tensor = self.fuse(features)
        return fused.add_(x)


class FeatureExtractor(nn.Module):
    """Residual dense network without upsampling: [B, 3, H, W] in 0..1 to [B, channels, H, W]."""

    def __init__(self, channels: int, growth: int, blocks: int, convs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualDenseBlock(channels, growth, convs) for _ in range(blocks))
        self.fuse = nn.Sequential(
            nn.Conv2d(blocks * channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.reach = 3 + blocks * convs  # pixels that a feature sees to every side

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.first((x - 0.5).to(self.first.weight.dtype))
        x, features = self.second(shallow), []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        fused: Tensor = self.fuse(torch.cat(features, 1))
        return fused.add_(shallow)


def nearest(low: int, high: int, span: tuple[int, int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """places.nearest as tensors."""
    source, offset = places.nearest(low, high, span)
    return to_device(source, torch.device(device)), to_device(offset, torch.device(device))


def bicubic(low: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of the prediction that needs no training."""
    return F.interpolate(low, size=size, mode="bicubic", align_corners=False)


# Sizes to train: the paper's, and one that costs an eighth of it.
SIZES = {
    "paper": {"channels": 64, "hidden": 256, "depth": 4, "growth": 32, "blocks": 4, "convs": 4},
    "small": {"channels": 32, "hidden": 64, "depth": 4, "growth": 16, "blocks": 4, "convs": 4},
}


class LIFF(nn.Module):
    """Local implicit filter function: predicts a picture of any larger size from a smaller one.

    The MLP has ``depth`` hidden layers of width ``hidden``. ``mlp_first`` sees the unfolded features (channels * 9,
    channel-major like ``F.unfold``), the local grid (2) and the cell (2); ``mlp_last`` gives the 3 filters.
    """

    def __init__(self, channels: int, hidden: int, depth: int, growth: int, blocks: int, convs: int) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.extractor = FeatureExtractor(channels, growth, blocks, convs)
        self.mlp_first = nn.Linear(channels * 9 + 4, hidden)
        self.mlp_hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.mlp_last = nn.Linear(hidden, channels * 9 * 3)
        nn.init.zeros_(self.mlp_last.weight)  # at first the prediction is bicubic interpolation
        nn.init.zeros_(self.mlp_last.bias)

    @property
    def device(self) -> torch.device:
        return self.mlp_last.weight.device

    @property
    def reach(self) -> int:
        return self.extractor.reach

    def array(self, x: NDArray[Any]) -> Tensor:
        return to_device(x, self.device)

    def interpolated(self, down: Tensor, x: Tensor, across: Tensor) -> Tensor:
        return down @ x @ across

    def maps(self, x: Tensor, rows: liff_rows.Span, columns: liff_rows.Span, cell: tuple[float, float]) -> Tensor:
        """See liff_rows.Parts: the MLP's first layer A [hidden], its last layer G [3 * hidden] and that one's bias
        B [3]."""
        c, n = self.channels, self.hidden
        # with zeros around the picture, as a convolution has them
        features = F.pad(self.extractor(x), (1, 1, 1, 1))[..., rows[0] : rows[1] + 2, columns[0] : columns[1] + 2]
        first = self.mlp_first.weight[:, : c * 9].reshape(n, c, 3, 3)
        cells = torch.tensor(cell).to(features, non_blocking=True)
        bias = self.mlp_first.bias + self.mlp_first.weight[:, c * 9 + 2 :] @ cells
        # mlp_last row (k * 3 + o) makes filter tap k of output channel o
        last = self.mlp_last.weight.reshape(c, 9, 3, n).permute(2, 3, 0, 1).reshape(3 * n, c, 3, 3)
        last_bias = self.mlp_last.bias.reshape(c, 9, 3).permute(2, 0, 1).reshape(3, c, 3, 3)
        maps = F.conv2d(features, torch.cat([first, last, last_bias]), F.pad(bias, (0, 3 * n + 3)))
        return maps.permute(0, 2, 3, 1)

    def forward(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Prediction [B, 3, *size], about 0..1, from the layer below ``low`` [B, 3, h, w] in 0..1."""
        found: Tensor = liff_rows.tile(self, low, size, (0, size[0]), (0, size[1]))
        return found

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` of ``forward``, a tile at a time. ``low`` may be uint8 in 0..255."""
        found: Tensor = liff_rows.predict(self, low, size, rows)
        return found

    def query(self, maps: Tensor, row: Tensor, column: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        """See liff_rows.Parts: the MLP at every target pixel."""
        n = self.hidden
        grid = self.mlp_first.weight[:, self.channels * 9 : self.channels * 9 + 2].T
        offsets = torch.stack(torch.broadcast_tensors(dy[:, None], dx), -1).to(grid.dtype)
        a, g, b = maps[:, row[:, None], column].split([n, 3 * n, 3], -1)
        h = F.relu(a + offsets @ grid, inplace=True)
        for layer in self.mlp_hidden:
            h = F.relu(layer(h), inplace=True)
        found: Tensor = (g.unflatten(-1, (3, n)) * h[..., None, :]).sum(-1) + b
        return found
