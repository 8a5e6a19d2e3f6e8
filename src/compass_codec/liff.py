"""LIFF: prediction of a layer from the reconstruction below it, at any scale factor (paper, section 3.2).

RDN features F of the lower layer, 3x3 unfolding, nearest-neighbour lookup at every target pixel, and an MLP on
[unfolded features, local grid, cell] that makes a filter per pixel, applied to the same unfolded features. All of
that is evaluated in an exact factored form: unfolding followed by a linear map is a 3x3 convolution of F, so the
MLP's first layer and its last layer together with the dot product become convolutions at the lower resolution.
A bicubic skip is added: the network predicts what bicubic interpolation misses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualDenseBlock(nn.Module):
    """Four 3x3 convolutions, each seeing all before it, fused by a 1x1 convolution and added to the input."""

    def __init__(self, channels: int, growth: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(convs))
        self.fuse = nn.Conv2d(channels + convs * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(F.relu(conv(torch.cat(features, 1))))
        return x + self.fuse(torch.cat(features, 1))


class FeatureExtractor(nn.Module):
    """Residual dense network without upsampling: [B, 3, H, W] in 0..1 to [B, channels, H, W]."""

    def __init__(self, channels: int = 64, growth: int = 32, blocks: int = 4, convs: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualDenseBlock(channels, growth, convs) for _ in range(blocks))
        self.fuse = nn.Sequential(
            nn.Conv2d(blocks * channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.first(x - 0.5)
        x, features = self.second(shallow), []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return shallow + self.fuse(torch.cat(features, 1))


# Target pixels in hand at a time. On the CPU the largest array of a strip then stays below what malloc maps and
# unmaps anew each time (32 MB); a GPU wants few launches.
STRIP_PIXELS = {"cpu": 2**13, "cuda": 2**20}


def nearest(low: int, high: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """For each of ``high`` target samples along an axis: index of the nearest of ``low`` samples, and the offset.

    The offset is the paper's local grid, target minus source coordinate in -1..1 coordinates, times ``low`` so
    that it spans -1..1 within a source sample (LIIF's convention). Integer arithmetic decides the index, so every
    device agrees.
    """
    i = torch.arange(high, device=device)
    source = ((2 * i + 1) * low).div(2 * high, rounding_mode="floor")
    offset = ((2 * i + 1) * low - (2 * source + 1) * high).double() / high
    return source, offset.float()


def bicubic(low: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of the prediction that needs no training."""
    return F.interpolate(low, size=size, mode="bicubic", align_corners=False)


class LIFF(nn.Module):
    """Local implicit filter function: predicts a picture of any larger size from a smaller one.

    The four MLP hidden layers are ``hidden`` wide. ``mlp_first`` sees the unfolded features (in_channels * 9,
    channel-major like ``F.unfold``), the local grid (2) and the cell (2); ``mlp_last`` gives the 3 filters.
    """

    def __init__(self, channels: int = 64, hidden: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.extractor = FeatureExtractor(channels)
        self.mlp_first = nn.Linear(channels * 9 + 4, hidden)
        self.mlp_hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.mlp_last = nn.Linear(hidden, channels * 9 * 3)
        nn.init.zeros_(self.mlp_last.weight)  # at first the prediction is bicubic interpolation
        nn.init.zeros_(self.mlp_last.bias)

    def _maps(self, features: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the lower resolution alone, from features with a margin of 1: first layer A
        [B, hidden, h, w], last layer G [B, 3 * hidden, h, w] and its bias B [B, 3, h, w]."""
        c, n = self.channels, self.hidden
        first = self.mlp_first.weight[:, : c * 9].reshape(n, c, 3, 3)
        bias = self.mlp_first.bias + self.mlp_first.weight[:, c * 9 + 2 :] @ cell
        # mlp_last row (k * 3 + o) makes filter tap k of output channel o
        last = self.mlp_last.weight.reshape(c, 9, 3, n).permute(2, 3, 0, 1).reshape(3 * n, c, 3, 3)
        last_bias = self.mlp_last.bias.reshape(c, 9, 3).permute(2, 0, 1).reshape(3, c, 3, 3)
        a = F.conv2d(features, first, bias)
        g = F.conv2d(features, last)
        b = F.conv2d(features, last_bias)
        return a, g, b

    def forward(self, low: Tensor, size: tuple[int, int], strip: int | None = None) -> Tensor:
        """Prediction [B, 3, *size], about 0..1, from the layer below ``low`` [B, 3, h, w] in 0..1.

        ``strip`` rows of the target are evaluated at a time, which bounds memory and changes nothing else.
        """
        height, width = size
        strip = strip or max(1, STRIP_PIXELS[low.device.type] // (width * len(low)))
        features = F.pad(self.extractor(low), (1, 1, 1, 1))
        cell = torch.tensor([2 * low.shape[-2] / height, 2 * low.shape[-1] / width]).to(low, non_blocking=True)
        rows, dy = nearest(low.shape[-2], height, low.device)
        cols, dx = nearest(low.shape[-1], width, low.device)
        grid = self.mlp_first.weight[:, self.channels * 9 : self.channels * 9 + 2]
        strips = []
        # the maps are 16 times the size of what they are made from, so they too are made for a few rows at a time
        for block in range(0, height, 8 * strip):
            end = min(block + 8 * strip, height)
            # the source rows that are looked up, known without asking the device
            first, last = ((2 * i + 1) * low.shape[-2] // (2 * height) for i in (block, end - 1))
            maps = [t.permute(0, 2, 3, 1) for t in self._maps(features[:, :, first : last + 3], cell)]
            for top in range(block, end, strip):
                part = slice(top, min(top + strip, end))
                strips.append(self._strip(maps, rows[part] - first, cols, dy[part], dx, grid))
        return bicubic(low, size) + torch.cat(strips, 2)

    def _strip(self, maps: list[Tensor], rows: Tensor, cols: Tensor, dy: Tensor, dx: Tensor, grid: Tensor) -> Tensor:
        """Rows of the target from the maps A, G and B, channels last: what is looked up is then contiguous."""
        a, g, b = (t[:, rows][:, :, cols] for t in maps)
        dy, dx, grid = (t.to(a.dtype) for t in (dy, dx, grid))
        h = F.relu(a + (dy[:, None, None] * grid[:, 0] + dx[:, None] * grid[:, 1]))
        for layer in self.mlp_hidden:
            h = F.relu(layer(h))
        out = torch.einsum("bhwon,bhwn->bhwo", g.reshape(*g.shape[:3], 3, self.hidden), h) + b
        return out.permute(0, 3, 1, 2)
