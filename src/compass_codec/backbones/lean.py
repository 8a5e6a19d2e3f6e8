"""One layer to bytes and back with the lean backbone, and the sets of weights that hold it.

Pixels are computed in floating point, a strip of rows at a time. Scale indices and means of the latent are computed in
integers (exact.py), so that symbols are the same on every device and with every engine. What an engine computes comes
from engines/; all here takes its arrays, of NumPy or PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compass_codec import entropy
from compass_codec.backbones.symbols import LATENT_LIMIT, quantise, thresholds
from compass_codec.errors import DamagedError
from compass_codec.networks import flow, strips
from compass_codec.networks.arrays import Array, cast, space, to_bytes, to_host
from compass_codec.networks.numbers import ACTIVATION, CELL, FACTORIZED, LAMBDAS, MEAN_UNIT, UNSHUFFLE
from compass_codec.networks.order import Step, order_of

if TYPE_CHECKING:
    from compass_codec.engines import Engine, EntropyNetworks, LeanNetworks, Predictor, Transforms

SKIPPED = 3  # symbols of lower scale indices are zero and are not coded
PARTS = ("base", "residual", "liff")
SEARCHED = ("psnr", "visual")  # tunes of sets whose distortion a search knows
CELLS = {"cpu": 1024, "cuda": 1 << 16}  # of y in a strip: what is in hand then stays in a processor's cache


def quality_to_lambda(quality: float) -> float:
    """Quality 1..100 to a Lagrangian multiplier: 0.0018 at 1, 0.013 at 60, 0.18 at 100."""
    t = (quality - 1) / 99
    return math.exp(math.log(LAMBDAS[0]) + 1.417 * t + 3.188 * t * t)


Choose = Callable[[Array, Array, Array], Array]  # scale indices, means and latents of a strip to symbols
Code = Callable[[Array, Array], Array | None]  # scale indices and symbols of a step; of a decoder to these symbols


class Entropy:
    """What leads from z and known latents to scale indices and means of y, in integers, a strip of ``cells`` of y at a
    time."""

    def __init__(self, networks: EntropyNetworks, engine: Engine, cells: Callable[[], int]) -> None:
        assert networks.exact is not None
        self.networks, self.m, self.n, self.cells = networks.exact, networks.m, networks.n, cells
        self.lean, self.engine, self.order = networks, engine, order_of(networks.entropy, networks.m)

    def z_shape(self, h: int, w: int) -> tuple[int, int, int]:
        """Channels, rows and columns of z for y of h rows and w columns."""
        return self.n, -(-h // 4), -(-w // 4)

    def z(self, y: Array, lam: float) -> Array:
        """The symbols of z for a latent at a Lagrangian multiplier, float32 [1, *z_shape]."""
        hyper = self.lean.hyper
        at: Iterator[flow.Strip] = flow.each(hyper.first, flow.cut(y, self._rows(y)))
        for block, down in zip(hyper.blocks, hyper.down, strict=True):
            at = flow.each(down, flow.even(flow.blocks([block], at)))
        z = flow.gather(self.z_shape(y.shape[2], y.shape[3])[1], at)
        return space(z).round(z).clip(-LATENT_LIMIT, LATENT_LIMIT)

    def features(self, z: Array, size: tuple[int, int]) -> Array:
        """z [1, N, ceil(h/4), ceil(w/4)], integers, to features [1, C, h, w] int16, where ``size`` is (h, w)."""
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        at: Iterator[flow.Strip] = flow.cut(z, self._rows(z) // 16 + 1)
        at = flow.each(lambda x: cast(x, "float32").clip(-ACTIVATION, ACTIVATION), at)
        for up, block, (rows, columns) in zip(self.networks.up, self.networks.blocks, (half, size), strict=True):
            at = flow.within(rows, columns, flow.each(up, at))
            at = flow.blocks([block], at)
        return flow.gather(size[0], flow.each(_short, at))

    def _rows(self, x: Array) -> int:
        return max(1, self.cells() // int(x.shape[-1]))

    def walk(self, features: Array, y: Array, choose: Choose | None, code: Code) -> None:
        """Go through the steps of the entropy model, as LeanCodec.walk does.

        ``y`` [1, M, h, w] float32 becomes the latent that the decoder has, place by place. An encoder's ``choose``
        takes scale indices (uint8), means (float32) and what ``y`` holds, of places of a strip, and returns symbols.
        ``code`` is called once a step with scale indices (uint8) and symbols (int16), each of one dimension: part by
        part, of each the channels, rows and columns in turn. A decoder's returns the symbols, of any integers.
        """
        for step in self.order:
            # a latent of few rows or columns lacks some places
            parts = [part for part in step.parts if 0 not in y[part.of(step.stride)].shape]
            if not parts:
                continue
            own = [y[part.of(step.stride)] for part in parts]
            flat_index, index = self._flat(own, np.uint8)
            flat_symbols, symbols = self._flat(own if choose else [], np.int16)
            row = 0
            for f, hidden in self._strips(step, features[step.grid], y[step.grid]):
                for k, part in enumerate(parts):
                    places = slice(None), slice(None), *part.places(row=row)
                    if not f[places].shape[2]:
                        continue
                    more = None if hidden is None else hidden[places]
                    found, means = self.networks.scales_and_means(step, part, f[places], more)
                    first = -((part.row - row) // part.every)
                    at = slice(None), slice(None), slice(first, first + found.shape[2])
                    index[k][at] = found
                    if choose:
                        chosen = choose(found, means, own[k][at])
                        symbols[k][at] = cast(chosen, "int16")
                        means += chosen
                    own[k][at] = means
                row += f.shape[2]
            if (read := code(flat_index, flat_symbols)) is None:
                continue
            for latents in own:
                count = math.prod(latents.shape)
                latents += cast(read[:count].reshape(latents.shape), "float32")
                read = read[count:]

    def _flat(self, like: Sequence[Array], kind: Any) -> tuple[Array, list[Array]]:
        """An array of one dimension, and the parts of it that have the shapes of ``like``."""
        counts = [math.prod(each.shape) for each in like]
        whole, first = self.engine.array(np.empty(sum(counts), kind)), 0
        return whole, [
            whole[first : (first := first + count)].reshape(each.shape)
            for each, count in zip(like, counts, strict=True)
        ]

    def _strips(self, step: Step, features: Array, y: Array) -> Iterator[tuple[Array, Array | None]]:
        """Features and y of a step's grid to strips: features, and hidden activations [1, G, rows, W] where the step
        has a context model."""
        rows = max(2, self._rows(y) // 2 * 2)
        if not step.context:
            for strip, _ in flow.cut(features, rows):
                yield strip, None
            return

        def inputs() -> Iterator[flow.Strip]:
            for (strip, last), (part, _) in zip(*(flow.cut(x, rows) for x in (y, features)), strict=True):
                known = space(strip).zeros_like(strip)
                for earlier in step.known:
                    known[earlier.of()] = strip[earlier.of()]
                yield self.networks.into(step, known, part), last  # strips begin at even rows, as known ones do

        row = 0
        for hidden, _ in flow.blocks([self.networks.context[step.network]], inputs()):
            yield features[:, :, row : (row := row + hidden.shape[2])], hidden


class Factorized:
    """The same without hyper networks: each channel of y has a table for every level of LAMBDAS, and z is one number,
    the level whose tables are used."""

    def __init__(self, networks: EntropyNetworks, engine: Engine, cells: Callable[[], int]) -> None:
        self.m = networks.m

    def z_shape(self, h: int, w: int) -> tuple[int, int, int]:
        return 1, 1, 1

    def z(self, y: Array, lam: float) -> Array:
        level = round(float(np.interp(math.log(lam), np.log(LAMBDAS), np.arange(len(LAMBDAS)))))
        return space(y).zeros_like(y[:, :1, :1, :1]) + level

    def features(self, z: Array, size: tuple[int, int]) -> Array:
        """The level."""
        if not 0 <= (level := int(z[0, 0, 0, 0])) < len(LAMBDAS):
            raise DamagedError("corrupt layer: invalid symbol stream")
        return level

    def walk(self, features: Array, y: Array, choose: Choose | None, code: Code) -> None:
        xp = space(y)
        tables = features * self.m - 1 + xp.cumsum(xp.ones_like(y[:, :, :1, :1]), 1)  # an integer for each channel
        index = xp.broadcast_to(cast(tables, "int32"), y.shape)
        if choose:
            y[:] = choose(index, xp.zeros_like(tables), y)
        if (read := code(index.reshape(-1), cast(y, "int16").reshape(-1))) is not None:
            y[:] = cast(read.reshape(y.shape), "float32")


def _short(x: Array) -> Array:
    return cast(x, "int16")


def analysis(networks: Transforms, pixels: Iterable[flow.Strip]) -> Iterator[flow.Strip]:
    """Strips of a centred picture to strips of y (float32). Strips but the last have multiples of 8 rows."""
    at = flow.each(networks.embed, pixels)
    at = flow.each(networks.down, flow.even(flow.blocks(networks.a8, at)))
    return flow.each(networks.to_y, flow.blocks(networks.a16, at))


def synthesis(networks: Transforms, y: Iterator[flow.Strip], size: tuple[int, int]) -> Iterator[Array]:
    """Strips of the quantised latent to strips [1, 3, rows, W] of a centred picture, float32."""
    at = flow.each(networks.up, flow.blocks(networks.s16, flow.each(networks.from_y, y)))
    at = flow.within(-(-size[0] // UNSHUFFLE), -(-size[1] // UNSHUFFLE), at)
    row = 0
    for f, _ in flow.blocks(networks.s8, at):
        strip = networks.out(f)[:, :, : size[0] - row, : size[1]]
        row += strip.shape[2]
        yield strip


class LeanLayer:
    """An entropy model with its coder, and transforms: a layer less its prediction to bytes and back."""

    def __init__(
        self,
        networks: EntropyNetworks,
        transforms: LeanNetworks,
        tables: entropy.Tables,
        engine: Engine,
        tune: str = "psnr",
    ) -> None:
        self.networks, self.transforms, self.tables, self.engine, self.tune = networks, transforms, tables, engine, tune
        self.searchable = tune in SEARCHED and networks.entropy != FACTORIZED
        self.exact = (Factorized if networks.entropy == FACTORIZED else Entropy)(networks, engine, self._cells)

    @cached_property
    def thresholds(self) -> Array:
        """Those of the encoder's rounding, see symbols.thresholds."""
        return self.engine.array(thresholds(self.tables))

    def lambda_of(self, quality: float) -> float:
        return quality_to_lambda(quality)

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Array]], quality: float, keep: bool = False
    ) -> tuple[bytes, Callable[[], NDArray[np.uint8]]]:
        """See backbones.LayerCodec."""
        networks, size = self.at(quality), (picture.shape[0], picture.shape[1])
        kept = list(self.given(networks, prediction(), size)) if keep else None

        def given() -> Iterable[Array]:
            return kept or self.given(networks, prediction(), size)

        y = self.analysis(networks, picture, given())
        data = self.write(self.exact.z(y, quality_to_lambda(quality)), y)
        return data, lambda: self.reconstruct(networks, y, given(), size)

    def at(self, quality: float) -> Transforms:
        """The transforms at a quality."""
        return self.transforms.at(quality_to_lambda(quality))

    def given(self, networks: Transforms, prediction: Iterable[Array], size: tuple[int, int]) -> Iterator[Array]:
        """Strips of the prediction of a layer to strips of what is subtracted before coding and added after it: here
        to the same."""
        yield from prediction

    def analysis(self, networks: Transforms, picture: NDArray[np.uint8], given: Iterable[Array]) -> Array:
        """What is coded of a layer, a latent [1, M, h, w]."""
        size = (picture.shape[0], picture.shape[1])
        return flow.gather(-(-size[0] // CELL), analysis(networks, self._pixels(size, given, picture)))

    def write(self, z: Array, y: Array, least: Array | None = None) -> bytes:
        """The symbols of z and a latent to bytes; ``least`` are its thresholds if they are others (symbols.thresholds).
        In place, the latent becomes what the decoder has of it."""
        coder = entropy.Encoder(self.tables)
        coder.z(to_host(z[0]).astype(np.int32))

        least = self.thresholds if least is None else least

        def choose(index: Array, means: Array, own: Array) -> Array:
            return self._quantise(own - means, index, least)

        def code(index: Array, symbols: Array) -> None:
            coder.y(to_host(index), to_host(symbols))

        self.exact.walk(self.exact.features(z, (y.shape[2], y.shape[3])), y, choose, code)
        return coder.data()

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Array], quality: float
    ) -> NDArray[np.uint8]:
        """See backbones.LayerCodec."""
        (_, y), networks = self._read(data, size), self.at(quality)
        return self.reconstruct(networks, y, self.given(networks, prediction, size), size)

    def parse(self, data: bytes, size: tuple[int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """See backbones.LayerCodec; the latent, symbols plus means, is in units of 1 / MEAN_UNIT."""
        z, y = self._read(data, size)
        return z, to_host(cast(y[0] * MEAN_UNIT, "int32"))

    def _read(self, data: bytes, size: tuple[int, int]) -> tuple[NDArray[np.int32], Array]:
        """Bytes of a layer of ``size`` to the symbols of z [N, h, w] and the quantised latent [1, M, h, w]."""
        h, w = (-(-side // CELL) for side in size)
        channels, rows, columns = self.exact.z_shape(h, w)
        # symbols that are not coded take no bits
        coded = 0 if self.tables.skipped else self.networks.m * h * w
        decoder = entropy.Decoder(data, self.tables, rows * columns, coded)
        z = decoder.z(channels, rows, columns)
        # channels last, as networks take it
        y = self.engine.array(np.zeros((1, h, w, self.networks.m), np.float32).transpose(0, 3, 1, 2))

        def code(index: Array, _: Array) -> Array:
            return self.engine.array(decoder.y(to_host(index)))

        self.exact.walk(self.exact.features(self.engine.array(z[None]), (h, w)), y, None, code)
        return z, y

    def _cells(self) -> int:
        return CELLS[self.engine.device.type]

    def _rows(self, width: int) -> int:
        """Rows of y in a strip."""
        return max(1, self._cells() // -(-width // CELL))

    def _pixels(
        self, size: tuple[int, int], prediction: Iterable[Array], picture: NDArray[np.uint8] | None = None
    ) -> Iterator[flow.Strip]:
        """What ``analysis`` takes: a picture less its prediction, or the prediction less 1/2."""
        below = strips.Rows(prediction)
        for first, end in strips.spans(-(-size[0] // CELL), self._rows(size[1])):
            rows = slice(first * CELL, min(size[0], end * CELL))
            known = below.take(rows.stop - rows.start)
            if picture is None:
                yield known - 0.5, rows.stop == size[0]
                continue
            own = self.engine.array(picture[rows])
            x = cast(space(own).moveaxis(own, 2, 0)[None], "float32") / 255
            x -= known
            yield x, rows.stop == size[0]

    def _quantise(self, centred: Array, index: Array, least: Array) -> Array:
        """Symbols of y, less its means, from what they cost by their tables."""
        symbols = quantise(centred, index, least)
        symbols *= index >= self.tables.skipped
        return symbols

    def reconstruct(
        self, networks: Transforms, y: Array, given: Iterable[Array], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """The quantised latent and what ``given`` gives to the layer. Encoder and decoder both come here."""
        return self._shown(networks, flow.cut(y, self._rows(size[1])), given, size)

    @staticmethod
    def _shown(
        networks: Transforms, y: Iterator[flow.Strip], prediction: Iterable[Array], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        done, row, below = np.empty((*size, 3), np.uint8), 0, strips.Rows(prediction)
        for strip in synthesis(networks, y, size):
            rows = slice(row, row := row + strip.shape[2])
            done[rows] = to_bytes(strip + below.take(strip.shape[2]))
        return done


class LatentLayer(LeanLayer):
    """The same for enhancement layers: what is coded is the latent of the layer less that of its prediction."""

    def given(self, networks: Transforms, prediction: Iterable[Array], size: tuple[int, int]) -> Iterator[Array]:
        """Here to the latent of the prediction."""
        for strip, _ in analysis(networks, self._pixels(size, prediction)):
            yield strip

    def analysis(self, networks: Transforms, picture: NDArray[np.uint8], given: Iterable[Array]) -> Array:
        y, row = super().analysis(networks, picture, self._grey((picture.shape[0], picture.shape[1]))), 0
        for strip in given:
            y[:, :, row : (row := row + strip.shape[2])] -= strip[:, : y.shape[1]]
        return y

    def reconstruct(
        self, networks: Transforms, y: Array, given: Iterable[Array], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        known = strips.Rows(strip[:, -y.shape[1] :] for strip in given)
        whole = ((strip + known.take(strip.shape[2]), last) for strip, last in flow.cut(y, self._rows(size[1])))
        return self._shown(networks, whole, self._grey(size), size)

    def _grey(self, size: tuple[int, int]) -> Iterator[Array]:
        """Strips of the grey level that pictures are centred on."""
        grey = self.engine.array(np.full((1, 1, 1, 1), 0.5, np.float32))
        for first, end in strips.strip_spans(size, self.engine.device):
            yield space(grey).broadcast_to(grey, (1, 3, end - first, size[1]))


def tables_of(networks: EntropyNetworks, tensors: dict[str, Any]) -> entropy.Tables:
    """The tables among the tensors of a codec."""
    tables = (np.asarray(tensors[f"tables.{key}"]) for key in ("z", "y", "y_lengths"))
    return entropy.Tables(*tables, skipped=0 if networks.entropy == FACTORIZED else SKIPPED)


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Any]], engine: Engine, precision: str
) -> tuple[LeanLayer, LeanLayer, Predictor]:
    """The base codec, the codec of enhancement layers and LIFF of a set, out of the tensors of its parts; their
    dimensions are in ``spec``, its model.json. Enhancement layers with "transforms": "base" have those of the base
    codec; others are residuals in pixels, with their own. ``precision``: see weights.load. Raises KeyError, ValueError,
    TypeError or RuntimeError where something is missing or does not fit."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    tune = spec.get("tune", "psnr")
    base = engine.lean(spec["base"], tensors["base"], "float32")
    dimensions, own = dict(spec["residual"]), tensors["residual"]
    if (of := dimensions.pop("transforms", None)) not in (None, "base"):
        raise ValueError(f"residual: transforms of {of!r}")
    networks: EntropyNetworks
    if of is None:
        networks = transforms = engine.lean(dimensions, own, precision)
    else:
        networks = engine.lean_entropy(dimensions, own)
        transforms = base if precision == "float32" else engine.lean(spec["base"], tensors["base"], precision)
    return (
        LeanLayer(base, base, tables_of(base, tensors["base"]), engine, tune),
        (LeanLayer if of is None else LatentLayer)(networks, transforms, tables_of(networks, own), engine, tune),
        engine.lean_liff(spec["liff"], tensors["liff"], precision),
    )
