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

from compass_codec.networks.mean_scale import ImageCodec
from compass_codec.networks.mean_scale_numbers import (
    ACTIVATION_BITS,
    CLAMP,
    LEAK,
    WEIGHT_BITS,
    integers,
    scale_bounds,
    stages,
)


class HyperDecoder(nn.Module):
    """Integer twin of ``ImageCodec.h_s``: z symbols to scale indices and means of y."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self.kinds: list[bool] = []
        for i, layer in enumerate(m for m in codec.h_s if not isinstance(m, nn.LeakyReLU)):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None
            transposed = isinstance(layer, nn.ConvTranspose2d)
            weight, bias = integers(layer.weight.numpy(force=True), layer.bias.numpy(force=True), transposed)
            self.register_buffer(f"weight{i}", torch.from_numpy(weight))
            self.register_buffer(f"bias{i}", torch.from_numpy(bias))
            self.kinds.append(transposed)
        self.register_buffer("bounds", torch.from_numpy(scale_bounds()))

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
