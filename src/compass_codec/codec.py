"""Where pictures, networks, symbols and bytes meet: encode and decode whole files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compass_codec import container, entropy, pictures
from compass_codec.errors import LimitError, OptionError, WeightsError
from compass_codec.networks import ImageCodec, level_of, quality_to_lambda
from compass_codec.weights import CodecWeights, Weights
from compass_codec.weights import load as load_weights

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_QUALITY = 60.0
SYMBOL_LIMIT = 2.0**20  # no honest symbol comes near; keeps garbage from overflowing integers
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
    """One image codec with its entropy coder: a centred picture to bytes and back."""

    def __init__(self, parts: CodecWeights, device: torch.device) -> None:
        self.codec, self.hyper, self.tables, self.device = parts.codec, parts.hyper, parts.tables, device

    def encode(self, x: Tensor, quality: float) -> tuple[bytes, Tensor]:
        """Picture [1, 3, H, W] centred on zero to (bytes, reconstruction of the same shape)."""
        z, symbols, index, means = self.analyse(x, quality)
        z_np, y_np, i_np = (t[0].cpu().numpy().astype(np.int64) for t in (z, symbols, index))
        data = entropy.encode(z_np, y_np, i_np, self.tables)
        return data, self.reconstruct(symbols, means, quality, (x.shape[-2], x.shape[-1]))

    def analyse(self, x: Tensor, quality: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Picture to the symbols of z and of y, and the scale indices and means of y."""
        y = self.codec.analysis(x, self._level(quality))
        z = self.codec.hyper_analysis(y).round().clamp(-SYMBOL_LIMIT, SYMBOL_LIMIT)
        index, means = self.hyper(z, (y.shape[-2], y.shape[-1]))
        centred = y - means
        symbols = torch.where(centred.abs() < DEAD_ZONE, 0.0, centred.round())
        return z, symbols.clamp(-SYMBOL_LIMIT, SYMBOL_LIMIT), index, means

    def decode(self, data: bytes, size: tuple[int, int], quality: float) -> Tensor:
        """Bytes to the picture [1, 3, height, width] that the encoder reconstructed."""
        _, symbols, means = self.parse(data, size)
        return self.reconstruct(symbols, means, quality, size)

    def parse(self, data: bytes, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes of a layer of ``size`` (height, width) to the symbols of z and of y and the means of y.

        Integer arithmetic throughout: the same on every device, whatever computes the pixels.
        """
        z_size, y_size = ImageCodec.hyper_size(size), ImageCodec.latent_size(size)
        n, m = self.codec.n, self.codec.m
        decoder = entropy.Decoder(data, self.tables, z_size[0] * z_size[1], m * y_size[0] * y_size[1])
        z = torch.from_numpy(decoder.z(n, *z_size))[None].to(self.device)
        index, means = self.hyper(z, y_size)
        symbols = torch.from_numpy(decoder.y(index[0].cpu().numpy()))[None].to(self.device)
        return z, symbols, means

    def reconstruct(self, symbols: Tensor, means: Tensor, quality: float, size: tuple[int, int]) -> Tensor:
        """Symbols and means of y to the picture, in floating point; encoder and decoder both come here."""
        y_hat = (symbols.float() + means).contiguous(memory_format=torch.channels_last)
        return self.codec.synthesis(y_hat, self._level(quality), size)

    def _level(self, quality: float) -> Tensor:
        return level_of(quality_to_lambda(quality))[None].to(self.device)


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

    def encode(self, image: Image.Image, scales: Sequence[float], quality: float = DEFAULT_QUALITY) -> Encoded:
        """Encode ``image`` at every scale factor. The factors are relative to each other and must not fall; the
        last layer is the picture itself. Quality 1..100. Raises OptionError, LimitError or PictureError."""
        scales = container.check_scales(scales)
        sizes = layer_sizes(image.size, scales)
        return self.encode_layers(pictures.pyramid(pictures.to_rgb(image), sizes), scales, quality)

    @torch.inference_mode()
    def encode_layers(
        self, layers: Sequence[np.ndarray], scales: Sequence[float], quality: float | Sequence[float]
    ) -> Encoded:
        """Encode pictures that were reduced elsewhere: uint8 [height, width, 3] each, smallest first. ``quality`` is
        one number for all layers or one for each."""
        scales = container.check_scales(scales)
        qualities = [check_quality(q) for q in (quality if isinstance(quality, Sequence) else [quality] * len(layers))]
        if not len(layers) == len(scales) == len(qualities):
            raise OptionError(f"{len(layers)} layers, {len(scales)} scale factors, {len(qualities)} qualities")
        if layers[-1].shape[0] * layers[-1].shape[1] > container.MAX_PIXELS:
            raise LimitError(f"more than {container.MAX_PIXELS} pixels")
        payloads: list[bytes] = []
        done: list[np.ndarray] = []
        for picture, q in zip(layers, qualities, strict=True):
            with float32_convolutions():
                x = self._to_tensor(picture)
                below = self._predict(done[-1] if done else None, (picture.shape[0], picture.shape[1]))
                codec = self.residual if done else self.base
                data, rec = codec.encode((x - below).contiguous(memory_format=torch.channels_last), q)
                done.append(self._to_bytes(below + rec))
            payloads.append(data)
        sizes = [(p.shape[1], p.shape[0]) for p in layers]
        return Encoded(container.write(self.model, sizes, scales, qualities, payloads), done)

    def decode(self, data: bytes, layer: int | None = None, max_pixels: int = container.MAX_PIXELS) -> Image.Image:
        """Decode one layer (default: the highest that ``data`` holds whole) as an RGB picture."""
        from PIL import Image

        header = container.read_header(data, max_pixels)
        last = container.pick(header, len(data), layer)
        *_, picture = self.decode_layers(data, header, last)
        return Image.fromarray(picture)

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
                prediction = self._predict(below, size)
                below = self._to_bytes(prediction + codec.decode(part, size, entry.quality))
            yield below

    def _predict(self, below: np.ndarray | None, size: tuple[int, int]) -> Tensor:
        """What a layer adds to: mid-grey for the base layer, LIFF's prediction from ``below`` for the others."""
        if below is None:
            return torch.full((1, 3, 1, 1), 0.5, device=self.device)
        return self.liff(self._to_tensor(below), size)

    def _to_tensor(self, picture: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(picture)).to(self.device).permute(2, 0, 1)[None]
        return (x.float() / 255).contiguous(memory_format=torch.channels_last)

    def _to_bytes(self, x: Tensor) -> np.ndarray:
        """Round to 8 bits. Layers are predicted from this, at both ends, so differences between devices in the
        last bit of a float cannot grow from layer to layer."""
        return (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


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
