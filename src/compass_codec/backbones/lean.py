"""One layer to bytes and back with the lean backbone, and the sets of weights that hold it.

Pixels are computed in floating point, a strip of rows at a time. Scale indices and means of the latent are computed in
integers (exact.py), so that symbols are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec import entropy
from compass_codec.backbones.symbols import LATENT_LIMIT, fill, quantise, thresholds
from compass_codec.networks import flow, strips
from compass_codec.networks.arrays import to_bytes, to_device, to_host, to_tensor
from compass_codec.networks.exact import ACTIVATION, Block, Conv
from compass_codec.networks.lean import CELL, EPSILON, LAMBDAS, PHASES, STEPS, UNSHUFFLE, LeanCodec, eighth
from compass_codec.networks.lean_liff import LeanLIFF
from compass_codec.networks.rates import gain, level_of

FINE = 16  # parts of the distance between two scale levels in which log scales are added up
MEAN_UNIT = 64  # means are multiples of one over it
MEAN_LIMIT = 2**15 - 1  # of means in these units
SKIPPED = 3  # symbols of lower scale indices are zero and are not coded
EXACT = "exact."  # what the names of an Entropy's tensors start with in a set
PARTS = ("base", "residual", "liff")
CELLS = {"cpu": 1024, "cuda": 1 << 16}  # of y in a strip: what is in hand then stays in a processor's cache


def quality_to_lambda(quality: float) -> float:
    """Quality 1..100 to a Lagrangian multiplier: 0.0018 at 1, 0.013 at 60, 0.18 at 100."""
    t = (quality - 1) / 99
    return math.exp(math.log(LAMBDAS[0]) + 1.417 * t + 3.188 * t * t)


class Entropy(nn.Module):
    """The integer twin of what leads from z and known latents to scale indices and means of y."""

    def __init__(self, tensors: Mapping[str, Tensor], m: int) -> None:
        super().__init__()
        self.m = m
        self.up = nn.ModuleList(Conv(tensors, f"up.{k}", 0, ACTIVATION) for k in range(2))
        self.blocks = nn.ModuleList(Block(tensors, f"block.{k}") for k in range(2))
        self.first = Conv(tensors, "first")
        later = range(STEPS - 1)
        self.into = nn.ModuleList(Conv(tensors, f"into.{k}", 0, ACTIVATION) for k in later)
        self.context = nn.ModuleList(Block(tensors, f"context.{k}") for k in later)
        self.more = nn.ModuleList(Conv(tensors, f"more.{k}") for k in later)
        self.known: Tensor
        self.register_buffer("known", tensors["known"].float()[:, None, None])

    def features(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """z [1, N, ceil(h/4), ceil(w/4)], integers, to features [1, C, h, w] int16, where ``size`` is (h, w)."""
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        at: Iterator[flow.Strip] = flow.cut(z, self._rows(z) // 16 + 1)
        at = flow.each(lambda x: x.float().clamp(-ACTIVATION, ACTIVATION), at)
        for up, block, (rows, columns) in zip(self.up, self.blocks, (half, size), strict=True):
            at = flow.within(rows, columns, flow.each(_doubled(up), at))
            at = flow.blocks([block], at)
        return flow.gather(flow.each(lambda x: x.to(torch.int16), at))

    @staticmethod
    def _rows(x: Tensor) -> int:
        return max(1, CELLS[x.device.type] // x.shape[-1])

    def walk(self, features: Tensor, y: Tensor, code: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Go through the steps of the context model, as LeanCodec.walk does.

        ``y`` [1, M, h, w] float32 becomes the latent that the decoder has, place by place. ``code`` is called once a
        step with scale indices (uint8), means (float32) and what ``y`` holds, each of one dimension: phase by phase,
        of each the channels, rows and columns in turn. It returns the quantised latents.
        """
        quarter = self.m // STEPS
        for step in range(STEPS):
            hidden = self._hidden(step, features, y) if step else None
            found = []
            for phase, (row, column) in enumerate(PHASES):
                group = (phase - step) % STEPS
                place = (
                    slice(None),
                    slice(group * quarter, (group + 1) * quarter),
                    slice(row, None, 2),
                    slice(column, None, 2),
                )
                at = (slice(None), slice(None), *place[2:])
                f = features[at].float()
                if not f.numel():
                    continue
                scales, means = (
                    self.first(f, slice(k * self.m + place[1].start, k * self.m + place[1].stop)) for k in (0, 1)
                )
                if hidden is not None:
                    rows = slice(2 * quarter * phase, 2 * quarter * (phase + 1))
                    more = self.more[step - 1](hidden[at].float(), rows).chunk(2, 1)
                    scales, means = (a.add_(b) for a, b in zip((scales, means), more, strict=True))
                index = scales.mul_(1 / FINE).floor_().clamp_(0, entropy.LEVELS - 1).to(torch.uint8)
                found.append((place, index, means.clamp_(-MEAN_LIMIT, MEAN_LIMIT).mul_(1 / MEAN_UNIT)))
            parts = [[part.flatten() for part in (index, means, y[place])] for place, index, means in found]
            done = code(*(torch.cat(each) for each in zip(*parts, strict=True)))
            for (place, index, _), values in zip(found, done.split([len(part[0]) for part in parts]), strict=True):
                y[place] = values.view(index.shape)

    def _hidden(self, step: int, features: Tensor, y: Tensor) -> Tensor:
        """Hidden activations [1, G, h, w] int16 of a later step, from features and what is known of y."""
        quarter = self.m // STEPS
        rows = max(2, self._rows(y) // 2 * 2)

        def inputs() -> Iterator[flow.Strip]:
            for (strip, last), (part, _) in zip(*(flow.cut(x, rows) for x in (y, features)), strict=True):
                known = (strip * self.known).add_(0.5).floor_().clamp_(-ACTIVATION, ACTIVATION)
                for group in range(STEPS):
                    for phase, (row, column) in enumerate(PHASES):
                        if (phase - group) % STEPS >= step:
                            known[:, group * quarter : (group + 1) * quarter, row::2, column::2] = 0
                yield self.into[step - 1](torch.cat([known, part.float()], 1)), last

        return flow.gather(flow.each(_short, flow.blocks([self.context[step - 1]], inputs())))


def _doubled(up: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pixel_shuffle(up(x), 2)


def _short(x: Tensor) -> Tensor:
    return x.to(torch.int16)


class Prepared:
    """The transforms of a LeanCodec at one level, for inference in one precision: gains and norms are parts of weights.

    Strips are [1, C, rows, W] in the precision, channels last.
    """

    def __init__(self, codec: LeanCodec, level: Tensor, kind: torch.dtype) -> None:
        self.codec, self.kind = codec, kind
        self.gain, self.inverse = gain(codec.log_gain, level), gain(codec.log_inv_gain, level)
        self.a8, self.a16, self.s16, self.s8 = (
            [_block(block, level, kind) for block in blocks] for blocks in (codec.a8, codec.a16, codec.s16, codec.s8)
        )

    def _linear(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> Callable[[Tensor], Tensor]:
        weight, bias = layer.weight.to(self.kind), None if layer.bias is None else layer.bias.to(self.kind)
        apply = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
        return lambda x: apply(x, weight, bias, stride=layer.stride)

    def _eighth(self, x: Tensor) -> Tensor:
        return eighth(x).to(self.kind, memory_format=torch.channels_last)

    def analysis(self, pixels: Iterable[tuple[Tensor, Tensor, bool]]) -> Iterator[flow.Strip]:
        """Strips of a layer less its prediction, of that prediction less 1/2, and whether they are the last, to strips
        of y (float32). Strips but the last have multiples of 8 rows."""
        c = self.codec
        embed = self._linear(c.embed)
        embed_p = self._linear(c.embed_p) if c.conditional else None

        def embedded() -> Iterator[flow.Strip]:
            for x, known, last in pixels:
                f = embed(self._eighth(x))
                yield f if embed_p is None else f.add_(embed_p(self._eighth(known))), last

        at = flow.each(self._linear(c.down), flow.even(flow.blocks(self.a8, embedded())))
        to_y = self._linear(c.to_y)
        return flow.each(lambda x: to_y(x).float().mul_(self.gain), flow.blocks(self.a16, at))

    def synthesis(
        self, y: Iterator[flow.Strip], prediction: Iterable[Tensor], size: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Strips of the quantised latent and of the prediction to strips [1, 3, rows, W] of the layer, float32."""
        c = self.codec
        seen, below = (strips.Rows(part) for part in strips.fork(prediction))
        from_y, out = self._linear(c.from_y), self._linear(c.out)
        at = flow.each(lambda x: from_y((x * self.inverse).to(self.kind, memory_format=torch.channels_last)), y)
        at = flow.each(self._linear(c.up), flow.blocks(self.s16, at))
        at = flow.within(-(-size[0] // UNSHUFFLE), -(-size[1] // UNSHUFFLE), at)
        if c.conditional:
            at = self._conditioned(at, seen, size[0])
        row = 0
        for f, _ in flow.blocks(self.s8, at):
            strip = F.pixel_shuffle(out(f).float(), UNSHUFFLE)[:, :, : size[0] - row, : size[1]]
            row += strip.shape[2]
            yield strip + below.take(strip.shape[2])

    def _conditioned(self, at: Iterable[flow.Strip], seen: strips.Rows, height: int) -> Iterator[flow.Strip]:
        p8, row = self._linear(self.codec.p8), 0
        for f, last in at:
            rows = min(f.shape[2] * UNSHUFFLE, height - row)
            row += rows
            yield p8(self._eighth(seen.take(rows) - 0.5)).add_(f), last


def _block(block: Any, level: Tensor, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A block on [1, C, rows + 2, W], the row above and the one below with it, to [1, C, rows, W]."""
    c = len(block.norm)
    dw, p1, p2 = block.dw, block.p1, block.p2
    first = (p1.weight[..., 0, 0] * block.norm).to(kind)
    last = (p2.weight[..., 0, 0] * gain(block.log_gain, level).view(-1)).to(kind)
    biases = [layer.bias.to(kind) for layer in (dw, p1, p2) if layer.bias is not None]
    taps = dw.weight.to(kind, memory_format=torch.channels_last)

    def apply(x: Tensor) -> Tensor:
        h = F.conv2d(x, taps, biases[0], padding=(0, 1), groups=c).permute(0, 2, 3, 1)
        norm = h.float().square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
        a, b = F.linear(h.mul_(norm.to(kind)), first, biases[1]).chunk(2, -1)
        gated = F.silu(a).mul_(b)
        return F.linear(gated, last, biases[2]).add_(x[:, :, 1:-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return apply


class LeanLayer:
    """A lean codec with its entropy coder: a layer less its prediction to bytes and back."""

    searchable = True

    def __init__(self, codec: LeanCodec, exact: Entropy, tables: entropy.Tables, kind: torch.dtype) -> None:
        self.codec, self.exact, self.tables, self.kind = codec, exact, tables, kind
        self.device = codec.log_gain.device
        self.thresholds = torch.from_numpy(thresholds(tables)).to(self.device)

    def lambda_of(self, quality: float) -> float:
        return quality_to_lambda(quality)

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Tensor]], quality: float
    ) -> tuple[bytes, NDArray[np.uint8]]:
        """See backbone.LayerCodec."""
        networks = self.networks(quality)
        y = self.analysis(networks, picture, prediction())
        data = self.write(self.hyper_analysis(y), y)
        return data, self.reconstruct(networks, y, prediction(), (picture.shape[0], picture.shape[1]))

    def analysis(self, networks: Prepared, picture: NDArray[np.uint8], prediction: Iterable[Tensor]) -> Tensor:
        """The latent [1, M, h, w] of a layer."""
        size = (picture.shape[0], picture.shape[1])
        return flow.gather(networks.analysis(self._pixels(picture, strips.Rows(prediction), size)))

    def write(self, z: Tensor, y: Tensor, least: Tensor | None = None) -> bytes:
        """The symbols of z and a latent to bytes; ``least`` are its thresholds if they are others (symbols.thresholds).
        In place, the latent becomes what the decoder has of it."""
        coder = entropy.Encoder(self.tables)
        coder.z(to_host(z[0]).astype(np.int32))

        def code(index: Tensor, means: Tensor, own: Tensor) -> Tensor:
            symbols = self._quantise(own.sub_(means), index, least)
            coder.y(to_host(index), to_host(symbols.to(torch.int32)))
            return symbols.add_(means)

        self.exact.walk(self.exact.features(z, (y.shape[2], y.shape[3])), y, code)
        return coder.data()

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Tensor], quality: float
    ) -> NDArray[np.uint8]:
        """See backbone.LayerCodec."""
        _, y = self._read(data, size)
        return self.reconstruct(self.networks(quality), y, prediction, size)

    def parse(self, data: bytes, size: tuple[int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """See backbone.LayerCodec; the latent, symbols plus means, is in units of 1 / MEAN_UNIT."""
        z, y = self._read(data, size)
        return z, to_host(y[0].mul_(MEAN_UNIT).to(torch.int32))

    def _read(self, data: bytes, size: tuple[int, int]) -> tuple[NDArray[np.int32], Tensor]:
        """Bytes of a layer of ``size`` to the symbols of z [N, h, w] and the quantised latent [1, M, h, w]."""
        h, w = (-(-side // CELL) for side in size)
        rows, columns = -(-h // 4), -(-w // 4)
        decoder = entropy.Decoder(data, self.tables, rows * columns, 0)
        z = decoder.z(self.codec.n, rows, columns)
        y = torch.zeros(1, self.codec.m, h, w, device=self.device)

        def code(index: Tensor, means: Tensor, _: Tensor) -> Tensor:
            return means.add_(to_device(decoder.y(to_host(index)), self.device))

        self.exact.walk(self.exact.features(to_device(z[None], self.device), (h, w)), y, code)
        return z, y

    def networks(self, quality: float) -> Prepared:
        level = level_of(quality_to_lambda(quality), LAMBDAS)[None].float().to(self.device)
        return Prepared(self.codec, level, self.kind)

    def _rows(self, width: int) -> int:
        """Rows of y in a strip."""
        return max(1, CELLS[self.device.type] // -(-width // CELL))

    def _pixels(
        self, picture: NDArray[np.uint8], prediction: strips.Rows, size: tuple[int, int]
    ) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """What Prepared.analysis takes."""
        for first, end in strips.spans(-(-size[0] // CELL), self._rows(size[1])):
            rows = slice(first * CELL, min(size[0], end * CELL))
            x, known = to_tensor(picture[rows], self.device).float().div_(255), prediction.take(rows.stop - rows.start)
            yield x.sub_(known), known - 0.5, rows.stop == size[0]

    def hyper_analysis(self, y: Tensor) -> Tensor:
        """Latent to the symbols of z, float32."""
        return self.codec.hyper_analysis(y).round().clamp(-LATENT_LIMIT, LATENT_LIMIT)

    def _quantise(self, centred: Tensor, index: Tensor, least: Tensor | None = None) -> Tensor:
        """Symbols of y, less its means, from what they cost by their scale indices (uint8)."""
        return quantise(centred, index, self.thresholds if least is None else least).mul_(index >= SKIPPED)

    def reconstruct(
        self, networks: Prepared, y: Tensor, prediction: Iterable[Tensor], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """The quantised latent and strips of the prediction to the layer. Encoder and decoder both come here."""
        done, row = np.empty((*size, 3), np.uint8), 0
        for strip in networks.synthesis(flow.cut(y, self._rows(size[1])), prediction, size):
            rows = slice(row, row := row + strip.shape[2])
            done[rows] = to_bytes(strip)
        return done


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], device: torch.device, precision: str
) -> tuple[LeanLayer, LeanLayer, LeanLIFF]:
    """The base codec, the codec of enhancement layers and LIFF of a set on ``device``, out of the tensors of its parts;
    their dimensions are in ``spec``, its model.json. ``precision``: see weights.load. Raises KeyError, ValueError,
    TypeError or RuntimeError where something is missing or does not fit."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    kind: torch.dtype = getattr(torch, precision)
    base, residual = (
        _layer(spec[part], tensors[part], device, torch.float32 if part == "base" else kind) for part in PARTS[:2]
    )
    return base, residual, fill(lambda: LeanLIFF(**spec["liff"]), tensors["liff"], device).to(kind)


def _layer(
    dimensions: dict[str, Any], tensors: dict[str, Tensor], device: torch.device, kind: torch.dtype
) -> LeanLayer:
    codec = fill(lambda: LeanCodec(**dimensions), tensors, device)
    exact = {name.removeprefix(EXACT): value for name, value in tensors.items() if name.startswith(EXACT)}
    tables = entropy.Tables(*(tensors[f"tables.{key}"].numpy() for key in ("z", "y", "y_lengths")), skipped=SKIPPED)
    return LeanLayer(codec, Entropy(exact, codec.m).to(device), tables, kind)
