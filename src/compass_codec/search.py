"""Search in the encoder: symbols that cost less in rate and distortion than those which rounding gives.

What is lowered is R + lambda * 255^2 * MSE. Symbols of y move up or down by one wherever the change of the distortion
(its gradient through the synthesis, and the curvature along each channel) and that of the bits (from the probability
tables that code them) add up to less than nothing. Neighbouring latents overlap in the picture, so only a random few
move at a time. From effort 5 on these moves begin where stochastic Gumbel annealing (Yang, Bamler, Mandt 2020) of the
unrounded latent has ended. z, and with it the tables and the means, stays as rounding gave it. The decoder knows
nothing of all this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compass_codec import entropy, strips
from compass_codec.codec import rounded
from compass_codec.container import PLAIN, Side
from compass_codec.networks import ImageCodec, quality_to_lambda

if TYPE_CHECKING:
    from compass_codec.codec import Codec, LayerCodec

# What an effort adds to those below it: gradients spent on annealing each layer, and on moves. Without annealing moves
# begin with what the effort below has ended with.
ANNEAL = (0, 0, 0, 0, 0, 32, 48, 64, 100, 200)
MOVES = (0, 4, 4, 8, 12, 12, 12, 16, 20, 30)
SHARE = 0.15  # of the symbols that may move in one step
CAUTION = 1.5  # times the curvature: what moves together adds up
FIRST_GAIN = 2.0  # bits that a move must win in the first step of an effort; falls to 0 in the last
RATE = 0.02  # of Adam, in quantisation steps; falls to a tenth
HOT, COLD = 0.3, 0.1  # temperatures of annealing
PROBES = 3  # random pictures from which the curvature is measured
ESCAPE_BITS = 16.0  # about what an escaped value costs beyond its escape
# Side of what is searched at once, and what is computed around it, in latents. A latent shows in the pixels of 2 around
# it, and those see 2 more.
TILE, REACH = 48, 2

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Coded:
    """A layer: its bytes, what the decoder will see (uint8 [height, width, 3]), and what both cost, in bits."""

    data: bytes
    seen: np.ndarray
    cost: float


def cost(data: bytes, seen: np.ndarray, picture: np.ndarray, quality: float) -> float:
    """R + lambda * 255^2 * MSE of a layer times its pixels: bits. Pictures are uint8 [height, width, 3]."""
    rows = strips.spans(len(picture), strips.STRIP["cpu"])
    squares = sum(int(np.square(picture[a:b].astype(np.int32) - seen[a:b]).sum(dtype=np.int64)) for a, b in rows)
    return 8 * len(data) + quality_to_lambda(quality) * squares / 3


def improve(
    codec: Codec,
    layers: Sequence[np.ndarray],
    qualities: Sequence[float],
    coded: Sequence[tuple[bytes, np.ndarray]],
    effort: int,
    deadline: float,
    progress: Progress | None = None,
    sides: Sequence[Side] = (),
) -> list[Coded]:
    """Search from what effort 0 made of a picture's layers, ``coded``, up to ``effort``; stop at ``deadline`` on the
    clock of time.monotonic, finishing what has begun without more search.

    An effort's layers are kept only if together they cost less than those of the effort below. ``progress`` hears of
    each effort and of the share of the first cost that is saved so far. ``sides`` is the side information of each
    layer, which stays as it is.
    """
    sides = sides or [PLAIN] * len(layers)
    best = [Coded(*c, cost(*c, p, q)) for c, p, q in zip(coded, layers, qualities, strict=True)]
    first = sum(layer.cost for layer in best)
    base, *above = [Search(codec.base), *([Search(codec.residual)] if len(layers) > 1 else [])]
    for stage in range(1, effort + 1):
        if time.monotonic() >= deadline:
            break
        tried: list[Coded] = []
        for k, (picture, quality) in enumerate(zip(layers, qualities, strict=True)):
            search = above[0] if k else base
            size = (picture.shape[0], picture.shape[1])
            prediction = list(codec.predict(tried[-1].seen if k else None, size, sides[k].gain))
            if sides[k].empty:
                flat = rounded(prediction, size)
                tried.append(Coded(b"", flat, cost(b"", flat, picture, quality)))
                continue
            # what lies below has changed most in the first effort, and annealing begins anew
            again = k > 0 and (stage == 1 or ANNEAL[stage] > 0)
            data = search.layer.encode(picture, prediction, quality)[0] if again else best[k].data
            generator = torch.Generator().manual_seed(stage)
            tried.append(search.refine(data, picture, prediction, quality, stage, generator, deadline))
        if sum(layer.cost for layer in tried) < sum(layer.cost for layer in best):
            best = tried
        if progress is not None:
            progress(stage, 1 - sum(layer.cost for layer in best) / first)
    return best


class Search:
    """The search with one image codec and its tables."""

    def __init__(self, layer: LayerCodec) -> None:
        self.layer = layer
        with torch.inference_mode(False):
            # the weights were made in inference mode, where autograd may not keep them
            tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in layer.codec.state_dict().items()}
            with torch.device("meta"):
                self.codec = ImageCodec(layer.codec.n, layer.codec.m)
            self.codec.load_state_dict(tensors, assign=True)
            self.codec.requires_grad_(False).eval()
            self.bits = table_bits(layer.tables.y).to(layer.device)

    def refine(
        self,
        data: bytes,
        picture: np.ndarray,
        prediction: Sequence[Tensor],
        quality: float,
        stage: int,
        generator: torch.Generator,
        deadline: float,
    ) -> Coded:
        """A layer, uint8 [height, width, 3], coded as ``data`` given its ``prediction`` in strips, after what effort
        ``stage`` adds to the one below it."""
        size = (picture.shape[0], picture.shape[1])
        z, y, index, means = self.layer.parse(data, size)
        with torch.inference_mode(False), torch.enable_grad():
            known, level = torch.cat(list(prediction), 2).clone(), self.layer.level(quality)
            gain = self.curvature(y, means, level)
            for top, bottom in strips.spans(y.shape[1], TILE):
                for left, right in strips.spans(y.shape[2], TILE):
                    tile = Tile.cut((top, bottom, left, right), y, index, means, picture, known)
                    if ANNEAL[stage] and time.monotonic() < deadline:
                        tile = self.anneal(tile, quality, level, ANNEAL[stage], generator, deadline)
                    core = self.move(tile, quality, level, gain, MOVES[stage], generator, deadline)
                    y[:, top:bottom, left:right] = core
        data = entropy.encode(z, y, index, self.layer.tables)
        seen = self.layer.rebuild(y, means, prediction, quality, size)
        return Coded(data, seen, cost(data, seen, picture, quality))

    def curvature(self, y: np.ndarray, means: Tensor, level: Tensor) -> Tensor:
        """The squared length [1, M, 1, 1] of what a step of 1 in each channel of y adds to the picture, measured around
        the middle of the layer with random pictures (Hutchinson)."""
        top, left = max(0, y.shape[1] - TILE) // 2, max(0, y.shape[2] - TILE) // 2
        rows, columns = slice(top, top + TILE), slice(left, left + TILE)
        symbols = torch.from_numpy(y[None, :, rows, columns]).to(means.device)
        latent = (symbols + means[:, :, rows, columns].clone()).requires_grad_()
        out = self.codec.synthesis(latent, level, (16 * latent.shape[2], 16 * latent.shape[3]))
        generator, squares = torch.Generator().manual_seed(0), torch.zeros_like(latent)
        for _ in range(PROBES):
            probe = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
            squares += torch.autograd.grad(out, latent, probe, retain_graph=True)[0].square()
        return squares.mean((0, 2, 3), keepdim=True) / PROBES

    def error(self, latent: Tensor, tile: Tile, quality: float, level: Tensor) -> Tensor:
        """What the squared error of the tile's pixels is worth, in bits."""
        out = (self.codec.synthesis(latent, level, tile.size) + tile.prediction).clamp(0, 1)
        return quality_to_lambda(quality) * 255**2 / 3 * (out - tile.picture)[tile.pixels].square().sum()

    def anneal(
        self, tile: Tile, quality: float, level: Tensor, steps: int, generator: torch.Generator, deadline: float
    ) -> Tile:
        """The tile with new symbols in its core: its latent less the means, moved by gradients while a random choice
        between the two nearest integers, ever nearer to rounding, takes the place of rounding."""
        inside, latent = tile.core, tile.symbols + tile.means
        means = tile.means[inside]
        centred = self.codec.analysis(tile.picture - tile.prediction, level)[inside] - means
        centred.requires_grad_()
        adam = torch.optim.Adam([centred], RATE)
        for step in range(steps):
            if time.monotonic() >= deadline:
                break
            adam.param_groups[0]["lr"] = RATE * (1 - 0.9 * step / steps)
            below = centred.detach().floor()
            share = relax(centred - below, HOT * (COLD / HOT) ** (step / steps), generator)
            low, high = (self.bits_of(below.long() + by, tile.index) for by in (0, 1))
            latent = latent.detach().clone()
            latent[inside] = below + share + means
            loss = self.error(latent, tile, quality, level) + (low + (high - low) * share).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        symbols = tile.symbols.clone()
        symbols[inside] = centred.detach().round().long()
        return replace(tile, symbols=symbols)

    def move(
        self,
        tile: Tile,
        quality: float,
        level: Tensor,
        gain: Tensor,
        steps: int,
        generator: torch.Generator,
        deadline: float,
    ) -> np.ndarray:
        """The best symbols int32 [M, rows, columns] of the tile's core that ``steps`` steps come across."""
        weight = quality_to_lambda(quality) * 255**2 / 3  # bits for each unit of squared error
        inside, symbols = tile.core, tile.symbols
        best, least = symbols[inside], float("inf")
        for step in range(steps + 1):
            latent = (symbols + tile.means).requires_grad_()
            error = self.error(latent, tile, quality, level)
            here = symbols[inside]
            bits = self.bits_of(here, tile.index)
            if (found := float(error.detach() + bits.sum())) < least:
                best, least = here, found
            if step == steps or time.monotonic() >= deadline:
                break
            slope = torch.autograd.grad(error, latent)[0][inside]
            change, move = torch.full_like(slope, -FIRST_GAIN * (1 - step / steps)), torch.zeros_like(here)
            for by in (-1, 1):
                worth = by * slope + CAUTION * weight * gain + self.bits_of(here + by, tile.index) - bits
                better = worth < change
                change, move = torch.where(better, worth, change), torch.where(better, by, move)
            may = torch.rand(here.shape, generator=generator).to(here.device) < SHARE
            symbols = symbols.clone()
            symbols[inside] = here + move * may
        return best[0].cpu().numpy()

    def bits_of(self, symbols: Tensor, index: Tensor) -> Tensor:
        """What each symbol costs with the table of its scale index."""
        reach = self.bits.shape[1] // 2
        return self.bits.flatten()[index * self.bits.shape[1] + symbols.clamp(-reach, reach) + reach]


@dataclass(frozen=True)
class Tile:
    """A part of a layer: ``symbols``, ``means`` [1, M, h, w] and pixels [1, 3, rows, columns] in 0..1 with what lies
    around its core; ``index`` is of the core alone."""

    symbols: Tensor
    means: Tensor
    index: Tensor
    picture: Tensor
    prediction: Tensor
    core: tuple[slice, ...]  # of the latents, those that may move
    pixels: tuple[slice, ...]  # of the pixels, those that the core shows in

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.shape[2], self.picture.shape[3]

    @classmethod
    def cut(
        cls,
        core: tuple[int, int, int, int],
        y: np.ndarray,
        index: np.ndarray,
        means: Tensor,
        picture: np.ndarray,
        prediction: Tensor,
    ) -> Tile:
        """The tile whose core is (top, bottom, left, right) in latents, from a whole layer; ``prediction`` has its
        pixels or is broadcast to them."""
        inside, pixels = [slice(None)] * 2, [slice(None)] * 2
        cells, samples = [], []
        for first, last, length in ((*core[:2], picture.shape[0]), (*core[2:], picture.shape[1])):
            low, high = max(0, first - 2 * REACH), min(-(-length // 16), last + 2 * REACH)
            cells.append(slice(low, high))
            samples.append(slice(16 * low, min(16 * high, length)))
            inside.append(slice(first - low, last - low))
            pixels.append(slice(16 * (max(0, first - REACH) - low), min(16 * (last + REACH), length) - 16 * low))
        rows, columns = cells
        device = means.device
        part = torch.from_numpy(np.ascontiguousarray(picture[samples[0], samples[1]])).to(device)
        return cls(
            torch.from_numpy(y[None, :, rows, columns].copy()).to(device).long(),
            means[:, :, rows, columns].clone(),
            torch.from_numpy(index[None, :, core[0] : core[1], core[2] : core[3]].copy()).to(device).long(),
            part.permute(2, 0, 1)[None].float() / 255,
            prediction[:, :, samples[0], samples[1]],
            tuple(inside),
            tuple(pixels),
        )


def relax(fraction: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """0..1, the nearer to 0 or 1 the lower the temperature, and at random to 1 the more often the nearer ``fraction``,
    0..1, is to it: a binary concrete variable."""
    inside = fraction.clamp(1e-5, 1 - 1e-5)
    odds = (torch.atanh(inside) - torch.atanh(1 - inside)) / temperature
    drawn = torch.rand(fraction.shape, generator=generator).clamp(1e-7, 1 - 1e-7).to(fraction.device)
    return torch.sigmoid((odds + torch.logit(drawn)) / temperature)


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
