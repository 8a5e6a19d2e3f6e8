"""Enhancement codecs that predict their latent, on lean's blocks: Mei et al. (2021) and RPN (Zhang et al. 2023).

The layer itself goes through analysis and synthesis. A network of the decoded lower layer predicts the latent, and the
difference is coded. Both systems double the size from layer to layer. What they see of the lower layer is therefore a
picture of half the layer's size, to which bicubic interpolation brings any other.

Prediction and difference are floating point. Scales and means of the difference come from its own hyper-latent alone,
so that symbols are the same on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec.networks import lean_rows
from compass_codec.networks.arrays import to_device
from compass_codec.networks.lean import GatedBlock, LeanCodec, eighth, even, from_zero
from compass_codec.networks.liff import bicubic
from compass_codec.networks.numbers import UNSHUFFLE
from compass_codec.networks.rates import gain


class Half(nn.Module):
    """The lower layer at half of a layer's size, rounded up, each sample as 2x2 pixels; see ``halved``."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device or torch.device("cpu")

    def forward(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer below ``low`` [B, 3, h, w] in 0..1 to [B, 3, *size], about 0..1."""
        return _doubled(bicubic(low.float(), half_of(size)))[..., : size[0], : size[1]]

    def rows(self, low: Tensor, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """Rows ``rows`` (first, last + 1) of ``forward`` for one picture. ``low`` may be uint8."""
        first, end = rows
        x = lean_rows.cubic(self, low, half_of(size), (first // 2, -(-end // 2))).swapaxes(0, 1)[None]
        return _doubled(x)[:, :, first % 2 :][:, :, : end - first, : size[1]]

    # what lean_rows.cubic asks for

    def array(self, x: NDArray[Any]) -> Tensor:
        return to_device(x, self.device)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


def half_of(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def halved(x: Tensor) -> Tensor:
    """Rows of what Half gives, the first an even one, to the picture of half the size."""
    return x[..., ::2, ::2]


class PredictedCodec(LeanCodec):
    """A LeanCodec whose y is the latent of the layer less its prediction."""

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        self.width = self.dimensions["c16"]
        self.from_half = nn.Conv2d(3 * UNSHUFFLE**2, self.width, 1)
        self.to_prediction = from_zero(nn.Conv2d(self.width, self.m, 1))

    def mine(self, f: Tensor, level: Tensor) -> Tensor:
        """Features of the lower layer [B, C, h, w] at 1/16 of the layer's size to those that predict its latent."""
        raise NotImplementedError

    def predict(self, half: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The lower layer at half of the size, less 1/2, to what the encoder subtracts from the latent and what the
        decoder adds to the difference, [B, M, h, w] each, float32."""
        f = self.mine(self.from_half(eighth(half)), level)
        predicted = self.to_prediction(f).float() * gain(self.log_gain, level)
        return predicted, self.added(predicted, f, level)

    def added(self, predicted: Tensor, f: Tensor, level: Tensor) -> Tensor:
        return predicted


class MeiCodec(PredictedCodec):
    """Latent-feature prediction and reuse (Mei et al. 2021): a residual network predicts, and the synthesis also gets
    features of the lower layer as they are."""

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        self.p_blocks = nn.ModuleList(GatedBlock(self.width) for _ in range(3))
        self.reuse = from_zero(nn.Conv2d(self.width, self.m, 1))

    def mine(self, f: Tensor, level: Tensor) -> Tensor:
        for block in self.p_blocks:
            f = block(f, level)
        return f

    def added(self, predicted: Tensor, f: Tensor, level: Tensor) -> Tensor:
        reused: Tensor = self.reuse(f).float() * gain(self.log_gain, level)
        return predicted + reused


class RpnCodec(PredictedCodec):
    """Cross-resolution context mining (RPN, Zhang et al. 2023): features are distilled to 1/32 and then enrich those at
    1/16, twice. Gates of the blocks leave out what is redundant."""

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        c, twice = self.width, range(2)
        self.p_down = nn.ModuleList(nn.Conv2d(c, c, 2, 2) for _ in twice)
        self.p_distil = nn.ModuleList(GatedBlock(c) for _ in twice)
        self.p_up = nn.ModuleList(from_zero(nn.ConvTranspose2d(c, c, 2, 2)) for _ in twice)
        self.p_enrich = nn.ModuleList(GatedBlock(c) for _ in twice)

    def mine(self, f: Tensor, level: Tensor) -> Tensor:
        h, w = f.shape[-2:]
        for down, distil, up, enrich in zip(self.p_down, self.p_distil, self.p_up, self.p_enrich, strict=True):
            f = enrich(f + up(distil(down(even(f)), level))[..., :h, :w], level)
        return f


CODECS: dict[str, type[PredictedCodec]] = {"mei": MeiCodec, "rpn": RpnCodec}
