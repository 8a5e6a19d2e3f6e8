"""Search in the encoder: symbols that cost less in rate and distortion than those which rounding gives.

What is lowered is R + lambda * 255^2 * MSE, summed over the layers; with weights of another tune, its distortion is in
the place of the MSE. Effort 1 analyses what the decoder would see, too: how that differs from the layer's own latent
says which way its quantisation errors should go. Higher efforts follow gradients. Each step quantises y in the walk of
the context model, as the encoder does, and moves y towards a Newton step from the quantised latent; z follows its
gradient. The decoder knows nothing of all this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import entropy
from compass_codec.backbones.lean import SKIPPED, LatentLayer, LeanLayer
from compass_codec.backbones.symbols import LATENT_LIMIT, quantise, thresholds
from compass_codec.distortions import TUNES, Distortion
from compass_codec.engines.torch_engine import TorchEntropy, TorchLean
from compass_codec.networks import strips
from compass_codec.networks.arrays import to_tensor
from compass_codec.networks.lean import EntropyModel, LeanCodec
from compass_codec.networks.numbers import CELL, LAMBDAS
from compass_codec.networks.rates import cost, level_of

if TYPE_CHECKING:
    from compass_codec.backbones import LayerCodec

    class Layered(Protocol):
        """What of codec.Codec a search takes."""

        base: LayerCodec
        residual: LayerCodec

        def flat(self, picture: NDArray[np.uint8]) -> Coded | None: ...

        def predict(self, below: NDArray[np.uint8] | None, size: tuple[int, int]) -> Iterator[Tensor]: ...


C = TypeVar("C", bound=EntropyModel)
STEPS = (0, 0, 4, 6, 12, 16, 24, 32, 48, 64)  # of gradients, that an effort adds to those below it
# Effort 1: so much of the quantisation errors stays, less what a second analysis sees of them so many times.
STAYS, SEEN = 0.7, 0.74
TOWARDS = 0.5  # how far y goes to what a Newton step from the quantised latent gives
LEAST_CURVATURE = 5.0  # bits for a quantisation step squared
Z_RATE = 0.007  # quantisation steps that z moves for each bit that its gradient would save
BEYOND, MOST_BEYOND = 1 / 50, 0.35  # as symbols.BEYOND, for latents that are searched
# What a unit of squared error adds to the cost of the layer above, in units of what it would cost there. About 1 is
# best for the sum over the layers, 0 for the top layer at equal bits of the file.
AHEAD = 0.4
ESCAPE_BITS = 16.0  # about what an escaped value costs beyond its escape
# Side of what is searched at once, and what is computed around it, in cells of z.
TILE, REACH = 12, 1
LATENT = 4  # latents of y along the side of a cell of z
PIXEL = LATENT * CELL  # pixels there

Coded = tuple[bytes, NDArray[np.uint8]]  # a layer's bytes, and what the decoder will see: uint8 [height, width, 3]
Progress = Callable[[int, float, list[Coded]], None]


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd inside of inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def improve(
    codec: Layered,
    layers: Sequence[NDArray[np.uint8]],
    qualities: Sequence[float],
    effort: int,
    deadline: float,
    progress: Progress | None,
    weights: Sequence[float],
) -> list[Coded]:
    """Encode a picture's layers as effort 0 does and search from there up to ``effort``; stop at ``deadline`` on the
    clock of time.monotonic, finishing what has begun without more search.

    ``weights``, above 0, is what the cost of each layer counts. ``progress`` hears of each effort, of the share of
    the first cost that is saved so far, and of the best layers so far.
    """
    found = efforts(codec, layers, qualities, effort, deadline, weights)
    best = start = next(found)
    for stage, best in enumerate(found, 1):
        if progress is not None:
            progress(stage, 1 - total(best, weights) / total(start, weights), [layer.coded for layer in best])
    return [layer.coded for layer in best]


@dataclass(frozen=True)
class CodedLayer:
    """A layer as it is coded, and R + lambda * 255^2 * MSE times its pixels: bits. A tile's distortion that is none of
    its pixels alone counts for the tile."""

    coded: Coded
    cost: float

    @classmethod
    def of(cls, coded: Coded, picture: NDArray[np.uint8], lam: float, distortion: Distortion) -> CodedLayer:
        tiles = (tile.part(PIXEL)[2:] for tile in Tile.all((picture.shape[0], picture.shape[1])))
        pairs = ((samples(picture[part]).double(), samples(coded[1][part]).double()) for part in tiles)
        error = sum(x[0, 0].numel() * float(distortion(x, rec)) for x, rec in pairs)
        return cls(coded, cost(8 * len(coded[0]), error, lam))

    def priced(self, error_counts: float) -> float:
        """The cost if error counts so many times as much, as it costs above too."""
        bits = 8 * len(self.coded[0])
        return bits + error_counts * (self.cost - bits)


def total(coded: Sequence[CodedLayer], weights: Sequence[float]) -> float:
    return sum(weight * layer.cost for weight, layer in zip(weights, coded, strict=True))


def efforts(
    codec: Layered,
    layers: Sequence[NDArray[np.uint8]],
    qualities: Sequence[float],
    effort: int,
    deadline: float,
    weights: Sequence[float],
) -> Iterator[list[CodedLayer]]:
    """The best layers of effort 0, of effort 1 and so on."""
    parts = [Search(codec.base), *([Search(codec.residual)] if len(layers) > 1 else [])]
    lambdas = [parts[min(k, 1)].layer.lambda_of(quality) for k, quality in enumerate(qualities)]
    prices = worth(lambdas, weights)
    latents: list[Latents | None] = [None] * len(layers)
    best: list[CodedLayer] = []
    for stage in range(effort + 1):
        if stage and time.monotonic() >= deadline:
            break
        tried: list[CodedLayer] = []
        for k, (picture, quality) in enumerate(zip(layers, qualities, strict=True)):
            # while nothing below has changed, what was best for a layer can stay
            same = bool(best) and all(a is b for a, b in zip(tried, best[:k], strict=True))
            search = parts[min(k, 1)]
            if (flat := codec.flat(picture)) is not None:
                tried.append(best[k] if best else CodedLayer.of(flat, picture, lambdas[k], search.distortion))
                continue
            job = LayerTask(picture, tried[-1].coded[1] if k else None, quality, prices[k], deadline)
            own = latents[k] = search.start(job, codec.predict, latents[k])
            coded = search.encode(job, own, stage, stage < effort)
            made = CodedLayer.of(coded, picture, lambdas[k], search.distortion)
            error_counts = prices[k] / error_price(lambdas[k])
            keep = same and best[k].priced(error_counts) <= made.priced(error_counts)
            tried.append(best[k] if keep else made)
        if not best or total(tried, weights) < total(best, weights):
            best = tried
        yield best


def samples(picture: NDArray[np.uint8]) -> Tensor:
    """uint8 [height, width, 3] to float32 [1, 3, height, width] in 0..1."""
    return to_tensor(picture, torch.device("cpu")).float() / 255


def error_price(lam: float) -> float:
    """What a unit of squared error, of samples in 0..1, costs in bits."""
    return lam * 255**2 / 3


def worth(lambdas: Sequence[float], weights: Sequence[float]) -> list[float]:
    """What a unit of squared error, of samples in 0..1, costs in each layer, in its bits: with what it costs above."""
    prices: list[float] = []
    above = 0.0
    for lam, weight in zip(reversed(lambdas), reversed(weights), strict=True):
        above = weight * error_price(lam) + AHEAD * above
        prices.insert(0, above / weight)
    return prices


@dataclass(frozen=True)
class LayerTask:
    """A layer to search: its pixels uint8 [height, width, 3], what the decoder sees of the layer below, and what a unit
    of squared error costs in bits."""

    picture: NDArray[np.uint8]
    below: NDArray[np.uint8] | None
    quality: float
    price: float
    deadline: float

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.shape[0], self.picture.shape[1]

    def late(self) -> bool:
        return time.monotonic() >= self.deadline


@dataclass
class Latents:
    """Of a layer: what its prediction gives (see LeanLayer.given), y [1, M, h, w] as it is coded without search, what
    effort 1 adds to that, and where gradients have brought y and z [1, N, h / 4, w / 4]."""

    below: NDArray[np.uint8] | None
    given: Tensor
    analysed: Tensor
    y: Tensor
    z: Tensor
    added: Tensor | None = None
    steps: dict[Tile, Tensor] = field(default_factory=dict)  # [1, M, 1, 1], in quantisation steps squared for each bit


@dataclass(frozen=True)
class Tile:
    """A part of a layer of ``size`` (height, width) that is searched at once: its core, ``rows`` and ``columns`` of
    cells of z. What is around it is computed, but stays as it is."""

    size: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def all(cls, size: tuple[int, int]) -> list[Tile]:
        """The tiles of a layer."""
        rows, columns = (strips.spans(-(-side // PIXEL), TILE) for side in size)
        return [cls(size, *sides) for sides in product(rows, columns)]

    def part(self, unit: int, margin: float = 0, start: float | None = None) -> tuple[slice, ...]:
        """Slices of a tensor [1, channels, rows, columns] of the layer that has ``unit`` rows for each cell: PIXEL,
        LATENT or 1. They hold the core and ``margin`` cells around it; if ``start`` is given, they are those of the
        tensor that ``part`` with this margin cuts out."""
        slices = [slice(None), slice(None)]
        for (first, last), side in zip((self.rows, self.columns), self.size, strict=True):
            length, off = -(-side * unit // PIXEL), 0
            if start is not None:
                off = max(0, int(unit * (first - start)))
            slices.append(
                slice(max(0, int(unit * (first - margin))) - off, min(length, int(unit * (last + margin))) - off)
            )
        return tuple(slices)


class Search:
    """The search with one lean codec and its tables."""

    def __init__(self, layer: LayerCodec) -> None:
        assert isinstance(layer, LeanLayer) and isinstance(layer.networks, TorchEntropy), "what is searchable"
        assert isinstance(layer.transforms, TorchLean)
        self.layer, self.of, self.device = layer, layer.transforms.codec, layer.transforms.codec.log_gain.device
        self.model, self.of_latents = layer.networks.codec, isinstance(layer, LatentLayer)
        self.distortion = TUNES[layer.tune]

    def least(self, job: LayerTask) -> Tensor:
        """Thresholds of latents that are searched: where error counts more, bits count less beside it."""
        beyond = BEYOND * error_price(self.layer.lambda_of(job.quality)) / job.price
        return torch.from_numpy(thresholds(self.layer.tables, beyond, MOST_BEYOND)).to(self.device)

    @cached_property
    def entropy_model(self) -> EntropyModel:
        return self._copied(self.model)

    @cached_property
    def transforms(self) -> LeanCodec:
        return self._copied(self.of)

    @staticmethod
    def _copied(codec: C) -> C:
        """The networks in float32, for gradients."""
        with torch.inference_mode(False):
            # the weights were made in inference mode, where autograd may not keep them
            with torch.device("meta"):
                copied = type(codec)(**codec.dimensions)
            tensors = codec.state_dict().items()
            copied.load_state_dict({k: x.to(torch.float32, copy=True) for k, x in tensors}, assign=True)
            return copied.requires_grad_(False).eval()

    @cached_property
    def z_bits(self) -> Tensor:
        with torch.inference_mode(False):
            return table_bits(self.layer.tables.z).to(self.device)

    def start(self, job: LayerTask, predict: Callable[..., Iterator[Tensor]], last: Latents | None) -> Latents:
        """The latents of a layer as the analysis gives them; or ``last``, as it is or, with another prediction than
        before, moved by what that changes."""
        if last is not None and last.below is job.below:
            return last
        networks = self.layer.at(job.quality)
        given = torch.cat(list(self.layer.given(networks, predict(job.below, job.size), job.size)), 2)
        if last is not None and self.of_latents:  # that of the picture stays
            analysed = last.analysed + (last.given - given)
        else:
            analysed = self.layer.analysis(networks, job.picture, [given])
        if last is None:
            z = self.layer.exact.z(analysed, self.layer.lambda_of(job.quality))
            return Latents(job.below, given, analysed, analysed.clone(), z)
        y = last.y + (analysed - last.analysed)
        return Latents(job.below, given, analysed, y, last.z, last.added, last.steps)

    def encode(self, job: LayerTask, latents: Latents, effort: int, more: bool) -> Coded:
        """The layer's bytes and what the decoder will see of it, searched as ``effort`` adds to those below it;
        ``more`` efforts follow."""
        networks = self.layer.at(job.quality)
        z, least = latents.z.round(), self.least(job)
        if effort == 0:
            y, least = latents.analysed.clone(), self.layer.thresholds
        elif effort == 1:
            assert latents.added is not None
            y = latents.analysed + latents.added
        else:
            for tile in Tile.all(job.size):
                latents.y[tile.part(LATENT)], latents.z[tile.part(1)] = self.descend(job, latents, tile, STEPS[effort])
            y, z = latents.y.clone(), latents.z.round().clamp(-LATENT_LIMIT, LATENT_LIMIT)
        data = self.layer.write(z, y, least)
        seen = self.layer.reconstruct(networks, y, [latents.given], job.size)
        if effort == 0 and more:
            again = self.layer.analysis(networks, seen, [latents.given])
            latents.added = STAYS * (y - latents.analysed) + SEEN * (latents.analysed - again)
        return data, seen

    @gradients()
    def descend(self, job: LayerTask, latents: Latents, tile: Tile, steps: int) -> tuple[Tensor, Tensor]:
        """y and z in a tile's core after ``steps`` of gradients."""
        outside = tile.part(PIXEL, REACH)
        pixels = samples(job.picture[outside[2:]]).to(self.device)
        given = latents.given[tile.part(LATENT, REACH) if self.of_latents else outside].clone()
        level = level_of(self.layer.lambda_of(job.quality), LAMBDAS)[None].float().to(self.device)
        y, z = latents.y[tile.part(LATENT, REACH)].clone(), latents.z[tile.part(1, REACH)].clone()
        least = self.least(job)
        seen = tile.part(PIXEL, REACH / 2, REACH)
        core, z_core = tile.part(LATENT, 0, REACH), tile.part(1, 0, REACH)
        for _ in range(steps):
            if job.late():
                break
            # what is added to the quantised latent, and to z, for their gradients
            change, moved = torch.zeros_like(y).requires_grad_(), z.clone().requires_grad_()
            quantised, bits = self.quantised(y, moved, change, least)
            whole, below = (quantised + given, 0.5) if self.of_latents else (quantised, given)
            out = self.transforms.synthesis(whole, level, (pixels.shape[2], pixels.shape[3]))
            want, own = pixels[seen], (out + below).clamp(0, 1)[seen]
            error = own.numel() * self.distortion(want, own).sum()
            (bits + job.price * error).backward()
            assert change.grad is not None and moved.grad is not None
            slope, away = change.grad[core], quantised.detach()[core] - y[core]
            if tile not in latents.steps:
                # at first, gradients at the quantised latent are those of the quantisation errors, in each channel
                slopes, errors = (x.square().sum((0, 2, 3), keepdim=True) for x in (slope, away))
                latents.steps[tile] = 1 / (slopes / errors.clamp(min=1e-9)).sqrt().clamp(min=LEAST_CURVATURE)
            y[core] += TOWARDS * (away - latents.steps[tile] * slope)
            z[z_core] -= Z_RATE * moved.grad[z_core]
        return y[core], z[z_core]

    def quantised(self, y: Tensor, z: Tensor, change: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder has of y, plus ``change``, and the bits of both; z is rounded. Gradients go to ``change``
        and to z, as if rounding were none."""
        low = z.detach().floor()
        channels = torch.arange(self.entropy_model.n, device=z.device)[None, :, None, None]
        below, above = (bits_of(self.z_bits, channels, low.long() + by) for by in (0, 1))
        bits = (below + (above - below) * (z - low)).sum()

        def code(step: int, log_scales: Tensor, means: Tensor, part: tuple[slice, ...]) -> Tensor:
            nonlocal bits
            index = level_position(log_scales.detach()).round().to(torch.uint8)
            coded, middle = index >= SKIPPED, means.detach()
            own: Tensor = middle + quantise(y[part] - middle, index, least) * coded
            bits = bits + (gaussian_bits(own - means, log_scales) * coded).sum()
            return own + change[part]

        features = self.entropy_model.hyper_synthesis(z + (z.detach().round() - z.detach()), (y.shape[2], y.shape[3]))
        return self.entropy_model.walk(features, code), bits


LOG_SCALES = math.log(entropy.SCALE_RANGE[0]), math.log(entropy.SCALE_RANGE[1])


def level_position(log_scales: Tensor) -> Tensor:
    """Where standard deviations lie among the 64 that have a table: 0..63, with what is between them."""
    low, high = LOG_SCALES
    return (log_scales.clamp(low, high) - low) * ((entropy.LEVELS - 1) / (high - low))


def gaussian_bits(x: Tensor, log_scales: Tensor) -> Tensor:
    """What x costs where it is coded as a symbol with the normal distribution of mean 0."""
    scales, x = log_scales.clamp(*LOG_SCALES).exp(), x.abs()
    # of the smaller tail, where far symbols keep their digits
    mass = torch.special.ndtr((0.5 - x) / scales) - torch.special.ndtr((-0.5 - x) / scales)
    bits: Tensor = -mass.clamp(min=1e-9).log2()
    return bits


def bits_of(bits: Tensor, row: Tensor, symbols: Tensor) -> Tensor:
    """What each symbol costs with the table in ``row`` of ``bits``, as table_bits gives them."""
    reach = bits.shape[1] // 2
    found: Tensor = bits.flatten()[row * bits.shape[1] + symbols.clamp(-reach, reach) + reach]
    return found


def table_bits(tables: Sequence[entropy.Table]) -> Tensor:
    """Bits [tables, 2 w + 1] of the symbols -w..w by each table, w the width of the widest; beyond its own width a
    table escapes."""
    reach = max(table.width for table in tables)
    bits = np.empty((len(tables), 2 * reach + 1), np.float32)
    for row, table in zip(bits, tables, strict=True):
        own = entropy.PRECISION - np.log2(table.freq.astype(np.float64))
        row[:] = own[-1] + ESCAPE_BITS
        row[reach - table.width : reach + table.width + 1] = own[:-1]
    return torch.from_numpy(bits)
