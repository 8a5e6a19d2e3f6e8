"""The training stages and their losses.

Every stage is a module whose ``forward`` takes crops and per-sample levels and gives one loss and its parts, so
that one trainer drives them all. Rates are in bits per pixel of the layer they code, on noisy latents;
distortions are on rounded latents with a straight-through gradient (paper, 3.3: noisy ones cost 13 %).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compass_codec.backbones.symbols import BEYOND, MOST_BEYOND
from compass_codec.distortions import Distortion, squared
from compass_codec.entropy import SCALE_RANGE
from compass_codec.networks import rates
from compass_codec.networks.liff import LIFF, SIZES, bicubic
from compass_codec.networks.mean_scale import ImageCodec, lower_bound
from compass_codec.networks.mean_scale_numbers import LAMBDAS
from compass_codec.networks.rates import level_of
from compass_codec.training.data import resize
from compass_codec.training.density import FactorizedDensity
from compass_codec.training.start import LAMBDA_0

REPEAT = 1 / 6  # of the steps between layers that repeat the size, for a better quality of it


def round_ste(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return x + (x.round() - x).detach()


def gaussian_bits(y: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """-log2 of the mass that N(means, scales^2) gives the unit interval around y (Balle et al. 2018)."""
    scales = lower_bound(scales, SCALE_RANGE[0])
    v = (y - means).abs()
    root = math.sqrt(0.5)
    mass = 0.5 * (torch.erfc((v - 0.5) / scales * root) - torch.erfc((v + 0.5) / scales * root))
    return -lower_bound(mass, 1e-9).log2()


def encoded(y: Tensor, scales: Tensor) -> Tensor:
    """The encoder's symbols of y, less its means: rate-aware rounding (symbols.thresholds), here with the bits of the
    normal distribution."""
    below, zero = y.abs().floor(), torch.zeros_like(y)
    more = gaussian_bits(below + 1, scales, zero) - gaussian_bits(below, scales, zero)
    least = 0.5 + (BEYOND * more).clamp(0, MOST_BEYOND)
    return (below + (y.abs() - below > least)).copysign(y)


def density_bits(bottleneck: FactorizedDensity, z: Tensor, scale: Tensor | None = None) -> Tensor:
    """Bits [B] of z [B, N, h, w]: with uniform noise in training, rounded otherwise. The density is that of z, or of z
    over ``scale`` [B, N, 1, 1]."""

    def channels(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1).unsqueeze(1)

    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        noisy = z + torch.rand_like(z) - 0.5 if bottleneck.training else z.round()
        scale = torch.ones_like(z[:, :, :1, :1]) if scale is None else scale
        likelihood = bottleneck(channels(noisy / scale), channels((0.5 / scale).expand_as(z)))
        return -lower_bound(likelihood, 1e-9).log2().reshape(z.shape[1], len(z), -1).sum((0, 2))


class RatedCodec(nn.Module):
    """An ImageCodec with the density of its hyper-latent: what training needs beyond coding."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = ImageCodec()
        self.bottleneck = FactorizedDensity(self.codec.n)

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Centred picture [B, 3, H, W], level [B] to (reconstruction, bits [B])."""
        y_hat, bits = self.code(self.codec.analysis(x, level))
        out = self.codec.synthesis(y_hat, level, (x.shape[-2], x.shape[-1]))
        return out.float(), bits

    def code(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latent y [B, M, h, w] to (what the decoder has of it, bits [B])."""
        z = self.codec.hyper_analysis(y)
        z_bits = density_bits(self.bottleneck, z)
        z = z.float()
        scales, means = self.codec.hyper_synthesis(round_ste(z).to(y.dtype), (y.shape[-2], y.shape[-1]))
        y, scales, means = y.float(), scales.float(), means.float()
        centred = y - means
        with torch.no_grad():
            change = encoded(centred, scales) - centred
        noisy = centred + (torch.rand_like(y) - 0.5 if self.training else change)
        y_bits = gaussian_bits(noisy, scales, torch.zeros_like(means)).sum((1, 2, 3))
        return centred + change + means, y_bits + z_bits


def cost(
    x: Tensor, rec: Tensor, bits: Tensor, lam: Tensor, distortion: Distortion = squared
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over crops [B, 3, H, W] of the cost per pixel of each, times its ``share``; bits per pixel and PSNR.
    ``distortion`` stands for the mean squared error."""
    bpp = bits / (x.shape[-1] * x.shape[-2])
    loss = rates.cost(bpp, distortion(x, rec), lam) * share(lam)
    psnr = -10 * rec.detach().clamp(0, 1).sub(x).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
    return loss.mean(), {"bpp": bpp.mean().detach(), "psnr": psnr.mean()}


def share(lam: Tensor) -> Tensor:
    """What the cost at ``lam`` counts in a loss, so that no rate dominates."""
    return (lam / LAMBDA_0).rsqrt()


def to_8bit(x: Tensor) -> Tensor:
    """Clamp and round to 8 bits with a straight-through gradient, as the codec does between layers."""
    return round_ste(x.clamp(0, 1) * 255) / 255


class Stage(nn.Module):
    """Base, residual codec and LIFF together; a subclass says which of them it trains and how."""

    backbone = "mean_scale"  # whose weights they are
    trains: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # parts that are exported; empty: those that it trains
    layered = True  # whether a crop is reduced to lower layers
    lambdas: tuple[float, ...] = LAMBDAS  # that have gains of their own
    progress = 0.0  # how much of the schedule is done

    def __init__(self) -> None:
        super().__init__()
        self.base, self.residual, self.liff = RatedCodec(), RatedCodec(), LIFF(**SIZES["small"])

    def varied(self, x: Tensor, lam: Tensor) -> Tensor:
        """Crops [B, 3, H, W] in 0..1 as a step trains on them, for lambda [B]; outside of what --compile fuses."""
        return x

    def card_fields(self) -> dict[str, Any]:
        """Fields of model.json that an export sets."""
        return {}

    def integers(self, part: str) -> dict[str, Tensor]:
        """The integer twin of the codec ``part``, for its file of weights; empty if it has none."""
        return {}

    def freeze(self) -> None:
        for name, child in self.named_children():
            child.requires_grad_(name in self.trains)
        # an untrained LIFF is its bicubic skip exactly: do not pay for adding zero
        last = self.liff.mlp_last
        self.only_skip = "liff" not in self.trains and not (last.weight.any() or last.bias.any())

    def predict(self, below: Tensor, size: tuple[int, int]) -> Tensor:
        return (bicubic(below, size) if self.only_skip else self.liff(below, size)).float()

    def code_base(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return self.code("base", x, x.new_full((1, 1, 1, 1), 0.5), level)

    def code(self, part: str, x: Tensor, known: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """A layer by the base or residual codec, given its prediction: (what the decoder shows of it, bits [B])."""
        rec, bits = getattr(self, part)(x - known, level)
        return rec + known, bits

    @torch.no_grad()
    def lower(self, x: Tensor, level: Tensor) -> Tensor:
        """The frozen base layer's real reconstruction of x: rounded latents, 8 bits."""
        mode = self.base.training
        self.base.eval()
        rec = to_8bit(self.code_base(x, level)[0])
        self.base.train(mode)
        return rec

    @torch.no_grad()
    def below(self, x: Tensor, lam: Tensor, level: Tensor, factors: Sequence[float]) -> Tensor:
        """What the decoder shows of the layer below ``x``, a step of the first of ``factors`` down.

        It is the base layer or, in training half of the time, an enhancement layer that is a further step above that,
        as the layers above the second of a file have it.
        """
        deeper = self.training and bool(torch.rand(()) < 0.5)
        _, *layers = pyramid(x, lam, level, factors[: 1 + deeper])
        bottom, _, level = layers.pop()
        rec = self.lower(bottom, level)
        for target, _, level in reversed(layers):
            prediction = self.predict(rec, (target.shape[-2], target.shape[-1]))
            rec = to_8bit(self.code("residual", target, prediction, level)[0])
        torch.clear_autocast_cache()  # before 2.10 weights cast here would have no gradient afterwards
        return rec

    def enhance(self, x: Tensor, below: Tensor, level: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One enhancement layer: (reconstruction, loss, parts)."""
        prediction = self.predict(below, (x.shape[-2], x.shape[-1]))
        rec, bits = self.code("residual", x, prediction, level)
        loss, parts = cost(x, rec, bits, lam)
        return rec, loss, parts

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Crops [B, 3, H, W] in 0..1, lambda [B] and its level [B], steps between layers to (loss, parts)."""
        raise NotImplementedError


def shrink(x: Tensor, factor: float) -> Tensor:
    return resize(x, (max(1, round(x.shape[-2] / factor)), max(1, round(x.shape[-1] / factor))))


def pyramid(
    x: Tensor, lam: Tensor, level: Tensor, factors: Sequence[float], lambdas: Sequence[float] = LAMBDAS
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Crops, lambda and level among ``lambdas`` of layers from ``x`` down, ``factors`` being the steps between them.

    What is below a step of 1 is coded with a lambda drawn from the lowest to that above it: the same size again at a
    better quality.
    """
    layers, total = [(x, lam, level)], 1.0
    for factor in factors:
        total *= factor
        if factor == 1:
            lam, level = lower_rates(lam, lambdas)
        layers.append((shrink(x, total), lam, level))
    return layers


class BaseStage(Stage):
    """The image codec alone, at every rate at once."""

    trains = ("base",)
    layered = False

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rec, bits = self.code_base(x, level)
        return cost(x, rec, bits, lam)


class LiffStage(Stage):
    """Prediction alone, from real reconstructions of the layer below and (one sample in four) clean pictures."""

    trains = ("liff",)

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        below = self.below(x, lam, level, factors)
        below[::4] = shrink(x, factors[0])[::4]
        prediction = self.liff(below, (x.shape[-2], x.shape[-1])).float()
        loss, parts = cost(x, prediction, torch.zeros_like(lam), lam)
        return loss / math.sqrt(LAMBDA_0), parts


class ResidualStage(Stage):
    """The residual codec above layers as they are, predicted by a frozen LIFF."""

    trains = ("residual",)

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            prediction = self.predict(self.below(x, lam, level, factors), (x.shape[-2], x.shape[-1]))
        return cost(x, *self.code("residual", x, prediction, level), lam)


class JointStage(Stage):
    """LIFF and residual codec through recursive enhancement layers, base frozen (paper, equation 5).

    ``factors`` are the steps between layers from the top down; the loss sums over the enhancement layers, each
    per pixel of the top layer as in the paper.
    """

    trains = ("residual", "liff")

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        layers = pyramid(x, lam, level, factors)
        target, _, level = layers.pop()
        rec = self.lower(target, level)
        loss = x.new_zeros(())
        parts: dict[str, Tensor] = {}
        for target, lam, level in reversed(layers):
            share = target.shape[-1] * target.shape[-2] / (x.shape[-1] * x.shape[-2])
            rec, part, parts = self.enhance(target, rec, level, lam)
            loss = loss + share * part
            rec = to_8bit(rec)
        return loss, parts


class HyperStage(Stage):
    """Hyper networks and densities of both image codecs, the transforms frozen.

    They cost a tenth of the transforms, and a latent that stays as it is can be trained on again: those of the
    last ``KEPT`` crops are kept, and for every new crop a step draws ``DRAWN`` of them.
    """

    trains = ("base", "residual")
    KEPT, DRAWN = 1024, 8

    def __init__(self) -> None:
        super().__init__()
        # latents of the base and of the residual codec, and what their bits count
        self.kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=self.KEPT)

    def freeze(self) -> None:
        super().freeze()
        for name, parameter in self.named_parameters():
            if ".g_" in name or "gain" in name:
                parameter.requires_grad_(False)

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            prediction = self.predict(self.below(x, lam, level, factors), (x.shape[-2], x.shape[-1]))
            codecs = self.base.codec, self.residual.codec
            latents = [c.analysis(part, level) for c, part in zip(codecs, (x - 0.5, x - prediction), strict=True)]
        shares = share(lam)
        if self.training:
            if self.kept and self.kept[0][0].shape != latents[0].shape[1:]:
                self.kept.clear()  # crops are now of another size
            self.kept.extend(zip(*(y.half() for y in latents), shares, strict=True))
            drawn = [self.kept[i] for i in torch.randint(len(self.kept), (self.DRAWN * len(x),)).tolist()]
            *latents, shares = (stacked(part) for part in zip(*drawn, strict=True))
        base, residual = latents
        bpp = (self.base.code(base)[1] + self.residual.code(residual)[1]) / (x.shape[-1] * x.shape[-2])
        return (bpp * shares).mean(), {"bpp": bpp.mean().detach(), "psnr": torch.zeros(())}


STAGES: dict[str, type[Stage]] = {
    "base": BaseStage,
    "liff": LiffStage,
    "residual": ResidualStage,
    "joint": JointStage,
    "hyper": HyperStage,
}


def stacked(kept: Sequence[Tensor]) -> Tensor:
    """What was kept in float16, as float32: autocast to bfloat16 does not take the other on a CPU."""
    return torch.stack([part.float() for part in kept])


def lower_rates(lam: Tensor, lambdas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Lambdas between the lowest and ``lam``, and their levels: those of a layer whose size is repeated above it."""
    lam = lambdas[0] * (lam / lambdas[0]) ** torch.rand_like(lam)
    return lam, level_of(lam, lambdas).float()


def draw_lambdas(batch: int, generator: torch.Generator, lambdas: Sequence[float] = LAMBDAS) -> Tensor:
    """Log-uniform over the trained range, one from each of as many equal parts of it: less noise between batches."""
    t = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    return ((1 - t) * math.log(lambdas[0]) + t * math.log(lambdas[-1])).exp()


def draw_factors(generator: torch.Generator) -> tuple[float, float]:
    """Steps between layers from the top down: the first U(1, 4), the second U(1, 2); or, at times, 1 exactly."""
    first, second, repeat, again = torch.rand(4, generator=generator).tolist()
    return 1.0 if repeat < REPEAT else 1 + 3 * first, 1.0 if again < REPEAT else 1 + second
