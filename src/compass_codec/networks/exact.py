"""Integer twins: networks whose results are the same on every device, in any order of summation.

Activations are integers of at most 9 bits and a sign, weights of 7 bits and a sign, both held in float32. No sum of
their products reaches 2**24, so float32 holds every partial sum exactly. One float32 multiplication and a floor take a
sum to the next layer's units; rounding is part of the bias. Neither depends on what else a device computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks.numbers import ACTIVATION, EXACT, WEIGHT, check_exact


class Conv(nn.Module):
    """A convolution with stride 1 of integers [B, C, H, W] to integers, kept between ``low`` and ``high``.

    ``weight`` int8 [out, in, k, k] ([out, 1, 3, 3] for a depthwise one), ``bias`` int32 [out], ``scale`` float32 [out]:
    the result is floor((sum + bias) * scale). The caller pads. Raises ValueError for weights that are not exact.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, low: int = -EXACT, high: int = EXACT) -> None:
        super().__init__()
        weight, bias, scale = (tensors[f"{name}.{each}"] for each in ("weight", "bias", "scale"))
        check_exact(name, *(each.numpy(force=True) for each in (weight, bias, scale)))
        self.low, self.high = low, high
        self.weight: Tensor
        self.bias: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.register_buffer("scale", scale.float()[:, None, None])

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """``rows``: those outputs alone."""
        weight = self.weight[rows]
        groups = x.shape[1] // weight.shape[1]
        sums = F.conv2d(x, weight, self.bias[rows], groups=groups)
        return sums.mul_(self.scale[rows]).floor_().clamp_(self.low, self.high)


class Block(nn.Module):
    """The integer twin of lean.PlainBlock."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.dw = Conv(tensors, f"{name}.dw", -ACTIVATION, ACTIVATION)
        self.p1 = Conv(tensors, f"{name}.p1", 0, ACTIVATION)
        self.p2 = Conv(tensors, f"{name}.p2")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H + 2, W] with the row above and the one below to [B, C, H, W]."""
        more: Tensor = self.p2(self.p1(self.dw(F.pad(x, (1, 1)))))
        return more.add_(x[:, :, 1:-1]).clamp_(-ACTIVATION, ACTIVATION)


def pack(weight: Tensor, bias: Tensor, unit_in: Tensor | float, unit_out: Tensor | float) -> dict[str, Tensor]:
    """Weights [out, in, k, k] and bias [out] of a convolution as those of a Conv.

    An integer of its input stands for so many of ``unit_in`` (one for all channels, or [in]), one of its output for
    so many of ``unit_out`` (one for all, or [out]). Every output has a unit of its own for its weights: the finest that
    keeps weights within their bits and sums below 2**24.
    """
    units = torch.as_tensor(unit_in, dtype=torch.float64).expand(weight.shape[1])
    real, offset = weight.double() * units[:, None, None], bias.double()
    out = torch.as_tensor(unit_out, dtype=torch.float64).expand(len(weight))
    flat = real.flatten(1).abs()
    # weights of 2**-20 of the output's unit and less change nothing, and neither do sums beyond it
    step = torch.maximum(flat.amax(1) / WEIGHT, (flat.sum(1) * ACTIVATION + offset.abs() + out) / (EXACT - 2**18))
    step = torch.maximum(step, out * 2**-20)
    integers = (real / step[:, None, None, None]).round()
    scale = (step / out).float()
    # half of the output's unit rounds; it is a part of a sum, which the step keeps small
    shift = ((offset + out / 2) / step).round()
    return {"weight": integers.to(torch.int8).contiguous(), "bias": shift.to(torch.int32), "scale": scale}
