"""Training the lean backbone: its stages, what they minimise, and what they start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.distortions import TUNES, Distortion
from compass_codec.networks.lean import EntropyModel, LeanCodec
from compass_codec.networks.lean_liff import LeanLIFF
from compass_codec.networks.numbers import FACTORIZED, LAMBDAS, UNSHUFFLE
from compass_codec.networks.rates import gain
from compass_codec.training import exact
from compass_codec.training.data import Pictures
from compass_codec.training.density import FactorizedDensity
from compass_codec.training.stages import (
    REPEAT,
    Stage,
    cost,
    density_bits,
    encoded,
    gaussian_bits,
    pyramid,
    round_ste,
    shrink,
    to_8bit,
)
from compass_codec.training.start import HAAR, LAMBDA_0, MIX, STEP
from compass_codec.training.tensors import below, fill_module, read_tensors
from compass_codec.weights import CARD, read_set

R = TypeVar("R", bound="RatedEntropy")
BACKBONE = "lean"
PARTS = ("base", "residual", "liff")
LOG_SCALES = (math.log(0.06), math.log(256.0))  # that the networks may give
UNIT = math.sqrt(3) / math.pi  # scale of the logistic distribution whose standard deviation is 1
LEAST = 0.05  # standard deviation of latents that the start leaves at zero
DRAWN = 1 / 16  # of the crops become rectangles of one colour each, which photographs rarely hold
ENTROPY = ("m", "n", "h", "g", "entropy")  # dimensions of entropy models
PREDICTION = 0.1  # of the loss of an enhancement layer is added for its prediction alone, from which LIFF learns first
GRAINY, GRAIN, COLOURED = 0.05, 4 / 255, 0.3  # lambda from where crops get grain; its most; its part that has colour


class RatedEntropy(nn.Module):
    """An EntropyModel with the density of its hyper-latent, or of y if there is none: what training needs beyond
    coding."""

    kind: type[EntropyModel] = EntropyModel

    def __init__(self, **dimensions: Any) -> None:
        super().__init__()
        self.codec = self.kind(**dimensions)
        if self.codec.entropy == FACTORIZED:
            self.bottleneck = FactorizedDensity(self.codec.m, init_scale=UNIT)
        else:
            self.bottleneck = FactorizedDensity(self.codec.n)

    def code(self, y: Tensor, level: Tensor, with_context: bool) -> tuple[Tensor, Tensor]:
        """Latent y [B, M, h, w] at ``level`` [B] to (what the decoder has of it, bits [B])."""
        if self.codec.entropy == FACTORIZED:
            return round_ste(y), density_bits(self.bottleneck, y, gain(self.codec.log_scale, level))
        z = self.codec.hyper_analysis(y)
        bits = density_bits(self.bottleneck, z)
        z = z.float()

        def code(step: int, log_scales: Tensor, means: Tensor, part: tuple[slice, ...]) -> Tensor:
            nonlocal bits
            scales, centred = log_scales.clamp(*LOG_SCALES).exp(), y[part] - means
            with torch.no_grad():
                change = encoded(centred, scales) - centred
            noisy = centred + (torch.rand_like(centred) - 0.5 if self.training else change)
            bits = bits + gaussian_bits(noisy, scales, torch.zeros_like(means)).sum((1, 2, 3))
            return centred + change + means

        features = self.codec.hyper_synthesis(round_ste(z), (y.shape[-2], y.shape[-1]))
        return self.codec.walk(features, code, with_context), bits


class RatedLean(RatedEntropy):
    """The same of a LeanCodec."""

    kind: type[LeanCodec] = LeanCodec
    codec: LeanCodec

    def forward(self, x: Tensor, level: Tensor, with_context: bool) -> tuple[Tensor, Tensor]:
        """Centred picture [B, 3, H, W] and level [B] to (reconstruction, bits [B])."""
        y_hat, bits = self.code(self.codec.analysis(x, level), level, with_context)
        return self.codec.synthesis(y_hat, level, (x.shape[-2], x.shape[-1])), bits


class LeanStage(Stage):
    """The base codec without its context model, whose networks then cost a step nothing."""

    backbone = BACKBONE
    trains: tuple[str, ...] = ("base",)
    layered = False
    lambdas = LAMBDAS
    with_context = False
    tune = "psnr"  # what the distortion follows, and the profile of what is trained to follow something else
    card: Mapping[str, str] = MappingProxyType({})  # profile and purpose of the set, where they are others

    crops: Tensor | None = None  # [B, 3, 256, 256] in 0..1, that activations of the exported weights are measured on

    def __init__(self, **dimensions: Any) -> None:
        """``dimensions``: those of the codecs that are not as LeanCodec has them by default."""
        nn.Module.__init__(self)
        self.base = RatedLean(**dimensions)  # type: ignore[assignment]

    def card_fields(self) -> dict[str, Any]:
        """The dimensions of the networks that are exported, and the profile of a tune."""
        networks = {part: getattr(self, part) for part in self.writes or self.trains}
        dimensions = {part: getattr(network, "codec", network).dimensions for part, network in networks.items()}
        tuned = {"profile": self.tune, "purpose": PURPOSE[self.tune], "tune": self.tune} if self.tune in PURPOSE else {}
        return dimensions | tuned | dict(self.card)

    def integers(self, part: str) -> dict[str, Tensor]:
        return exact.of_part(self, part) if part != "liff" else {}

    def freeze(self) -> None:
        self.requires_grad_(True)
        if (context := self.base.codec.context) is not None:
            context.requires_grad_(self.with_context)

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rec, bits = self.base(x - 0.5, level, self.with_context)
        return cost(x, rec + 0.5, bits, lam, self.distortion)

    def distortion(self, x: Tensor, rec: Tensor) -> Tensor:
        """Of pictures [B, 3, H, W] in 0..1: [B]."""
        return TUNES[self.tune](x, rec)

    def varied(self, x: Tensor, lam: Tensor) -> Tensor:
        return drawn(grainy(x, lam))

    def latents(self, part: str, x: Tensor, level: Tensor, factor: float) -> Tensor:
        """The latent [B, M, h, w] that the codec ``part`` makes of crops, for an enhancement layer a step of
        ``factor`` above the base layer."""
        y: Tensor = self.base.codec.analysis(x - 0.5, level)
        return y


class LeanContextStage(LeanStage):
    """The base codec with its context model."""

    with_context = True


class LeanLayersStage(LeanStage):
    """LIFF and the entropy model of enhancement layers together, through recursive layers, above a frozen base codec
    whose transforms they have (paper, eq. 5).

    The loss sums the cost of the enhancement layers, each with its share of the top layer's pixels. A tenth of what the
    prediction alone would cost, without bits, is added.
    """

    trains: tuple[str, ...] = ("residual", "liff")
    writes: tuple[str, ...] = PARTS  # a whole set, with the base that the others were trained above
    layered = True
    with_context = True
    rated: type[RatedEntropy] = RatedEntropy  # the enhancement codec
    noisy = False  # whether training synthesises from latents with uniform noise in the place of rounded ones

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        self.residual = self.rated(**self.dimensions())  # type: ignore[assignment]
        self.liff = LeanLIFF()  # type: ignore[assignment]

    def dimensions(self) -> dict[str, Any]:
        """Those of the enhancement codec: of the base codec as far as both have them."""
        base: dict[str, Any] = self.base.codec.dimensions  # type: ignore[assignment]
        return base if issubclass(self.rated, RatedLean) else {k: v for k, v in base.items() if k in ENTROPY}

    def card_fields(self) -> dict[str, Any]:
        fields = super().card_fields()
        if not issubclass(self.rated, RatedLean):
            fields["residual"] = {"transforms": "base"} | fields["residual"]
        return fields

    def begin(self, residual: RatedEntropy) -> None:
        """Give what an enhancement codec has beyond the base codec, as which it starts, a start of its own."""

    def difference(self, x: Tensor, known: Tensor, level: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The latent of layers [B, 3, H, W] less that of their predictions ``known``, in 0..1 all, and the function
        that makes layers of what the decoder has of it."""
        codec: LeanCodec = self.base.codec  # type: ignore[assignment]
        size, predicted = (x.shape[-2], x.shape[-1]), codec.analysis(known - 0.5, level)
        return codec.analysis(x - 0.5, level) - predicted, lambda y: codec.synthesis(y + predicted, level, size) + 0.5

    def distortions(self, layers: list[tuple[Tensor, Tensor]]) -> list[Distortion]:
        """What each of the enhancement ``layers``, from the lowest up, is trained by: pictures [B, 3, H, W] in 0..1 and
        what is decoded of them."""
        return [self.distortion] * len(layers)

    def freeze(self) -> None:
        for name, child in self.named_children():
            child.requires_grad_(name in self.trains)

    @staticmethod
    def draw_factors(generator: torch.Generator) -> tuple[float, ...]:
        """Steps between layers from the top down, the second in half of the draws only.

        The first is 1 exactly in one of 6, else U(1.1, 1.5), where layers cost the most, or U(1, 4), as often. The
        second is 1 exactly in one of 6, else U(1, 2).
        """
        kind, first, deeper, again, second = torch.rand(5, generator=generator).tolist()
        small = kind < (1 + REPEAT) / 2
        factor = 1.0 if kind < REPEAT else 1.1 + 0.4 * first if small else 1 + 3 * first
        return (factor,) if deeper < 0.5 else (factor, 1.0 if again < REPEAT else 1 + second)

    def latents(self, part: str, x: Tensor, level: Tensor, factor: float) -> Tensor:
        if part == "base":
            return super().latents(part, x, level, factor)
        known = self.liff(self.lower(shrink(x, factor), level), (x.shape[-2], x.shape[-1]))
        return self.difference(x, known, level)[0]

    @torch.no_grad()
    def lower(self, x: Tensor, level: Tensor) -> Tensor:
        """What the decoder shows of the base layer of x."""
        mode = self.base.training
        self.base.eval()
        rec = to_8bit(self.base(x - 0.5, level, True)[0] + 0.5)
        self.base.train(mode)
        return rec

    def forward(
        self, x: Tensor, lam: Tensor, level: Tensor, factors: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        layers = pyramid(x, lam, level, factors, self.lambdas)
        target, _, level = layers.pop()
        rec, coded = self.lower(target, level), []
        for target, lam, level in reversed(layers):
            known = self.liff(rec, (target.shape[-2], target.shape[-1]))
            y, layer_of = self.difference(target, known, level)
            y_hat, bits = self.residual.code(y, level, True)  # type: ignore[call-arg]
            layer = layer_of(y + torch.rand_like(y) - 0.5 if self.noisy and self.training else y_hat)
            coded.append((target, layer, known, bits, lam))
            rec = to_8bit(layer)
        loss = x.new_zeros(())
        parts: dict[str, Tensor] = {}
        distortions = self.distortions([(target, layer) for target, layer, *_ in coded])
        for (target, layer, known, bits, lam), distortion in zip(coded, distortions, strict=True):
            part, parts = cost(target, layer, bits, lam, distortion)
            alone, shown = cost(target, known, torch.zeros_like(bits), lam, self.distortion)
            parts["prediction"] = shown["psnr"]
            if self.training:
                part = part + PREDICTION * alone
            loss = loss + target.shape[-2] * target.shape[-1] / (x.shape[-2] * x.shape[-1]) * part
        return loss, parts


class LeanResidualStage(LeanLayersStage):
    """The same with transforms of its own, for the residual in pixels, as the paper has them."""

    rated = RatedLean

    def difference(self, x: Tensor, known: Tensor, level: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        codec: LeanCodec = self.residual.codec  # type: ignore[assignment]
        size = (x.shape[-2], x.shape[-1])
        return codec.analysis(x - known, level), lambda y: codec.synthesis(y, level, size) + known


STAGES: dict[str, type[LeanStage]] = {
    "lean": LeanStage,
    "lean-context": LeanContextStage,
    "lean-layers": LeanLayersStage,
    "lean-residual": LeanResidualStage,
}


PURPOSE = {"visual": "what people see: layers of lean, trained for a perceptual distortion"}


def grainy(x: Tensor, lam: Tensor) -> Tensor:
    """Crops [B, 3, H, W] with film-like grain where ``lam`` [B] is high enough to keep it, as training pictures that
    were reduced have little of their own."""
    shape = (len(x), 1, 1, 1)
    amount = GRAIN * torch.rand(shape, device=x.device) * (lam > GRAINY).view(shape)
    b, _, h, w = x.shape  # noise in this order of memory is made five times as fast
    grain = torch.randn(b, 1, h, w, device=x.device) + COLOURED * torch.randn(x.shape, device=x.device)
    return (x + amount * grain).clamp(0, 1)


def drawn(x: Tensor) -> Tensor:
    """Crops [B, 3, H, W] of which some become one colour, or up to five rectangles on it. Half of the colours are
    corners of the cube, such as red or white."""
    x, (h, w) = x.clone(), x.shape[-2:]
    for k in torch.nonzero(torch.rand(len(x)) < DRAWN).flatten().tolist():
        count = int(torch.randint(6, ()))
        colours = torch.rand(1 + count, 3, 1, 1)
        colours = torch.where(torch.rand(1 + count, 1, 1, 1) < 0.5, colours.round(), colours).to(x)
        x[k] = colours[0]
        for colour in colours[1:]:
            (top, bottom), (left, right) = (torch.randint(side + 1, (2,)).sort().values.tolist() for side in (h, w))
            x[k, :, top:bottom, left:right] = colour
    return x


def dct(side: int) -> Tensor:
    """The orthonormal DCT-II: rows [side, side] are basis vectors."""
    k, n = torch.arange(side, dtype=torch.float32)[:, None], torch.arange(side, dtype=torch.float32)[None]
    rows = (math.pi * (2 * n + 1) * k / (2 * side)).cos() * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows


@torch.no_grad()
def linear_start(codec: LeanCodec, crops: Tensor) -> None:
    """Make ``codec`` an orthonormal block transform followed by a plain quantiser, in place.

    The first 1x1 convolution is an 8x8 DCT on a luma/chroma mix, the stride-2 convolution a 2x2 Haar packet, of both
    the channels with the most energy on ``crops`` [B, 3, H, W] in 0..1, H and W multiples of 16; the way back is the
    transpose. Channels between layers are divided by the root of their standard deviation. Gains start at
    sqrt(lambda / 0.013), scales at each latent's standard deviation.
    """
    basis = torch.einsum("ab,pq,oc->oapcbq", dct(UNSHUFFLE), dct(UNSHUFFLE), MIX).flatten(3).flatten(0, 2)
    f, c8, c16 = F.pixel_unshuffle(crops - 0.5, UNSHUFFLE), len(codec.embed.weight), len(codec.down.weight)
    f, basis8, s8 = _strongest(F.conv2d(f, basis[:, :, None, None]), basis, c8)
    _set(codec.embed, (basis8 * s8[:, None])[:, :, None, None])
    _set(codec.out, (basis8 / s8[:, None]).T[:, :, None, None])
    packet = torch.einsum("ij,kuv->ikjuv", torch.eye(c8), HAAR).flatten(0, 1)
    f, packet16, s16 = _strongest(F.conv2d(f, packet, stride=2), packet, c16)
    _set(codec.down, packet16 * s16[:, None, None, None] / s8[None, :, None, None])
    _set(codec.up, packet16 / s16[:, None, None, None] * s8[None, :, None, None])
    used = torch.arange(min(codec.m, c16))
    for layer, scale, noise in ((codec.to_y, STEP / s16, 2e-3), (codec.from_y, s16 / STEP, 2e-4)):
        weight = torch.randn_like(layer.weight) * noise
        weight[used, used, 0, 0] = scale[used]
        _set(layer, weight)
    deviation = torch.full((codec.m,), LEAST)
    deviation[used] = (STEP * f.std((0, 2, 3)))[used].clamp(min=LEAST)
    codec.y_scale.copy_(deviation.clamp(min=0.5).rsqrt())
    log_gain = torch.tensor([0.5 * math.log(lam / LAMBDA_0) for lam in LAMBDAS])[:, None]
    codec.log_gain.copy_(log_gain.expand_as(codec.log_gain))
    codec.log_inv_gain.copy_(-log_gain.expand_as(codec.log_inv_gain))
    if codec.entropy == FACTORIZED:
        codec.log_scale.copy_(deviation.log() + log_gain)
        return
    assert codec.h_p.bias is not None
    codec.h_p.weight.mul_(0.1)
    codec.h_p.bias.copy_(torch.cat([deviation.log(), torch.zeros_like(deviation)]))


def _strongest(x: Tensor, basis: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` channels of x with the most energy, their rows of ``basis``, and what each is to be scaled by."""
    energy = x.square().mean((0, 2, 3))
    keep = energy.argsort(descending=True)[:count]
    return x[:, keep], basis[keep], energy[keep].sqrt().clamp(min=1e-3).rsqrt()


def _set(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> None:
    layer.weight.copy_(weight)
    assert layer.bias is not None
    layer.bias.zero_()


def start(stage: LeanStage, weights: Path | None, pictures: Pictures, seed: int) -> str:
    """Give ``stage`` something to start from; returns what, in words.

    ``weights``: the folder of a lean set; a checkpoint of a run, whose base is taken as its EMA has it; or a file with
    parameters of a base, of which those that fit are taken over the linear start, and a context model as a whole or not
    at all. What a folder lacks of enhancement layers starts as the base codec and as bicubic
    interpolation.
    Raises ValueError or a CompassError where it cannot be used.
    """
    stage.crops = pictures.sample(16, 256, torch.Generator().manual_seed(seed)).cpu()
    if not isinstance(stage, LeanLayersStage):
        return _start_base(stage, weights, seed)
    if weights is None:
        raise ValueError("enhancement layers are trained above a trained base: name its weights")
    return ", ".join([_start_base(stage, weights, seed), *_start_layers(stage, weights)])


def _start_base(stage: LeanStage, weights: Path | None, seed: int) -> str:
    if weights is not None and weights.is_dir():
        stage.base = codec_of(weights, "base", RatedLean)  # type: ignore[assignment]
        return "base from weights"
    rated: Any = stage.base
    assert stage.crops is not None
    torch.manual_seed(seed)
    linear_start(rated.codec, stage.crops)
    if weights is None:
        return "base from the linear start"
    tensors = read_tensors(weights)
    if run := below(tensors, "weights.base.") | below(tensors, "ema.base."):
        tensors = {name.removeprefix("codec."): value for name, value in run.items()}
    own = rated.codec.state_dict()
    own |= {f"bottleneck.{name}": value for name, value in rated.bottleneck.state_dict().items()}
    taken = {name for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    context = {name for name in own if name.startswith("context.")}
    if not context <= taken:  # the file has another context model, or none
        taken -= context
    if not taken:
        raise ValueError(f"{weights}: no parameter of a lean codec")
    for name in taken:
        own[name].copy_(tensors[name])
    if rated.codec.entropy == FACTORIZED and "log_scale" not in tensors:
        _scale_to_latents(rated.codec, stage.crops)
    return f"{len(taken)} of {len(own)} tensors of base from a file, the others from the linear start"


@torch.no_grad()
def _scale_to_latents(codec: LeanCodec, crops: Tensor) -> None:
    """Give a factorized prior the standard deviation of each latent on ``crops`` [B, 3, H, W] in 0..1."""
    for level in range(len(LAMBDAS)):
        y = codec.analysis(crops - 0.5, torch.full((len(crops),), float(level)))
        codec.log_scale[level] = y.std((0, 2, 3)).clamp(min=LEAST).log()


def _start_layers(stage: LeanLayersStage, weights: Path) -> list[str]:
    residual = stage.rated(**stage.dimensions())
    residual.load_state_dict(stage.base.state_dict(), strict=False)  # what both have
    words = ["residual from base", "liff from bicubic"]
    if (weights / "residual.safetensors").exists():
        residual = codec_of(weights, "residual", stage.rated)
        words[0] = "residual from weights"
    else:
        stage.begin(residual)
    if "liff" not in stage.writes:
        words.pop()
    elif (weights / "liff.safetensors").exists():
        stage.liff = liff_of(weights)  # type: ignore[assignment]
        words[1] = "liff from weights"
    stage.residual = residual  # type: ignore[assignment]
    return words


def _made(folder: Path, part: str, kind: Callable[..., Any]) -> Any:
    """A network of the dimensions that model.json in ``folder`` names for ``part``."""
    found = read_set(folder)
    if found.backbone != BACKBONE:
        raise ValueError(f"{folder / CARD}: weights of the backbone {found.backbone}; this stage trains {BACKBONE}")
    try:
        return kind(**{k: v for k, v in found.spec[part].items() if k != "transforms"})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / CARD}: {part} {found.spec.get(part)!r} cannot be used") from error


def codec_of(folder: Path, part: str, kind: type[R]) -> R:
    """The codec ``part`` of the set in ``folder``."""
    path = folder / f"{part}.safetensors"
    rated: R = _made(folder, part, kind)
    tensors = read_tensors(path)
    fill_module(rated.codec, tensors, path)
    fill_module(rated.bottleneck, below(tensors, "bottleneck."), path)
    return rated


def liff_of(folder: Path) -> LeanLIFF:
    """LIFF of the set in ``folder``."""
    path = folder / "liff.safetensors"
    liff: LeanLIFF = _made(folder, "liff", LeanLIFF)
    fill_module(liff, read_tensors(path), path)
    return liff
