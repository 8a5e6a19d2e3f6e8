"""The backbone "mean_scale", that of the paper: the mean-scale hyperprior for both image codecs, and LIFF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compass_codec import entropy
from compass_codec.backbones.symbols import quantise, thresholds
from compass_codec.networks import strips
from compass_codec.networks.arrays import Array, cast, space, to_bytes, to_host
from compass_codec.networks.mean_scale_numbers import hyper_size, latent_size, quality_to_lambda

if TYPE_CHECKING:
    from compass_codec.engines import Engine, MeanScaleNetworks, Predictor

PARTS = ("base", "residual", "liff")


class MeanScaleLayer:
    """A backbone.LayerCodec: the networks of an image codec with their entropy coder."""

    searchable = False

    def __init__(self, networks: MeanScaleNetworks, tables: entropy.Tables, engine: Engine) -> None:
        self.networks, self.tables, self.engine = networks, tables, engine
        self.tile = strips.TILE[engine.device.type]

    @cached_property
    def thresholds(self) -> Array:
        """Those of the encoder's rounding, see symbols.thresholds."""
        return self.engine.array(thresholds(self.tables))

    def lambda_of(self, quality: float) -> float:
        return quality_to_lambda(quality)

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Array]], quality: float, keep: bool = False
    ) -> tuple[bytes, Callable[[], NDArray[np.uint8]]]:
        """See backbones.LayerCodec. Symbols and reconstruction are made in one pass."""
        size = (picture.shape[0], picture.shape[1])
        predicted, known = strips.fork(prediction())
        analysed = self.analyse(self._residual(picture, predicted), size, quality)
        shape = (self.networks.m, *latent_size(size))
        y, index = np.empty(shape, np.int16), np.empty(shape, np.uint8)  # of a large picture, hundreds of MB

        def latents() -> Iterator[Array]:
            row = 0
            for symbols, part, means in analysed.latents:
                rows = slice(row, row := row + symbols.shape[2])
                yield symbols + means  # which a GPU goes on with while this is fetched
                y[:, rows], index[:, rows] = to_host(cast(symbols[0], "int16")), to_host(part[0])

        done = self.reconstruct(latents(), known, quality, size)
        z = to_host(space(analysed.z[0]).concatenate(analysed.z, 2)[0]).astype(np.int32)
        return entropy.encode(z, y, index, self.tables), lambda: done

    def _residual(self, picture: NDArray[np.uint8], prediction: Iterable[Array]) -> Iterator[Array]:
        """Strips of ``picture``, uint8 [height, width, 3], less those of its prediction, in 0..1."""
        row = 0
        for strip in prediction:
            rows = slice(row, row := row + strip.shape[2])
            own = self.engine.array(picture[rows])
            x = cast(space(own).moveaxis(own, 2, 0)[None], "float32") / 255
            x -= strip
            yield x

    def analyse(self, residual: Iterable[Array], size: tuple[int, int], quality: float) -> Analysis:
        """Strips of a layer less its prediction, of ``size`` in all, to the symbols of z and of y."""
        latent, hyper_latent = latent_size(size), hyper_size(size)
        lam = quality_to_lambda(quality)
        down = strips.Network(lambda x, _: self.networks.analysis(x, lam), *self._cells(size, 16, 1))
        hyper_down = strips.Network(lambda y, _: self.networks.hyper_analysis(y), *self._cells(size, 4, 1, 64))
        for_hyper, for_symbols = strips.fork(strips.run(down, residual, size[0], latent))
        z: list[Array] = []

        def hyper_latents() -> Iterator[Array]:
            for strip in strips.run(hyper_down, for_hyper, latent[0], hyper_latent):
                z.append(space(strip).round(strip).clip(-entropy.SYMBOL_LIMIT, entropy.SYMBOL_LIMIT))
                yield z[-1]

        def latents() -> Iterator[tuple[Array, Array, Array]]:
            y = strips.Rows(for_symbols)
            for index, means in self.parameters(hyper_latents(), size):
                centred = y.take(means.shape[2]) - means
                yield self.quantise(centred, index), index, means

        return Analysis(z, latents())

    def quantise(self, centred: Array, index: Array) -> Array:
        """Symbols of y, less its means, from what they cost by their scale indices (uint8)."""
        return quantise(centred, index, self.thresholds)

    def parameters(self, z: Iterable[Array], size: tuple[int, int]) -> Iterator[tuple[Array, Array]]:
        """Strips of z to strips of the scale indices (uint8) and means (float32) of y, for a layer of ``size``.

        Integer arithmetic throughout: the same on every device, whatever computes the pixels.
        """
        m = self.networks.m

        def both(part: Array, part_size: tuple[int, int]) -> Array:
            index, means = self.networks.scales_and_means(part, part_size)
            return space(means).concatenate([cast(index, "float32"), means], 1)

        network = strips.Network(both, *self._cells(size, 1, 4, 64))
        for strip in strips.run(network, z, hyper_size(size)[0], latent_size(size)):
            yield cast(strip[:, :m], "uint8"), strip[:, m:]

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Array], quality: float
    ) -> NDArray[np.uint8]:
        """See backbones.LayerCodec."""
        _, y, _, means = self.parse(data, size)
        return self.rebuild(y, means, prediction, quality, size)

    def rebuild(
        self, y: NDArray[np.int32], means: Array, prediction: Iterable[Array], quality: float, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Symbols of y [M, h, w], their means [1, M, h, w] and strips of the prediction to the layer."""
        cells = strips.strip_spans(size, self.engine.device, 16)
        y_hat = (cast(self.engine.array(y[None, :, a:b]), "float32") + means[:, :, a:b] for a, b in cells)
        return self.reconstruct(y_hat, prediction, quality, size)

    def parse(
        self, data: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8], Array]:
        """Bytes of a layer of ``size`` (height, width) to the symbols of z [N, h, w] and of y [M, h, w], int32, and
        the scale indices [M, h, w], uint8, and means [1, M, h, w] of y."""
        z_size, y_size, m = hyper_size(size), latent_size(size), self.networks.m
        decoder = entropy.Decoder(data, self.tables, z_size[0] * z_size[1], m * y_size[0] * y_size[1])
        z = decoder.z(self.networks.n, *z_size)
        index, means = np.empty((m, *y_size), np.uint8), []
        heights = strips.spans(z_size[0], strips.STRIP[self.engine.device.type] // 64)
        row = 0
        for part, mean in self.parameters((self.engine.array(z[None, :, a:b]) for a, b in heights), size):
            rows = slice(row, row := row + part.shape[2])
            index[:, rows] = to_host(part[0])
            means.append(mean)
        return z, decoder.y(index), index, means[0] if len(means) == 1 else space(means[0]).concatenate(means, 2)

    def reconstruct(
        self, y_hat: Iterable[Array], prediction: Iterable[Array], quality: float, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Strips of the quantised latent and of the prediction to the layer, uint8 [height, width, 3]; in floating
        point. Encoder and decoder both come here."""
        lam, known = quality_to_lambda(quality), strips.Rows(prediction)
        up = strips.Network(lambda y, part: self.networks.synthesis(y, lam, part), *self._cells(size, 1, 16))
        done, row = np.empty((*size, 3), np.uint8), 0
        for strip in strips.run(up, y_hat, latent_size(size)[0], size):
            rows = slice(row, row := row + strip.shape[2])
            strip += known.take(strip.shape[2])
            done[rows] = to_bytes(strip)
        return done

    def _cells(self, size: tuple[int, int], cell_in: int, cell_out: int, pixels: int = 16) -> tuple[int, ...]:
        """Geometry of a network whose cells are ``pixels`` wide in a layer of ``size``, and that sees two around."""
        return cell_in, cell_out, 2, self.tile // pixels, strips.strip_rows(size[1], self.engine.device) // pixels


@dataclass(frozen=True)
class Analysis:
    """A layer's symbols as they become known: strips of (symbols, scale indices, means) of y; ``z`` fills meanwhile."""

    z: list[Array]
    latents: Iterator[tuple[Array, Array, Array]]


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Any]], engine: Engine, precision: str
) -> tuple[MeanScaleLayer, MeanScaleLayer, Predictor]:
    """See backbone.Backbone. ``spec`` decides nothing here."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")

    def layer(part: str, kind: str) -> MeanScaleLayer:
        tables = (np.asarray(tensors[part][f"tables.{key}"]) for key in ("z", "y", "y_lengths"))
        return MeanScaleLayer(engine.mean_scale(tensors[part], kind), entropy.Tables(*tables), engine)

    return layer("base", "float32"), layer("residual", precision), engine.liff(tensors["liff"], precision)
