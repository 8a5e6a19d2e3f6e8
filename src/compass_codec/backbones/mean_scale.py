"""The backbone "mean_scale", that of the paper: the mean-scale hyperprior for both image codecs, and LIFF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import entropy
from compass_codec.backbones.symbols import quantise, thresholds
from compass_codec.engines.torch_engine import TorchEngine, fill
from compass_codec.networks import strips
from compass_codec.networks.arrays import to_bytes, to_device, to_host, to_tensor
from compass_codec.networks.hyper import HyperDecoder
from compass_codec.networks.liff import LIFF
from compass_codec.networks.mean_scale import LAMBDAS, ImageCodec, quality_to_lambda
from compass_codec.networks.rates import level_of

PARTS = ("base", "residual", "liff")


class MeanScaleLayer:
    """A backbone.LayerCodec: an ImageCodec with its integer hyper-decoder and entropy coder."""

    searchable = False

    def __init__(self, codec: ImageCodec, tables: entropy.Tables, device: torch.device) -> None:
        self.codec, self.tables, self.device = codec, tables, device
        self.hyper = HyperDecoder(codec).to(device)
        self.tile = strips.TILE[device.type]
        self.thresholds = torch.from_numpy(thresholds(tables)).to(device)

    def lambda_of(self, quality: float) -> float:
        return quality_to_lambda(quality)

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Tensor]], quality: float
    ) -> tuple[bytes, NDArray[np.uint8]]:
        """See backbone.LayerCodec."""
        size = (picture.shape[0], picture.shape[1])
        predicted, known = strips.fork(prediction())
        analysed = self.analyse(residual_strips(picture, predicted, self.device), size, quality)
        shape = (self.codec.m, *ImageCodec.latent_size(size))
        y, index = np.empty(shape, np.int16), np.empty(shape, np.uint8)  # of a large picture, hundreds of MB

        def latents() -> Iterator[Tensor]:
            row = 0
            for symbols, part, means in analysed.latents:
                rows = slice(row, row := row + symbols.shape[2])
                yield symbols + means  # which a GPU goes on with while this is fetched
                y[:, rows], index[:, rows] = to_host(symbols[0].to(torch.int16)), to_host(part[0])

        done = self.reconstruct(latents(), known, quality, size)
        z = to_host(torch.cat(analysed.z, 2)[0]).astype(np.int32)
        return entropy.encode(z, y, index, self.tables), done

    def analyse(self, residual: Iterable[Tensor], size: tuple[int, int], quality: float) -> Analysis:
        """Strips of a layer less its prediction, of ``size`` in all, to the symbols of z and of y."""
        latent, hyper_latent = ImageCodec.latent_size(size), ImageCodec.hyper_size(size)
        level = self.level(quality)
        down = strips.Network(lambda x, _: self.codec.analysis(x, level), *self._cells(size, 16, 1))
        hyper_down = strips.Network(lambda y, _: self.codec.hyper_analysis(y), *self._cells(size, 4, 1, 64))
        for_hyper, for_symbols = strips.fork(strips.run(down, residual, size[0], latent))
        z: list[Tensor] = []

        def hyper_latents() -> Iterator[Tensor]:
            for strip in strips.run(hyper_down, for_hyper, latent[0], hyper_latent):
                z.append(strip.round().clamp(-entropy.SYMBOL_LIMIT, entropy.SYMBOL_LIMIT))
                yield z[-1]

        def latents() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            y = strips.Rows(for_symbols)
            for index, means in self.parameters(hyper_latents(), size):
                centred = y.take(means.shape[2]) - means
                yield self.quantise(centred, index), index, means

        return Analysis(z, latents())

    def quantise(self, centred: Tensor, index: Tensor) -> Tensor:
        """Symbols of y, less its means, from what they cost by their scale indices (uint8)."""
        symbols: Tensor = quantise(centred, index, self.thresholds)
        return symbols

    def parameters(self, z: Iterable[Tensor], size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Strips of z to strips of the scale indices (uint8) and means (float32) of y, for a layer of ``size``.

        Integer arithmetic throughout: the same on every device, whatever computes the pixels.
        """
        m = self.codec.m

        def both(part: Tensor, part_size: tuple[int, int]) -> Tensor:
            index, means = self.hyper(part, part_size)
            return torch.cat([index.to(means), means], 1)

        network = strips.Network(both, *self._cells(size, 1, 4, 64))
        for strip in strips.run(network, z, ImageCodec.hyper_size(size)[0], ImageCodec.latent_size(size)):
            yield strip[:, :m].to(torch.uint8), strip[:, m:]

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Tensor], quality: float
    ) -> NDArray[np.uint8]:
        """See backbone.LayerCodec."""
        _, y, _, means = self.parse(data, size)
        return self.rebuild(y, means, prediction, quality, size)

    def rebuild(
        self, y: NDArray[np.int32], means: Tensor, prediction: Iterable[Tensor], quality: float, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Symbols of y [M, h, w], their means [1, M, h, w] and strips of the prediction to the layer."""
        cells = strips.strip_spans(size, self.device, 16)
        y_hat = (to_device(y[None, :, a:b], self.device) + means[:, :, a:b] for a, b in cells)
        return self.reconstruct(y_hat, prediction, quality, size)

    def parse(
        self, data: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8], Tensor]:
        """Bytes of a layer of ``size`` (height, width) to the symbols of z [N, h, w] and of y [M, h, w], int32, and
        the scale indices [M, h, w], uint8, and means [1, M, h, w] of y."""
        z_size, y_size, m = ImageCodec.hyper_size(size), ImageCodec.latent_size(size), self.codec.m
        decoder = entropy.Decoder(data, self.tables, z_size[0] * z_size[1], m * y_size[0] * y_size[1])
        z = decoder.z(self.codec.n, *z_size)
        index, means = np.empty((m, *y_size), np.uint8), []
        heights = strips.spans(z_size[0], strips.STRIP[self.device.type] // 64)
        row = 0
        for part, mean in self.parameters((to_device(z[None, :, a:b], self.device) for a, b in heights), size):
            rows = slice(row, row := row + part.shape[2])
            index[:, rows] = to_host(part[0])
            means.append(mean)
        return z, decoder.y(index), index, means[0] if len(means) == 1 else torch.cat(means, 2)

    def reconstruct(
        self, y_hat: Iterable[Tensor], prediction: Iterable[Tensor], quality: float, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Strips of the quantised latent and of the prediction to the layer, uint8 [height, width, 3]; in floating
        point. Encoder and decoder both come here."""
        level, known = self.level(quality), strips.Rows(prediction)
        up = strips.Network(lambda y, part: self.codec.synthesis(y, level, part), *self._cells(size, 1, 16))
        done, row = np.empty((*size, 3), np.uint8), 0
        for strip in strips.run(up, y_hat, ImageCodec.latent_size(size)[0], size):
            rows = slice(row, row := row + strip.shape[2])
            done[rows] = to_bytes(strip.add_(known.take(strip.shape[2])))
        return done

    def _cells(self, size: tuple[int, int], cell_in: int, cell_out: int, pixels: int = 16) -> tuple[int, ...]:
        """Geometry of a network whose cells are ``pixels`` wide in a layer of ``size``, and that sees two around."""
        return cell_in, cell_out, 2, self.tile // pixels, strips.strip_rows(size[1], self.device) // pixels

    def level(self, quality: float) -> Tensor:
        return level_of(quality_to_lambda(quality), LAMBDAS)[None].to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Analysis:
    """A layer's symbols as they become known: strips of (symbols, scale indices, means) of y; ``z`` fills meanwhile."""

    z: list[Tensor]
    latents: Iterator[tuple[Tensor, Tensor, Tensor]]


def residual_strips(picture: NDArray[np.uint8], prediction: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Strips of ``picture``, uint8 [height, width, 3], less those of its prediction [1, 3, rows, width], in 0..1."""
    row = 0
    for strip in prediction:
        rows = slice(row, row := row + strip.shape[2])
        yield to_tensor(picture[rows], device).float().div_(255).sub_(strip)


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], engine: TorchEngine, precision: str
) -> tuple[MeanScaleLayer, MeanScaleLayer, LIFF]:
    """See backbone.Backbone. ``spec`` decides nothing here."""
    device = engine.device
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    base, residual = (_layer(tensors[part], device) for part in ("base", "residual"))
    liff = fill(lambda: LIFF(**LIFF.dimensions(tensors["liff"])), tensors["liff"], device)
    if (kind := getattr(torch, precision)) != torch.float32:
        liff.to(kind)
        residual.codec.pixels_in(kind)
    return base, residual, liff


def _layer(tensors: dict[str, Tensor], device: torch.device) -> MeanScaleLayer:
    tables = entropy.Tables(*(tensors[f"tables.{k}"].numpy() for k in ("z", "y", "y_lengths")))
    return MeanScaleLayer(fill(lambda: ImageCodec.like(tensors), tensors, device), tables, device)
