"""The image codec's transforms: analysis, synthesis and their hyper twins, with layer-wise padding.

Architecture: mean-scale hyperprior (Minnen et al. 2018), N = 128, M = 192, GDN between 5x5 convolutions of
stride 2. The base layer and the residual codec are two instances of one class. Parameter names follow
CompressAI's ``MeanScaleHyperprior``, so weights can be exchanged with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks.mean_scale_numbers import BETA_LEAST, LAMBDAS, LEAK, PEDESTAL, stages
from compass_codec.networks.rates import gain


class _LowerBound(torch.autograd.Function):
    """max(x, bound) whose gradient still lets x rise from below the bound (Balle et al. 2018)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    bounded: Tensor = _LowerBound.apply(x, bound)
    return bounded


class GDN(nn.Module):
    """Generalised divisive normalisation, y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2) (Balle et al. 2016).

    ``beta`` and ``gamma`` are stored as square roots above a small pedestal, as CompressAI stores them.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.full((channels,), math.sqrt(1 + PEDESTAL)))
        gamma = torch.full((channels, channels), math.sqrt(PEDESTAL))
        self.gamma = nn.Parameter(gamma.fill_diagonal_(math.sqrt(0.1 + PEDESTAL)))

    def forward(self, x: Tensor) -> Tensor:
        beta = lower_bound(self.beta, (BETA_LEAST + PEDESTAL) ** 0.5) ** 2 - PEDESTAL
        gamma = lower_bound(self.gamma, PEDESTAL**0.5) ** 2 - PEDESTAL
        gamma, beta = gamma[:, :, None, None].to(x.dtype), beta.to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad):
            normalised: Tensor = _Normalised.apply(x, gamma, beta, self.inverse)
            return normalised
        return _divisor(x, gamma, beta, self.inverse).mul_(x)


def _divisor(x: Tensor, gamma: Tensor, beta: Tensor, inverse: bool) -> Tensor:
    """What GDN multiplies x by: one over the root of beta + gamma x^2, or the root itself."""
    norm = F.conv2d(x * x, gamma, beta)
    return norm.sqrt_() if inverse else norm.rsqrt_()


class _Normalised(torch.autograd.Function):
    """GDN with a gradient of its own: what autograd makes of it goes through memory nearly twice as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, inverse: bool) -> Tensor:
        root = _divisor(x, gamma, beta, inverse)
        ctx.save_for_backward(x, gamma, root)
        ctx.inverse = inverse
        return x * root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, gamma, root = ctx.saved_tensors
        # with y = x n^p: dL/dn = p dL/dy x n^(p-1), of which p waits
        power, by_norm = (0.5, grad * x / root) if ctx.inverse else (-0.5, grad * x * root * root * root)
        sides, weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        by_square, by_gamma, by_beta = torch.ops.aten.convolution_backward(
            by_norm, x * x, gamma, [len(gamma)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [sides, weights, weights]
        )
        if weights:
            by_gamma, by_beta = by_gamma * power, by_beta * power
        by_x = (grad * root).addcmul_(by_square, x, value=2 * power) if sides else None
        return by_x, by_gamma, by_beta, None


def _down(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 5, stride=2, padding=2)


def _up(cin: int, cout: int) -> nn.ConvTranspose2d:
    return _Up(cin, cout, 5, stride=2, padding=2, output_padding=1)


class _Up(nn.ConvTranspose2d):
    """A transposed convolution that CPUs train faster: its weights' gradient is that of the convolution it transposes,
    for which oneDNN takes, in bfloat16, half the time or less."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if x.is_cuda or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x, output_size)
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        assert self.bias is not None
        raised: Tensor = _Raised.apply(x.to(kind), self.weight.to(kind), self.bias.to(kind))
        return raised


class _Raised(torch.autograd.Function):
    """The transposed convolution of :class:`_Up`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, 2, 2, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        by_weight = torch.ops.aten.convolution_backward(
            x, grad, weight, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]
        by_x = F.conv2d(grad, weight, None, 2, 2) if ctx.needs_input_grad[0] else None
        return by_x, by_weight, grad.sum((0, 2, 3))


def descend(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run an encoder; before each convolution of stride 2 an odd side is replicate-padded by 1 (paper, 3.1)."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            pad = (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)
            if any(pad):
                x = F.pad(x, pad, mode="replicate")
        x = layer(x)
    return x


def ascend(layers: nn.Sequential, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Run a decoder; what layer-wise padding added is cropped after each transposed convolution."""
    ups = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
    sizes = iter(reversed(stages(size, len(ups))[:-1]))
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.ConvTranspose2d):
            h, w = next(sizes)
            x = x[..., :h, :w]
    return x


class ImageCodec(nn.Module):
    """Transforms of one mean-scale hyperprior codec with a gain for every rate.

    Pictures are [B, 3, H, W] centred on zero: samples minus 0.5 for the base layer, the residual itself for the
    residual codec. The gain acts on y before the hyper-encoder, so entropy parameters do not depend on the rate
    and only the inverse gain in front of the synthesis does.
    """

    def __init__(self, n: int = 128, m: int = 192) -> None:
        super().__init__()
        self.n, self.m = n, m
        self.g_a = nn.Sequential(_down(3, n), GDN(n), _down(n, n), GDN(n), _down(n, n), GDN(n), _down(n, m))
        inverse = [GDN(n, inverse=True) for _ in range(3)]
        self.g_s = nn.Sequential(_up(m, n), inverse[0], _up(n, n), inverse[1], _up(n, n), inverse[2], _up(n, 3))
        leaky = nn.LeakyReLU(LEAK)
        self.h_a = nn.Sequential(nn.Conv2d(m, n, 3, padding=1), leaky, _down(n, n), leaky, _down(n, n))
        wide = m * 3 // 2
        self.h_s = nn.Sequential(_up(n, m), leaky, _up(m, wide), leaky, nn.Conv2d(wide, 2 * m, 3, padding=1))
        self.log_gain = nn.Parameter(torch.zeros(len(LAMBDAS), m))
        self.log_inv_gain = nn.Parameter(torch.zeros(len(LAMBDAS), m))
        self.pixel_type = torch.float32

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor]) -> ImageCodec:
        """A codec with as many channels as these weights have."""
        return cls(len(tensors["g_a.0.bias"]), len(tensors["g_a.6.bias"]))

    def pixels_in(self, kind: torch.dtype) -> None:
        """Let analysis and synthesis compute in float16 or bfloat16. What they take and give stays float32, and so do
        the gains and all that z goes through."""
        self.pixel_type = kind
        for layer in (*self.g_a, *self.g_s):
            if not isinstance(layer, GDN):
                layer.to(kind)

    def analysis(self, x: Tensor, level: Tensor) -> Tensor:
        """Picture [B, 3, H, W] to latent y [B, M, ceil(H/16), ceil(W/16)], gain of ``level`` [B] applied."""
        return descend(self.g_a, x.to(self.pixel_type)).to(x.dtype) * gain(self.log_gain, level)

    def synthesis(self, y_hat: Tensor, level: Tensor, size: tuple[int, int]) -> Tensor:
        """Quantised latent back to a picture of ``size`` (height, width)."""
        y_hat = y_hat * gain(self.log_inv_gain, level)
        return ascend(self.g_s, y_hat.to(self.pixel_type), size).to(y_hat.dtype)

    def hyper_analysis(self, y: Tensor) -> Tensor:
        """Latent y to hyper-latent z [B, N, ceil(h/4), ceil(w/4)]."""
        return descend(self.h_a, y)

    def hyper_synthesis(self, z_hat: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Hyper-latent to scales and means of y, each [B, M, *size]; in float, for training."""
        scales, means = ascend(self.h_s, z_hat, size).chunk(2, dim=1)
        return scales, means
