"""Where pictures, networks, symbols and bytes meet: encode and decode whole files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compass_codec import container, entropy, pictures, strips
from compass_codec.errors import LimitError, OptionError, WeightsError
from compass_codec.networks import ImageCodec, level_of, quality_to_lambda
from compass_codec.weights import CodecWeights, Weights
from compass_codec.weights import load as load_weights

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_QUALITY = 60.0
EFFORTS = range(10)
# A latent this close to its mean becomes 0 rather than 1 or -1: the bits saved are worth more than the error
# (1.4 % BD-rate on training pictures; the decoder does not care).
DEAD_ZONE = 0.6


@dataclass(frozen=True)
class Encoded:
    """A file and what its decoder will see: ``layers`` are uint8 [height, width, 3], smallest first."""

    data: bytes
    layers: list[np.ndarray]


def layer_sizes(size: tuple[int, int], scales: Sequence[float]) -> list[tuple[int, int]]:
    """(width, height) of every layer when the top layer has ``size``: round(side * s_k / s_K), at least 1."""
    return [(max(1, round(size[0] * s / scales[-1])), max(1, round(size[1] * s / scales[-1]))) for s in scales]


def check_quality(quality: float) -> float:
    """Quality in steps of 0.01, as the file stores it. Raises OptionError outside 1..100."""
    if not 1 <= quality <= 100:
        raise OptionError(f"quality {quality:g}; it goes from 1 to 100")
    return round(quality * 100) / 100


class LayerCodec:
    """One image codec with its entropy coder: a layer less its prediction to bytes and back, a strip at a time."""

    def __init__(self, parts: CodecWeights, device: torch.device) -> None:
        self.codec, self.hyper, self.tables, self.device = parts.codec, parts.hyper, parts.tables, device
        self.tile = strips.TILE[device.type]

    def encode(self, picture: np.ndarray, prediction: Iterable[Tensor], quality: float) -> tuple[bytes, np.ndarray]:
        """A layer, uint8 [height, width, 3], and what is known of it, in strips [1, 3, rows, width] or broadcast to
        them, to its bytes and what the decoder will see."""
        size = (picture.shape[0], picture.shape[1])
        predicted, known = tee(prediction)
        analysed = self.analyse(residual_strips(picture, predicted, self.device), size, quality)
        shape = (self.codec.m, *ImageCodec.latent_size(size))
        y, index = np.empty(shape, np.int32), np.empty(shape, np.uint8)

        def latents() -> Iterator[Tensor]:
            row = 0
            for symbols, part, means in analysed.latents:
                rows = slice(row, row := row + symbols.shape[2])
                y[:, rows], index[:, rows] = symbols[0].cpu().numpy(), part[0].cpu().numpy()
                yield symbols + means

        done = self.reconstruct(latents(), known, quality, size)
        z = torch.cat(analysed.z, 2)[0].cpu().numpy().astype(np.int32)
        return entropy.encode(z, y, index, self.tables), done

    def analyse(self, residual: Iterable[Tensor], size: tuple[int, int], quality: float) -> Analysis:
        """Strips of a layer less its prediction, of ``size`` in all, to the symbols of z and of y."""
        latent, hyper_latent = ImageCodec.latent_size(size), ImageCodec.hyper_size(size)
        level = self.level(quality)
        down = strips.Network(lambda x, _: self.codec.analysis(x, level), *self._cells(size, 16, 1))
        hyper_down = strips.Network(lambda y, _: self.codec.hyper_analysis(y), *self._cells(size, 4, 1, 64))
        for_hyper, for_symbols = tee(strips.run(down, residual, size[0], latent))
        z: list[Tensor] = []

        def hyper_latents() -> Iterator[Tensor]:
            for strip in strips.run(hyper_down, for_hyper, latent[0], hyper_latent):
                z.append(strip.round().clamp(-entropy.SYMBOL_LIMIT, entropy.SYMBOL_LIMIT))
                yield z[-1]

        def latents() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            y = strips.Rows(for_symbols)
            for index, means in self.parameters(hyper_latents(), size):
                centred = y.take(means.shape[2]) - means
                symbols = torch.where(centred.abs() < DEAD_ZONE, 0.0, centred.round())
                yield symbols.clamp(-entropy.SYMBOL_LIMIT, entropy.SYMBOL_LIMIT), index, means

        return Analysis(z, latents())

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

    def decode(self, data: bytes, size: tuple[int, int], prediction: Iterable[Tensor], quality: float) -> np.ndarray:
        """Bytes, and what is known of the layer, to the layer: uint8 [height, width, 3] of ``size``."""
        _, y, _, means = self.parse(data, size)
        return self.rebuild(y, means, prediction, quality, size)

    def rebuild(
        self, y: np.ndarray, means: Tensor, prediction: Iterable[Tensor], quality: float, size: tuple[int, int]
    ) -> np.ndarray:
        """Symbols of y [M, h, w], their means [1, M, h, w] and strips of the prediction to the layer."""
        cells = strips.strip_spans(size, self.device, 16)
        y_hat = (torch.from_numpy(y[None, :, a:b]).to(self.device) + means[:, :, a:b] for a, b in cells)
        return self.reconstruct(y_hat, prediction, quality, size)

    def parse(self, data: bytes, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
        """Bytes of a layer of ``size`` (height, width) to the symbols of z [N, h, w] and of y [M, h, w], int32, and
        the scale indices [M, h, w], uint8, and means [1, M, h, w] of y."""
        z_size, y_size, m = ImageCodec.hyper_size(size), ImageCodec.latent_size(size), self.codec.m
        decoder = entropy.Decoder(data, self.tables, z_size[0] * z_size[1], m * y_size[0] * y_size[1])
        z = decoder.z(self.codec.n, *z_size)
        index, means = np.empty((m, *y_size), np.uint8), []
        heights = strips.spans(z_size[0], strips.STRIP[self.device.type] // 64)
        row = 0
        for part, mean in self.parameters(
            (torch.from_numpy(z[None, :, a:b]).to(self.device) for a, b in heights), size
        ):
            rows = slice(row, row := row + part.shape[2])
            index[:, rows] = part[0].cpu().numpy()
            means.append(mean)
        return z, decoder.y(index), index, means[0] if len(means) == 1 else torch.cat(means, 2)

    def reconstruct(
        self, y_hat: Iterable[Tensor], prediction: Iterable[Tensor], quality: float, size: tuple[int, int]
    ) -> np.ndarray:
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
        """Geometry of a network whose cells are ``pixels`` wide in a layer of ``size``; all four see 2 cells around."""
        return cell_in, cell_out, 2, self.tile // pixels, strips.strip_rows(size[1], self.device) // pixels

    def level(self, quality: float) -> Tensor:
        return level_of(quality_to_lambda(quality))[None].to(self.device)


@dataclass(frozen=True)
class Analysis:
    """A layer's symbols as they become known: strips of (symbols, scale indices, means) of y; ``z`` fills meanwhile."""

    z: list[Tensor]
    latents: Iterator[tuple[Tensor, Tensor, Tensor]]


def residual_strips(picture: np.ndarray, prediction: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Strips of ``picture``, uint8 [height, width, 3], less those of its prediction [1, 3, rows, width], in 0..1."""
    row = 0
    for strip in prediction:
        rows = slice(row, row := row + strip.shape[2])
        yield to_tensor(picture[rows], device).float().div_(255).sub_(strip)


def to_tensor(picture: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [height, width, 3] to uint8 [1, 3, height, width]; on the CPU a view."""
    return torch.from_numpy(np.ascontiguousarray(picture)).to(device).permute(2, 0, 1)[None]


def to_bytes(x: Tensor) -> np.ndarray:
    """[1, 3, height, width] in 0..1 to uint8 [height, width, 3]. Layers are predicted from this, at both ends, so
    differences between devices in the last bit of a float cannot grow from layer to layer."""
    return x[0].clamp(0, 1).mul_(255).round_().byte().permute(1, 2, 0).cpu().numpy()


class Codec:
    """The whole codec with its weights on one device.

    >>> codec = Codec.load(device="cpu")
    >>> data = codec.encode(image, scales=[1, 2, 3.2], quality=60).data
    >>> codec.decode(data, layer=1).size
    """

    def __init__(self, loaded: Weights, device: torch.device) -> None:
        self.device, self.model = device, loaded.identity
        self.base, self.residual = LayerCodec(loaded.base, device), LayerCodec(loaded.residual, device)
        self.liff = loaded.liff

    @classmethod
    def load(cls, device: str = "auto", weights: Path | None = None) -> Codec:
        """Load the weights in folder ``weights`` (default: those installed) to "cpu", "cuda" or, with "auto", to
        the GPU if there is one. Raises WeightsError, and OptionError for a device that is not there."""
        chosen = choose_device(device)
        return cls(load_weights(weights, chosen), chosen)

    def encode(
        self, image: Image.Image, scales: Sequence[float], quality: float = DEFAULT_QUALITY, effort: int = 0
    ) -> Encoded:
        """Encode ``image`` at every scale factor, its alpha too. The factors are relative to each other and must not
        fall; the last layer is the picture itself. Quality 1..100, effort 0..9. Raises OptionError, LimitError or
        PictureError."""
        scales = container.check_scales(scales)
        layers, alphas = pictures.pyramid_alpha(pictures.split(image), layer_sizes(image.size, scales))
        encoded = self.encode_layers(layers, scales, quality, effort)
        alpha = {k: pictures.alpha_to_bytes(plane) for k, plane in enumerate(alphas)}
        return replace(encoded, data=container.attach(encoded.data, container.Sections(alpha=alpha)))

    @torch.inference_mode()
    def encode_layers(
        self,
        layers: Sequence[np.ndarray],
        scales: Sequence[float],
        quality: float | Sequence[float],
        effort: int = 0,
        time_budget: float | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Encoded:
        """Encode pictures that were reduced elsewhere: uint8 [height, width, 3] each, smallest first. ``quality`` is
        one number for all layers or one for each. With an ``effort`` of 1 to 9 a search lowers rate and distortion
        together, for about ``time_budget`` seconds at most; see search.improve, also for ``progress``."""
        started = time.monotonic()
        scales = container.check_scales(scales)
        qualities = [check_quality(q) for q in (quality if isinstance(quality, Sequence) else [quality] * len(layers))]
        if not len(layers) == len(scales) == len(qualities):
            raise OptionError(f"{len(layers)} layers, {len(scales)} scale factors, {len(qualities)} qualities")
        if effort not in EFFORTS:
            raise OptionError(f"effort {effort}; it goes from 0 to 9")
        if layers[-1].shape[0] * layers[-1].shape[1] > container.MAX_PIXELS:
            raise LimitError(f"more than {container.MAX_PIXELS} pixels")
        payloads: list[bytes] = []
        done: list[np.ndarray] = []
        for picture, q in zip(layers, qualities, strict=True):
            with float32_convolutions():
                prediction = self.predict(done[-1] if done else None, (picture.shape[0], picture.shape[1]))
                data, seen = (self.residual if done else self.base).encode(picture, prediction, q)
            payloads.append(data)
            done.append(seen)
        if effort:
            from compass_codec import search

            deadline = math.inf if time_budget is None else started + time_budget
            coded = list(zip(payloads, done, strict=True))
            with float32_convolutions():
                found = search.improve(self, layers, qualities, coded, effort, deadline, progress)
            payloads, done = [layer.data for layer in found], [layer.seen for layer in found]
        sizes = [(p.shape[1], p.shape[0]) for p in layers]
        return Encoded(container.write(self.model, sizes, scales, qualities, payloads), done)

    def decode(self, data: bytes, layer: int | None = None, max_pixels: int = container.MAX_PIXELS) -> Image.Image:
        """Decode one layer (default: the highest that ``data`` holds whole) as an RGB picture, RGBA if it has alpha."""
        header = container.read_header(data, max_pixels)
        last = container.pick(header, len(data), layer)
        coded = container.sections(header, data, last).alpha.get(last)
        size = (header.layers[last].width, header.layers[last].height)
        alpha = pictures.alpha_from_bytes(coded, size) if coded else None
        *_, picture = self.decode_layers(data, header, last)
        return pictures.with_alpha(picture, alpha)

    def decode_layers(self, data: bytes, header: container.Header, last: int) -> Iterator[np.ndarray]:
        """Decode layers 0 to ``last`` in turn, each as uint8 [height, width, 3]. Raises DamagedError on the way,
        TruncatedError, and WeightsError if the file was made with other weights."""
        if header.model != self.model:
            raise WeightsError(f"made with weights {header.model}; the weights here are {self.model}")
        below: np.ndarray | None = None
        for k, entry in enumerate(header.layers[: last + 1]):
            size = (entry.height, entry.width)
            part = container.payload(header, data, k)
            codec = self.base if below is None else self.residual
            with torch.inference_mode(), float32_convolutions():
                below = codec.decode(part, size, self.predict(below, size), entry.quality)
            yield below

    def predict(self, below: np.ndarray | None, size: tuple[int, int]) -> Iterator[Tensor]:
        """Strips [1, 3, rows, width] of what a layer of ``size`` adds to: mid-grey for the base layer, LIFF's
        prediction from ``below`` for the others."""
        for rows in strips.strip_spans(size, self.device):
            if below is None:
                yield torch.full((1, 3, 1, 1), 0.5, device=self.device).expand(1, 3, rows[1] - rows[0], size[1])
            else:
                yield self.liff.rows(to_tensor(below, self.device), size, rows)


def float32_convolutions() -> AbstractContextManager[None]:
    """Keep CUDA from computing convolutions in TF32, whose 10 bits show in the pixels; nothing changes on a CPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" to a device. Raises OptionError if a GPU is asked for and not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: PyTorch sees no CUDA device here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@lru_cache(maxsize=4)
def shared(device: str = "auto", folder: Path | None = None) -> Codec:
    """A codec that is loaded once in a process."""
    return Codec.load(device, folder)
