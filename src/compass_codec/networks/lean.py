"""The backbone "lean": 1x1 and depthwise convolutions at 1/8 and 1/16 of the size, and a context model in four steps.

Analysis and synthesis mirror each other: pixels are unshuffled by 8, blocks run at 1/8 and 1/16, and the latent y lies
at 1/16. Hyper networks take y to z at 1/64 and back to features. The context model codes y in four steps: each step
covers every 2x2 square of places, a quarter of the channels at each, so that it knows more of every neighbourhood and
of every channel than the step before.

Each block ends in a convolution that starts at zero: blocks can be added to a trained codec without changing what it
computes. What leads to scales and means uses ReLU, and no normalisation, so that it has an integer form.

An enhancement layer has the transforms of the base codec, and an entropy model of its own: what is coded is the latent
of the layer less the latent of its prediction. The entropy model never sees the prediction, which is floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks.numbers import CONTEXT, EPSILON, LAMBDAS, STEPS, UNSHUFFLE, entropy_model
from compass_codec.networks.order import Part, Step, order_of
from compass_codec.networks.rates import gain

Layer = TypeVar("Layer", bound=nn.Module)


def _depthwise(channels: int, bias: bool = True) -> nn.Conv2d:
    """A depthwise 3x3 convolution that starts near the identity."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(0.3)
        layer.weight[:, 0, 1, 1] += 1
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def from_zero(layer: Layer) -> Layer:
    """The layer, which adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class RMSNorm(torch.autograd.Function):
    """x [B, C, H, W] over the root of its mean square over channels, with a gradient that takes few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = (x.float().square().mean(1, keepdim=True) + EPSILON).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        by_x: Tensor = torch.addcmul(grad, y, (grad * y).mean(1, keepdim=True), value=-1) * scale
        return by_x


class GatedBlock(nn.Module):
    """x + f(x): depthwise 3x3, RMS norm over channels, 1x1 to 2C, gate silu(a) b, gain of the rate where ``rated``, 1x1
    to C."""

    def __init__(self, channels: int, rated: bool = True) -> None:
        super().__init__()
        self.dw = _depthwise(channels)
        self.norm = nn.Parameter(torch.ones(channels))
        self.p1 = nn.Conv2d(channels, 2 * channels, 1)
        self.p2 = from_zero(nn.Conv2d(channels, channels, 1))
        self.log_gain = nn.Parameter(torch.zeros(len(LAMBDAS), channels)) if rated else None

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        h: Tensor = RMSNorm.apply(self.dw(x))
        # the norm's weights, on those that come next: less arithmetic
        a, b = F.conv2d(h, self.p1.weight * self.norm[:, None, None], self.p1.bias).chunk(2, 1)
        gated = F.silu(a) * b
        if self.log_gain is not None and level is not None:
            gated = gated * gain(self.log_gain, level).to(a.dtype)
        added: Tensor = self.p2(gated)
        return x + added


class PlainBlock(nn.Module):
    """x + f(x): depthwise 3x3, 1x1 to 2C, ReLU, 1x1 to C; its integer form is exact."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.dw = _depthwise(channels, bias)
        self.p1 = nn.Conv2d(channels, 2 * channels, 1, bias=bias)
        self.p2 = from_zero(nn.Conv2d(2 * channels, channels, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.p2(F.relu(self.p1(self.dw(x))))
        return x + added


def eighth(x: Tensor) -> Tensor:
    """A picture [B, 3, H, W] as 192 channels at 1/8 of its size, rounded up."""
    return F.pixel_unshuffle(even(x, UNSHUFFLE), UNSHUFFLE)


def even(x: Tensor, multiple: int = 2) -> Tensor:
    """Layer-wise padding (paper, 3.1): x with its last row and column repeated up to a multiple of each side."""
    pad = (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)
    return F.pad(x, pad, mode="replicate") if any(pad) else x


class EntropyModel(nn.Module):
    """Hyper networks and context model of one lean codec, by the names that its weights file has.

    ``m`` channels of y, a multiple of 4; ``n`` of z; ``h`` in hyper networks; ``g`` in the context model.

    ``entropy`` names the kind: "context" as described above; "pyramid" and "pyramid-fast", from coarse to fine in more
    or fewer steps (order.py); "hyperprior", hyper networks alone; "factorized", neither, in which case each channel of
    y has a learned density (training/density.py) of y over exp(log_scale).
    """

    def __init__(self, m: int = 256, n: int = 64, h: int = 128, g: int = 128, entropy: str = CONTEXT) -> None:
        super().__init__()
        hyper, networks, _ = entropy_model(entropy)
        if m % STEPS:
            raise ValueError(f"{m} channels of y; the context model needs a multiple of {STEPS}")
        self.dimensions: dict[str, Any] = {"m": m, "n": n, "h": h, "g": g}
        self.dimensions |= {} if entropy == CONTEXT else {"entropy": entropy}
        self.m, self.n, self.entropy = m, n, entropy
        self.order = order_of(entropy, m)
        # what brings y to about 1: one over the root of each channel's standard deviation at the start
        self.y_scale: Tensor
        self.register_buffer("y_scale", torch.ones(m))
        if not hyper:
            self.log_scale, self.context = nn.Parameter(torch.zeros(len(LAMBDAS), m)), None
            return
        self.h_a = nn.ModuleList([nn.Conv2d(m, h, 1), nn.Conv2d(h, h, 2, 2), nn.Conv2d(h, n, 2, 2)])
        self.h_a_blocks = nn.ModuleList(PlainBlock(h) for _ in range(2))
        self.h_s = nn.ModuleList([nn.ConvTranspose2d(n, h, 2, 2), nn.ConvTranspose2d(h, h, 2, 2)])
        self.h_s_blocks = nn.ModuleList(PlainBlock(h) for _ in range(2))
        self.h_p = nn.Conv2d(h, 2 * m, 1)
        self.context = ContextModel(m, h, g, networks, self.order[-1].marks) if networks else None

    def hyper_analysis(self, y: Tensor) -> Tensor:
        """Latent y to hyper-latent z [B, N, ceil(h/4), ceil(w/4)]."""
        x = F.relu(self.h_a[0](y * self.y_scale[:, None, None]))
        for block, down in zip(self.h_a_blocks, self.h_a[1:], strict=True):
            x = down(even(block(x)))
        z: Tensor = x
        return z

    def hyper_synthesis(self, z_hat: Tensor, size: tuple[int, int]) -> Tensor:
        """Hyper-latent to features [B, h, *size], from which scales and means are made; ``size`` is that of y."""
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        x = z_hat
        for up, block, (rows, columns) in zip(self.h_s, self.h_s_blocks, (half, size), strict=True):
            x = block(F.relu(up(x)[..., :rows, :columns]))
        return x

    def walk(
        self,
        features: Tensor,
        code: Callable[[int, Tensor, Tensor, tuple[slice, ...]], Tensor],
        with_context: bool = True,
    ) -> Tensor:
        """Go through the steps of the entropy model; returns the latent that the decoder has, [B, M, h, w].

        ``code`` is called for every part of every step with the step, log scales and means [B, channels, rows, columns]
        of symbols, and the part of [B, M, h, w] that they are; it returns the quantised latents there. Without context
        model, or ``with_context``, all scales and means come from ``features`` alone.
        """
        size = features.shape[-2:]
        scales, means = self.h_p(features).float().chunk(2, 1)
        y_scale, model = self.y_scale[:, None, None], self.context if with_context else None
        known = features.new_zeros((len(features), self.m, *size), dtype=torch.float32)
        for number, step in enumerate(self.order):
            # a latent of few rows or columns lacks some places
            parts = [part for part in step.parts if known[part.of(step.stride)].numel()]
            hidden, found = None, []
            if model and parts and step.context:
                hidden = model(step, known[step.grid] * y_scale, features[step.grid])
            for part in parts:
                place = part.of(step.stride)
                s, mean = scales[place], means[place]
                if model and hidden is not None:
                    more = model.parameters_of(step, part, hidden[(..., *part.places())]).float()
                    s, mean = (a + b for a, b in zip((s, mean), more.chunk(2, 1), strict=True))
                found.append((place, code(number, s, mean / y_scale[part.channels], place)))
            known = known.clone()  # the steps before need what they saw for their gradients
            for place, values in found:
                known[place] = values
        return known


class LeanCodec(EntropyModel):
    """Transforms and entropy model of one lean codec.

    ``c8`` and ``c16`` channels and ``n8`` and ``n16`` blocks at 1/8 and 1/16, on either side; ``entropy`` as those of
    EntropyModel. Pictures are [B, 3, H, W] centred on zero, levels [B] real indices into LAMBDAS.
    """

    def __init__(self, c8: int = 144, c16: int = 288, n8: int = 5, n16: int = 3, **entropy: Any) -> None:
        super().__init__(**entropy)
        self.dimensions = {"c8": c8, "c16": c16, "n8": n8, "n16": n16} | self.dimensions
        samples, m = 3 * UNSHUFFLE**2, self.m
        self.embed = nn.Conv2d(samples, c8, 1)
        self.a8 = nn.ModuleList(GatedBlock(c8) for _ in range(n8))
        self.down = nn.Conv2d(c8, c16, 2, 2)
        self.a16 = nn.ModuleList(GatedBlock(c16) for _ in range(n16))
        self.to_y = nn.Conv2d(c16, m, 1)
        self.from_y = nn.Conv2d(m, c16, 1)
        self.s16 = nn.ModuleList(GatedBlock(c16) for _ in range(n16))
        self.up = nn.ConvTranspose2d(c16, c8, 2, 2)
        self.s8 = nn.ModuleList(GatedBlock(c8) for _ in range(n8))
        self.out = nn.Conv2d(c8, samples, 1)
        self.log_gain = nn.Parameter(torch.zeros(len(LAMBDAS), m))
        self.log_inv_gain = nn.Parameter(torch.zeros(len(LAMBDAS), m))

    def analysis(self, x: Tensor, level: Tensor) -> Tensor:
        """Picture [B, 3, H, W] to latent y [B, M, ceil(H/16), ceil(W/16)], gain of ``level`` [B] applied."""
        f = self.embed(eighth(x))
        for block in self.a8:
            f = block(f, level)
        f = self.down(even(f))
        for block in self.a16:
            f = block(f, level)
        y: Tensor = self.to_y(f).float() * gain(self.log_gain, level)
        return y

    def synthesis(self, y_hat: Tensor, level: Tensor, size: tuple[int, int]) -> Tensor:
        """Quantised latent back to a picture of ``size`` (height, width)."""
        h, w = size
        f = self.from_y(y_hat * gain(self.log_inv_gain, level))
        for block in self.s16:
            f = block(f, level)
        f = self.up(f)[..., : -(-h // UNSHUFFLE), : -(-w // UNSHUFFLE)]
        for block in self.s8:
            f = block(f, level)
        return F.pixel_shuffle(self.out(f).float(), UNSHUFFLE)[..., :h, :w]


class ContextModel(nn.Module):
    """What the latents of earlier steps add to log scales and means: networks for the steps, see order.py."""

    def __init__(self, m: int, h: int, g: int, networks: int, marks: int) -> None:
        super().__init__()
        self.known = nn.ModuleList(nn.Conv2d(m + marks, g, 1, bias=False) for _ in range(networks))
        self.features = nn.ModuleList(nn.Conv2d(h, g, 1) for _ in range(networks))
        self.blocks = nn.ModuleList(PlainBlock(g) for _ in range(networks))
        # scales and means of each part of a step
        self.out = nn.ModuleList(from_zero(nn.Conv2d(g, 2 * m, 1)) for _ in range(networks))

    def forward(self, step: Step, known: Tensor, features: Tensor) -> Tensor:
        """Known latents [B, M, h, w] (0 where unknown) and features [B, h, h, w] of a step's grid to hidden activations
        [B, g, h, w]."""
        seen, k = torch.cat(step.marked(known, 1.0), 1), step.network
        hidden: Tensor = self.blocks[k](F.relu(self.known[k](seen) + self.features[k](features)))
        return hidden

    def parameters_of(self, step: Step, part: Part, hidden: Tensor) -> Tensor:
        """Hidden activations at the places of a part to what is added to its log scales and means."""
        layer = self.out[step.network]
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        return F.conv2d(hidden, layer.weight[part.outputs], layer.bias[part.outputs])
