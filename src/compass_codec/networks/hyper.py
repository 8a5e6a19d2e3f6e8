"""The hyper-decoder in integers: entropy parameters that are the same on every device.

Everything the range decoder depends on must not be a rounded float. Weights and activations are fixed-point
integers held in float64; every product and sum stays below 2**53 and is therefore exact in any order, and a round
after each convolution repairs algorithms that are not (Winograd, FFT). Weights are float16 in the file, so their
integer form follows from the file alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.entropy import scale_levels
from compass_codec.errors import WeightsError
from compass_codec.networks.mean_scale import LEAK, ImageCodec, stages

ACTIVATION_BITS = 12  # fractional bits of activations, scales and means
WEIGHT_BITS = 16  # fractional bits of weights
CLAMP = 2.0**24  # of activations; such integers are exact in float32 too


class HyperDecoder(nn.Module):
    """Integer twin of ``ImageCodec.h_s``: z symbols to scale indices and means of y."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self.kinds: list[bool] = []
        for i, layer in enumerate(m for m in codec.h_s if not isinstance(m, nn.LeakyReLU)):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None
            transposed = isinstance(layer, nn.ConvTranspose2d)
            weight = (layer.weight.detach().double() * 2**WEIGHT_BITS).round()
            bias = (layer.bias.detach().double() * 2 ** (WEIGHT_BITS + ACTIVATION_BITS)).round()
            reach = weight.abs().sum((0, 2, 3) if transposed else (1, 2, 3)) * CLAMP + bias.abs()
            if not reach.max() < 2.0**52:
                raise WeightsError("the hyper-decoder's weights are too large for exact integer arithmetic")
            self.register_buffer(f"weight{i}", weight)
            self.register_buffer(f"bias{i}", bias)
            self.kinds.append(transposed)
        levels = torch.from_numpy(scale_levels())
        # the nearer of two neighbouring levels in log scale
        bounds = ((levels[:-1] * levels[1:]).sqrt() * 2**ACTIVATION_BITS).round()
        self.register_buffer("bounds", bounds)

    @torch.inference_mode()
    def forward(self, z: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """z [B, N, h, w] of integers (any dtype) to scale indices (int64) and means (float32), each [B, M, *size]."""
        x = z.double() * 2**ACTIVATION_BITS
        sizes = iter(reversed(stages(size, 2)[:-1]))
        for i, transposed in enumerate(self.kinds):
            x = x.clamp(-CLAMP, CLAMP)
            weight, bias = self.get_buffer(f"weight{i}"), self.get_buffer(f"bias{i}")
            if transposed:
                h, w = next(sizes)
                x = F.conv_transpose2d(x, weight, None, stride=2, padding=2, output_padding=1)[..., :h, :w]
            else:
                x = F.conv2d(x, weight, None, padding=1)
            # sums of products of weights and activations, and a bias, as activations; rounded half up
            x = ((x.round() + bias[:, None, None]) * 2.0**-WEIGHT_BITS + 0.5).floor()
            if i + 1 < len(self.kinds):
                x = torch.maximum(x, (x * LEAK).floor())  # LeakyReLU with a dyadic slope
        scales, means = x.clamp(-CLAMP, CLAMP).chunk(2, dim=1)
        return torch.bucketize(scales.contiguous(), self.get_buffer("bounds")), (means * 2.0**-ACTIVATION_BITS).float()
