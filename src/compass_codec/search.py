"""Search in the encoder: symbols that cost less in rate and distortion than those which rounding gives.

What is lowered is R + lambda * 255^2 * MSE, summed over the layers. The latents y and z, before they are rounded, move
down its gradient while a random choice between the two nearest integers, ever nearer to rounding, takes the place of
rounding: stochastic Gumbel annealing (Yang, Bamler, Mandt 2020). Then z is rounded, which gives the scales and means
that the decoder will have, and symbols of y move by one: first also where that is a small loss, as in simulated
annealing, and last only where it is a gain. The decoder knows nothing of all this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import entropy
from compass_codec.backbones.mean_scale import MeanScaleLayer
from compass_codec.backbones.symbols import LATENT_LIMIT
from compass_codec.metrics import squared_error
from compass_codec.networks import strips
from compass_codec.networks.arrays import to_tensor
from compass_codec.networks.mean_scale import ImageCodec

if TYPE_CHECKING:
    from compass_codec.backbones import LayerCodec

    class Layered(Protocol):
        """What of codec.Codec a search takes."""

        base: LayerCodec
        residual: LayerCodec

        def predict(self, below: NDArray[np.uint8] | None, size: tuple[int, int]) -> Iterator[Tensor]: ...


# Steps of annealing of each layer, and then of moves, that an effort adds to those below it. It goes on from where the
# effort below has ended.
ANNEAL = (0, 16, 20, 24, 30, 40, 60, 80, 120, 240)
MOVES = (0, 24, 32, 40, 48, 56, 64, 80, 120, 240)
NEAR = 0.49  # of its symbol is where a latent begins
# Of Adam, in quantisation steps, at efforts 1 and 2, which have little time, at 3 to 5, and above.
RATES = (0.03, 0.02, 0.01)
Z_RATE = 1.5  # times that for z: 1 is a little better for one layer of 128 x 128, 2 for three down to 32 x 32
TEMPERATURES = 0.5, 0.1  # of annealing, at first and at last
HEAT, COLD = 1.0, 0.7  # bits that moves may lose at first, about; falls to 0 at this share of the steps
SHARE = 0.3  # of the symbols that may move in one step, less after each that was no gain once it is cold
LESS = 0.7
PROBES = 4  # random pictures from which the curvature is measured
# What a unit of squared error adds to the cost of the layer above, in units of what it would cost there. About 1 is
# best for the sum over the layers, 0 for the top layer at equal bits of the file.
AHEAD = 0.4
ESCAPE_BITS = 16.0  # about what an escaped value costs beyond its escape
# Side of what is searched at once, and what is computed around it, in cells of z. A latent of y shows in the pixels of
# half a cell around it, and those see half a cell more; what z says of y depends on the 2 cells around.
TILE, REACH, HYPER_REACH = 12, 1, 2
LATENT, PIXEL = 4, 64  # latents of y and pixels along the side of a cell of z

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
    coded: list[Coded],
    effort: int,
    deadline: float,
    progress: Progress | None,
    weights: Sequence[float],
) -> list[Coded]:
    """Search from what effort 0 made of a picture's layers, ``coded``, up to ``effort``; stop at ``deadline`` on the
    clock of time.monotonic, finishing what has begun without more search.

    ``weights``, above 0, is what the cost of each layer counts. ``progress`` hears of each effort, of the share of
    the first cost that is saved so far, and of the best layers so far.
    """
    lambdas = [(codec.residual if k else codec.base).lambda_of(quality) for k, quality in enumerate(qualities)]
    best = start = [CodedLayer.of(*parts) for parts in zip(coded, layers, lambdas, strict=True)]
    for stage, best in efforts(codec, layers, qualities, lambdas, start, effort, deadline, weights):
        if progress is not None:
            progress(stage, 1 - total(best, weights) / total(start, weights), [layer.coded for layer in best])
    return [layer.coded for layer in best]


@dataclass(frozen=True)
class CodedLayer:
    """A layer as it is coded, and R + lambda * 255^2 * MSE times its pixels: bits."""

    coded: Coded
    cost: float

    @classmethod
    def of(cls, coded: Coded, picture: NDArray[np.uint8], lam: float) -> CodedLayer:
        return cls(coded, 8 * len(coded[0]) + lam / 3 * squared_error(picture, coded[1]))

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
    lambdas: Sequence[float],
    best: list[CodedLayer],
    effort: int,
    deadline: float,
    weights: Sequence[float],
) -> Iterator[tuple[int, list[CodedLayer]]]:
    """Efforts 1 to ``effort``, each with the best layers so far, beginning with those of effort 0."""
    searches = [Search(codec.base), *([Search(codec.residual)] if len(layers) > 1 else [])]
    latents: list[Latents | None] = [None] * len(layers)
    prices = worth(lambdas, weights)
    for stage in range(1, effort + 1):
        if time.monotonic() >= deadline:
            break
        tried: list[CodedLayer] = []
        for k, (picture, quality) in enumerate(zip(layers, qualities, strict=True)):
            # while nothing below has changed, what was best for a layer can stay
            same = all(a is b for a, b in zip(tried, best[:k], strict=True))
            size = (picture.shape[0], picture.shape[1])
            known = torch.cat(list(codec.predict(tried[-1].coded[1] if k else None, size)), 2)
            job = LayerTask(picture, known, quality, prices[k], torch.Generator().manual_seed(stage), deadline)
            search = searches[min(k, 1)]
            own = latents[k] = search.start(job, latents[k])
            search.anneal(job, own, stage)
            made = CodedLayer.of(search.finish(job, own, stage), picture, lambdas[k])
            error_counts = prices[k] / error_price(lambdas[k])
            keep = same and best[k].priced(error_counts) <= made.priced(error_counts)
            tried.append(best[k] if keep else made)
        if total(tried, weights) < total(best, weights):
            best = tried
        yield stage, best


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
    """A layer to search: its pixels uint8 [height, width, 3], its prediction [1, 3, height, width] in 0..1, and what a
    unit of squared error costs in bits."""

    picture: NDArray[np.uint8]
    known: Tensor
    quality: float
    price: float
    generator: torch.Generator
    deadline: float

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.shape[0], self.picture.shape[1]

    def pixels(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Of a tile: its pixels and its prediction, [1, 3, rows, columns] in 0..1."""
        part = tile.part(PIXEL, REACH)
        return to_tensor(self.picture[part[2:]], self.known.device).float() / 255, self.known[part].clone()

    def late(self) -> bool:
        return time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Latents:
    """y [1, M, h, w] and z [1, N, h / 4, w / 4] of a layer, not rounded, where annealing has left them; ``analysed`` is
    y as the analysis gave it."""

    y: Tensor
    z: Tensor
    analysed: Tensor


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
        rows, columns = (strips.spans(side, TILE) for side in ImageCodec.hyper_size(size))
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

    def extent(self, unit: int, margin: float) -> tuple[int, int]:
        """Rows and columns of such a part."""
        rows, columns = self.part(unit, margin)[2:]
        return rows.stop - rows.start, columns.stop - columns.start


class Search:
    """The search with one image codec and its tables."""

    def __init__(self, layer: LayerCodec) -> None:
        assert isinstance(layer, MeanScaleLayer), "what is searchable"
        self.layer = layer
        with torch.inference_mode(False):
            # the weights were made in inference mode, where autograd may not keep them
            tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in layer.codec.state_dict().items()}
            with torch.device("meta"):
                self.codec = ImageCodec.like(tensors)
            self.codec.load_state_dict(tensors, assign=True)
            self.codec.requires_grad_(False).eval()
            self.y_bits, self.z_bits = (table_bits(t).to(layer.device) for t in (layer.tables.y, layer.tables.z))
            self.channels = torch.arange(layer.codec.n, device=layer.device)[None, :, None, None]

    @gradients()
    def start(self, job: LayerTask, last: Latents | None) -> Latents:
        """The latents of a layer as the analysis gives them, or, if it was searched with another prediction before,
        ``last``, moved by what has changed."""
        level, shape = self.layer.level(job.quality), ImageCodec.latent_size(job.size)
        y = torch.empty((1, self.codec.m, *shape), device=job.known.device)
        for tile in Tile.all(job.size):
            pixels, known = job.pixels(tile)
            y[tile.part(LATENT)] = self.codec.analysis(pixels - known, level)[tile.part(LATENT, 0, REACH)]
        if last is not None:
            return Latents(last.y + (y - last.analysed), last.z, y)
        z = self.codec.hyper_analysis(y)
        index, means = self.parameters(_rounded(z), job.size)
        symbols = self.layer.quantise(y - means, index)
        # rounding gives what effort 0 does
        return Latents(means + (y - means).clamp(symbols - NEAR, symbols + NEAR), z, y)

    def parameters(self, z: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Scale indices and means of y that the decoder will have, from the symbols of z, for a layer of ``size``."""
        index, means = zip(*self.layer.parameters([z], size), strict=True)
        return torch.cat(index, 2).clone(), torch.cat(means, 2).clone()

    @gradients()
    def anneal(self, job: LayerTask, latents: Latents, effort: int) -> None:
        """Move the latents on, in place, as ``effort`` adds to those below it."""
        for tile in Tile.all(job.size):
            self.descend(job, latents, tile, ANNEAL[effort], RATES[(effort > 2) + (effort > 5)])

    def descend(self, job: LayerTask, latents: Latents, tile: Tile, steps: int, rate: float) -> None:
        """Move the latents in a tile's core, in place, by ``steps`` gradients."""
        pixels, prediction = job.pixels(tile)
        cut, z_cut = tile.part(LATENT, REACH), tile.part(1, REACH + HYPER_REACH)
        y, z = latents.y[cut].clone().requires_grad_(), latents.z[z_cut].clone().requires_grad_()
        core, z_core = tile.part(LATENT, 0, REACH), tile.part(1, 0, REACH + HYPER_REACH)
        for tensor, inside in ((y, core), (z, z_core)):
            mask = torch.zeros_like(tensor)
            mask[inside] = 1
            tensor.register_hook(mask.mul)
        groups: list[dict[str, Any]] = [{"params": [y]}, {"params": [z], "lr": Z_RATE * rate}]
        adam = torch.optim.Adam(groups, rate)
        first, last = TEMPERATURES
        for step in range(steps):
            if job.late():
                break
            temperature = first * (last / first) ** (step / steps)
            below, share = soften(z, temperature, job.generator)
            bits = between(self.z_bits, self.channels, below, share).sum()
            given = self.codec.hyper_synthesis(below + share, tile.extent(LATENT, REACH + HYPER_REACH))
            scales, means = (part[tile.part(LATENT, REACH, REACH + HYPER_REACH)] for part in given)
            position = level_position(scales)
            below, share = soften(y - means, temperature, job.generator)
            row = position.detach().long().clamp(0, entropy.LEVELS - 2)
            low, high = (between(self.y_bits, row + by, below, share) for by in (0, 1))
            bits = bits + (low + (high - low) * (position - row)).sum()
            loss = bits + self.error(below + share + means, job, tile, pixels, prediction)
            adam.zero_grad()
            loss.backward()
            adam.step()
        latents.y[tile.part(LATENT)] = y.detach()[core]
        latents.z[tile.part(1)] = z.detach()[z_core]

    def shown(self, latent: Tensor, job: LayerTask, tile: Tile, prediction: Tensor) -> Tensor:
        """The pixels [1, 3, rows, columns] of a latent, not clipped or rounded."""
        return self.codec.synthesis(latent, self.layer.level(job.quality), tile.extent(PIXEL, REACH)) + prediction

    def error(self, latent: Tensor, job: LayerTask, tile: Tile, pixels: Tensor, prediction: Tensor) -> Tensor:
        """What the squared error of the pixels that the tile's core shows in costs, in bits."""
        out = self.shown(latent, job, tile, prediction).clamp(0, 1)
        return job.price * (out - pixels)[tile.part(PIXEL, REACH / 2, REACH)].square().sum()

    def finish(self, job: LayerTask, latents: Latents, effort: int) -> Coded:
        """Round the latents and move the symbols of y; the layer's bytes and what the decoder will see. In place, the
        latents follow the moves."""
        z = _rounded(latents.z)
        index, means = self.parameters(z, job.size)
        symbols = (latents.y - means).round().clamp(-LATENT_LIMIT, LATENT_LIMIT).long()
        for tile in Tile.all(job.size):
            symbols[tile.part(LATENT)] = self.move(job, tile, symbols, index.long(), means, MOVES[effort])
        latents.y[:] = means + (latents.y - means).clamp(symbols - NEAR, symbols + NEAR)
        y = _symbols(symbols)
        data = entropy.encode(_symbols(z), y, index[0].cpu().numpy(), self.layer.tables)
        return data, self.layer.rebuild(y, means, [job.known], job.quality, job.size)

    def curvature(self, latent: Tensor, job: LayerTask, tile: Tile, prediction: Tensor) -> Tensor:
        """About the squared length [1, M, rows, columns] of what a step of 1 in each latent adds to the picture,
        measured with random pictures (Hutchinson), as a product of what is of its channel and what is of its place,
        which takes few of them. Channels that do more say more of a place."""
        latent = latent.requires_grad_()
        out = self.shown(latent, job, tile, prediction)
        generator, squares = torch.Generator().manual_seed(0), torch.zeros_like(latent)
        for _ in range(PROBES):
            probe = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
            squares += torch.autograd.grad(out, latent, probe, retain_graph=True)[0].square()
        of_channel = squares.mean((0, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
        of_place = (squares / of_channel).mean(1, keepdim=True)
        return of_channel.square() * of_place / of_channel.mean() / PROBES

    @gradients()
    def move(self, job: LayerTask, tile: Tile, symbols: Tensor, index: Tensor, means: Tensor, steps: int) -> Tensor:
        """The symbols of the tile's core, int64 [1, M, rows, columns], after ``steps`` of moves by one. Each changes a
        random part of those where it is a gain, by the gradient and the curvature of the error; at first a random
        number of bits decides what is a gain, ever smaller."""
        cut, core = tile.part(LATENT, REACH), tile.part(LATENT, 0, REACH)
        pixels, prediction = job.pixels(tile)
        symbols, index, means = symbols[cut].clone(), index[cut], means[cut]
        row = index[core]
        bend = job.price * self.curvature(symbols + means, job, tile, prediction)[core]
        least, share = float("inf"), SHARE
        for step in range(steps + 1):
            latent = (symbols + means).requires_grad_()
            error = self.error(latent, job, tile, pixels, prediction)
            here = symbols[core]
            bits = bits_of(self.y_bits, row, here)
            heat = HEAT * (1 - step / (COLD * steps))
            if heat > 0 or (found := float(error.detach() + bits.sum())) < least:
                if heat <= 0:
                    least = found
                best, kept = here.clone(), bits
                slope = torch.autograd.grad(error, latent)[0][core]
            else:  # too many at once
                bits = kept
                share *= LESS
            if step == steps or job.late():
                break
            drawn, may = (torch.rand(best.shape, generator=job.generator).to(slope.device) for _ in range(2))
            change, move = max(heat, 0) * torch.logit(drawn, 1e-6), torch.zeros_like(best)
            for by in (-1, 1):
                more = by * slope + bend + bits_of(self.y_bits, row, best + by) - bits
                better = more < change
                change, move = torch.where(better, more, change), torch.where(better, by, move)
            symbols[core] = best + move * (may < share)
        return best


def soften(x: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The integers below, and what to add to them: 0..1, the nearer to 0 or 1 the lower the temperature, and at random
    to 1 the more often the nearer x is to the integer above: a binary concrete variable."""
    below = x.detach().floor()
    inside = (x - below).clamp(1e-5, 1 - 1e-5)
    odds = (torch.atanh(inside) - torch.atanh(1 - inside)) / temperature
    drawn = torch.rand(x.shape, generator=generator).clamp(1e-7, 1 - 1e-7).to(x.device)
    return below, torch.sigmoid((odds + torch.logit(drawn)) / temperature)


def level_position(scales: Tensor) -> Tensor:
    """Where standard deviations lie among the 64 that have a table: 0..63, with what is between them."""
    low, high = map(math.log, entropy.SCALE_RANGE)
    return (scales.clamp(*entropy.SCALE_RANGE).log() - low) * ((entropy.LEVELS - 1) / (high - low))


def bits_of(bits: Tensor, row: Tensor, symbols: Tensor) -> Tensor:
    """What each symbol costs with the table in ``row`` of ``bits``, as table_bits gives them."""
    reach = bits.shape[1] // 2
    return bits.flatten()[row * bits.shape[1] + symbols.clamp(-reach, reach) + reach]


def between(bits: Tensor, row: Tensor, below: Tensor, share: Tensor) -> Tensor:
    """What below + share costs: interpolated between the bits of the integers."""
    low, high = (bits_of(bits, row, below.long() + by) for by in (0, 1))
    return low + (high - low) * share


def table_bits(tables: Sequence[entropy.Table]) -> Tensor:
    """Bits [tables, 2 w + 3] of the symbols -w-1..w+1 by each table, w the width of the widest; beyond its own width a
    table escapes."""
    reach = max(table.width for table in tables) + 1
    bits = np.empty((len(tables), 2 * reach + 1), np.float32)
    for row, table in zip(bits, tables, strict=True):
        own = entropy.PRECISION - np.log2(table.freq.astype(np.float64))
        row[:] = own[-1] + ESCAPE_BITS
        row[reach - table.width : reach + table.width + 1] = own[:-1]
    return torch.from_numpy(bits)


def _rounded(z: Tensor) -> Tensor:
    return z.round().clamp(-entropy.SYMBOL_LIMIT, entropy.SYMBOL_LIMIT)


def _symbols(x: Tensor) -> NDArray[np.int32]:
    return x[0].cpu().numpy().astype(np.int32)
