"""LIFF: prediction of a layer from the reconstruction below it, at any scale factor (paper, section 3.2).

RDN features F of the lower layer, 3x3 unfolding, nearest-neighbour lookup at every target pixel, and an MLP on
[unfolded features, local grid, cell] that makes a filter per pixel, applied to the same unfolded features. All of
that is evaluated in an exact factored form: unfolding followed by a linear map is a 3x3 convolution of F, so the
MLP's first layer and its last layer together with the dot product become convolutions at the lower resolution.
A bicubic skip is added: the network predicts what bicubic interpolation misses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks import places
from compass_codec.networks.arrays import to_device
from compass_codec.networks.strips import spans


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


# Pixels in hand at a time: of the lower layer on a side of a tile, and of the target in a strip within it. On the CPU a
# strip's arrays then stay below what malloc maps and unmaps anew each time (32 MB); a GPU wants few launches.
TILE = {"cpu": 384, "cuda": 1024}
STRIP_PIXELS = {"cpu": 2**13, "cuda": 2**20}


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

    @staticmethod
    def dimensions(weights: Mapping[str, Tensor]) -> dict[str, int]:
        """The arguments with which a network is made that fits ``weights``."""

        def count(prefix: str) -> int:
            return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

        return {
            "channels": weights["extractor.first.weight"].shape[0],
            "hidden": weights["mlp_first.weight"].shape[0],
            "depth": count("mlp_hidden.") + 1,
            "growth": weights["extractor.blocks.0.convs.0.weight"].shape[0],
            "blocks": count("extractor.blocks."),
            "convs": count("extractor.blocks.0.convs."),
        }

    def _maps(self, features: Tensor, cell: Tensor) -> Tensor:
        """What depends on the lower resolution alone, from features with a margin of 1, channels last: the MLP's
        first layer A [hidden], its last layer G [3 * hidden] and that one's bias B [3], at [B, h, w]."""
        c, n = self.channels, self.hidden
        first = self.mlp_first.weight[:, : c * 9].reshape(n, c, 3, 3)
        bias = self.mlp_first.bias + self.mlp_first.weight[:, c * 9 + 2 :] @ cell
        # mlp_last row (k * 3 + o) makes filter tap k of output channel o
        last = self.mlp_last.weight.reshape(c, 9, 3, n).permute(2, 3, 0, 1).reshape(3 * n, c, 3, 3)
        last_bias = self.mlp_last.bias.reshape(c, 9, 3).permute(2, 0, 1).reshape(3, c, 3, 3)
        maps = F.conv2d(features, torch.cat([first, last, last_bias]), F.pad(bias, (0, 3 * n + 3)))
        return maps.permute(0, 2, 3, 1)

    def forward(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Prediction [B, 3, *size], about 0..1, from the layer below ``low`` [B, 3, h, w] in 0..1."""
        return self._tile(low, size, (0, size[0]), (0, size[1]))

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` of ``forward``, a tile at a time. ``low`` may be uint8 in 0..255."""
        columns = spans(size[1], max(1, TILE[low.device.type] * size[1] // low.shape[-1]))
        tiles = [self._tile(low, size, rows, cols) for cols in columns]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 3)

    def _tile(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """``forward`` at target ``rows`` and ``cols`` (first, last + 1)."""
        axes = []
        for low_side, high, span in ((low.shape[-2], size[0], rows), (low.shape[-1], size[1], cols)):
            # the samples that are looked up, known without asking the device, and what their features see
            first, last = ((2 * i + 1) * low_side // (2 * high) for i in (span[0], span[1] - 1))
            reach = self.extractor.reach + 1
            axes.append((first, last + 1, max(0, first - reach), min(low_side, last + 1 + reach), low_side, high, span))
        (top, bottom, y0, y1, *_), (left, right, x0, x1, *_) = axes
        part = low[..., y0:y1, x0:x1]
        if part.dtype == torch.uint8:
            part = part.float() / 255
        part = part.contiguous(memory_format=torch.channels_last)
        weights = [
            to_device(places.as_matrix(places.bicubic_taps(*a[4:]), a[2], a[3]), part.device).to(part.dtype)
            for a in axes
        ]
        interpolated = weights[0] @ part @ weights[1].T
        # with zeros around the picture, as a convolution has them
        features = F.pad(self.extractor(part), (1, 1, 1, 1))
        features = features[..., top - y0 : bottom - y0 + 2, left - x0 : right - x0 + 2]
        cell = torch.tensor([2 * low.shape[-2] / size[0], 2 * low.shape[-1] / size[1]]).to(features, non_blocking=True)
        maps = self._maps(features, cell)
        (row, dy), (col, dx) = (nearest(a[4], a[5], a[6], low.device) for a in axes)
        return self._query(maps, row - top, col - left, dy, dx).to(part.dtype) + interpolated

    def _query(self, maps: Tensor, row: Tensor, col: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        """The MLP at every target pixel, some rows at a time: the filtered picture [B, 3, rows, cols]."""
        n, batch = self.hidden, len(maps)
        grid = self.mlp_first.weight[:, self.channels * 9 : self.channels * 9 + 2].T
        strips = []
        strip = max(1, STRIP_PIXELS[maps.device.type] // (len(col) * batch))
        for i in range(0, len(row), strip):
            y, v = row[i : i + strip], dy[i : i + strip]
            found = maps[:, y[:, None], col]
            offsets = torch.stack(torch.broadcast_tensors(v[:, None], dx), -1).to(grid.dtype)
            a, g, b = found.split([n, 3 * n, 3], -1)
            h = F.relu(a + offsets @ grid, inplace=True)
            for layer in self.mlp_hidden:
                h = F.relu(layer(h), inplace=True)
            strips.append((g.unflatten(-1, (3, n)) * h[..., None, :]).sum(-1) + b)
        return torch.cat(strips, 1).permute(0, 3, 1, 2)
