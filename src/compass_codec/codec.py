"""Where pictures, networks, symbols and bytes meet: encode and decode whole files."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from compass_codec import DEFAULT_QUALITY, container, engines, pictures
from compass_codec.errors import DamagedError, LimitError, OptionError
from compass_codec.networks import strips
from compass_codec.networks.arrays import Array, space
from compass_codec.weights import ModelSet, Weights, choose
from compass_codec.weights import load as load_weights

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from typing_extensions import Buffer

    from compass_codec.engines import Engine
    from compass_codec.search import Progress

EFFORTS = range(10)
PRECISIONS = ("auto", "float32", "float16")
ONE_COLOUR = 1  # first byte of a layer of one colour; the layers of backbones begin with an even number


class Encoded:
    """A file, ``data``, and what its decoder will see, ``layers``."""

    def __init__(self, data: bytes, lower: list[NDArray[np.uint8]], top: Callable[[], NDArray[np.uint8]]) -> None:
        self.data, self._lower, self._top = data, lower, top

    @cached_property
    def layers(self) -> list[NDArray[np.uint8]]:
        """Of each layer uint8 [height, width, 3], smallest first. The top layer, which no other needs, is reconstructed
        when this is first asked for."""
        layers = [*self._lower, self._top()]
        self._top = lambda: layers[-1]  # the latent that it held is not needed any more
        return layers


def layer_sizes(size: tuple[int, int], scales: Sequence[float]) -> list[tuple[int, int]]:
    """(width, height) of every layer when the top layer has ``size``: round(side * s_k / s_K), at least 1."""
    return [(max(1, round(size[0] * s / scales[-1])), max(1, round(size[1] * s / scales[-1]))) for s in scales]


def check_quality(quality: Any) -> float:
    """Quality in steps of 0.01, as the file stores it. Raises OptionError outside 1..100."""
    try:
        number = float(quality)
    except (TypeError, ValueError) as e:
        raise OptionError(f"quality {quality!r} is not a number") from e
    if not 1 <= number <= 100:
        raise OptionError(f"quality {number:g}; it goes from 1 to 100")
    return container.stored_quality(number)


def one_colour(picture: NDArray[np.uint8]) -> bytes | None:
    """The bytes of a layer, uint8 [height, width, 3], as one colour if no sample is more than 1 away from it. Networks
    are trained on photographs and miss strong flat colours."""
    low, high = picture.min(0).min(0).astype(int), picture.max(0).max(0).astype(int)  # whole rows first: it is quick
    return bytes([ONE_COLOUR, *((low + high) // 2).tolist()]) if (high - low).max() <= 2 else None


def of_one_colour(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The layer of ``size`` (height, width) that ``one_colour`` made these bytes of. Raises DamagedError."""
    if len(data) != 4:
        raise DamagedError(f"a layer of one colour has 4 bytes, not {len(data)}")
    return np.full((*size, 3), np.frombuffer(data, np.uint8)[1:])


def check_layer_weights(weights: Sequence[float], count: int) -> list[float]:
    """Raises OptionError unless there are ``count`` finite numbers above 0."""
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise OptionError(f"layer weights {', '.join(map(str, weights))}; each of {count} layers needs one above 0")
    return list(weights)


class Codec:
    """The whole codec with its weights, one engine and one device.

    >>> codec = Codec.load(device="cpu")
    >>> data = codec.encode(image, scales=[1, 2, 3.2], quality=60).data
    >>> codec.decode(data, layer=1).size
    """

    def __init__(self, loaded: Weights, engine: Engine, asked: str) -> None:
        self.engine, self.asked, self.device = engine, asked, engine.device
        self.model, self.precision, self.folder = loaded.identity, loaded.precision, loaded.folder
        self.base, self.residual, self.predictor = loaded.base, loaded.residual, loaded.predictor

    @classmethod
    def load(
        cls,
        device: str = "auto",
        weights: Path | None = None,
        precision: str = "auto",
        model: str | None = None,
        engine: str = "auto",
    ) -> Self:
        """Load the set of weights in folder ``weights``, or the one whose profile or identity is ``model`` (default:
        the installed set of the default profile; see weights.choose) to "cpu", "cuda" or, with "auto", to the GPU if
        there is one. ``precision`` of what computes the pixels above the base layer: "float32", "float16" or
        "auto", which is :func:`fastest`. ``engine``: "torch", "onnx" or "auto", see engines.choose.
        Raises WeightsError, and OptionError for a device or an engine that is not there."""
        return cls._load(_wanted(device, weights, precision, model, engine))

    @classmethod
    def _load(cls, wanted: Kept) -> Self:
        engine = engines.make(wanted.engine, wanted.device)
        return cls(load_weights(wanted.found, engine, wanted.precision), engine, wanted.asked)

    def of(self, model: str) -> Codec:
        """The codec of the set with the identity ``model``, on the same device and in the same precision: this one, or
        one found as ``shared`` does. Raises WeightsError."""
        if model == self.model:
            return self
        precision = "auto" if self.engine.name == "onnx" else self.precision
        return shared(str(self.device), None, precision, model, self.asked)

    def encode(
        self,
        image: Image.Image | NDArray[np.uint8],
        scales: Sequence[float],
        quality: float = DEFAULT_QUALITY,
        effort: int = 0,
    ) -> Encoded:
        """Encode ``image``, or an array of its pixels (see pictures.as_image), at every scale factor, its alpha too. A
        profile for grey or CMYK is applied, one for RGB is left to the caller. The factors are relative to each other
        and must not fall; the last layer is the picture itself. Quality 1..100, effort 0..9. Raises OptionError,
        LimitError or PictureError."""
        scales = container.check_scales(scales)
        source = pictures.split(pictures.as_image(image))
        layers, alphas = pictures.pyramid_alpha(source, layer_sizes(source.image.size, scales))
        alpha = {k: pictures.alpha_to_bytes(plane) for k, plane in enumerate(alphas)}
        return self.encode_layers(layers, scales, quality, effort, sections=container.Sections(alpha=alpha))

    def encode_layers(
        self,
        layers: Sequence[NDArray[np.uint8]],
        scales: Sequence[float],
        quality: float | Sequence[float],
        effort: int = 0,
        time_budget: float | None = None,
        progress: Progress | None = None,
        layer_weights: Sequence[float] | None = None,
        sections: container.Sections | None = None,
    ) -> Encoded:
        """Encode pictures that were reduced elsewhere: uint8 [height, width, 3] each, smallest first. ``quality`` is
        one number for all layers or one for each. With an ``effort`` of 1 to 9 a search lowers rate and distortion
        together, for about ``time_budget`` seconds at most, where the cost of each layer counts as much as
        ``layer_weights`` (above 0) say; see search.improve, also for ``progress``. ``sections`` go into the file.
        Raises OptionError, LimitError or PictureError."""
        started = time.monotonic()
        layers, scales = pictures.check_layers(layers), container.check_scales(scales)
        each = quality if np.ndim(quality) and not isinstance(quality, (str, bytes)) else [quality] * len(layers)
        qualities = [check_quality(q) for q in each]  # type: ignore[union-attr]
        if not len(layers) == len(scales) == len(qualities):
            raise OptionError(f"{len(layers)} layers, {len(scales)} scale factors, {len(qualities)} qualities")
        if effort not in EFFORTS:
            raise OptionError(f"effort {effort}; it goes from 0 to 9")
        if effort and not (self.base.searchable and self.residual.searchable):
            raise OptionError(f"effort {effort}; there is no search for weights {self.model}, only effort 0")
        if effort and self.engine.name == "onnx":  # which has no gradients
            if self.asked != "auto" or not engines.installed("torch"):
                raise OptionError(f"effort {effort} needs {engines.INSTALL['torch']}, and --engine auto or torch")
            searching = shared(str(self.device), self.folder, engine="torch")
            return searching.encode_layers(
                layers, scales, quality, effort, time_budget, progress, layer_weights, sections
            )
        layer_weights = check_layer_weights(
            [1.0] * len(layers) if layer_weights is None else layer_weights, len(layers)
        )
        if layers[-1].shape[0] * layers[-1].shape[1] > container.MAX_PIXELS:
            raise LimitError(f"more than {container.MAX_PIXELS} pixels")
        deadline = math.inf if time_budget is None else started + time_budget
        payloads: list[bytes] = []
        lower: list[NDArray[np.uint8]] = []
        top: Callable[[], NDArray[np.uint8]] | None = None
        with self.engine.computing():
            if effort:
                from compass_codec import search

                found = search.improve(self, layers, qualities, effort, deadline, progress, layer_weights)
                payloads, seen = [data for data, _ in found], [picture for _, picture in found]
                lower, top = seen[:-1], lambda: seen[-1]
            else:
                for k, (picture, q) in enumerate(zip(layers, qualities, strict=True)):
                    if top:
                        lower.append(top())
                        top = None  # with the latent that it holds
                    data, top = self.encode_layer(picture, lower[-1] if lower else None, q, k < len(layers) - 1)
                    payloads.append(data)
        assert top is not None  # there is a layer
        sizes = [(p.shape[1], p.shape[0]) for p in layers]
        return Encoded(container.write(self.model, sizes, scales, qualities, payloads, sections), lower, top)

    def encode_layer(
        self, picture: NDArray[np.uint8], below: NDArray[np.uint8] | None, quality: float, keep: bool = False
    ) -> tuple[bytes, Callable[[], NDArray[np.uint8]]]:
        """A layer, uint8 [height, width, 3], given what the decoder will see of the one below it: its bytes, and what
        reconstructs what the decoder will see of it. For ``keep`` see backbones.LayerCodec.encode."""
        if (flat := self.flat(picture)) is not None:
            data, seen = flat
            return data, lambda: seen
        codec = self.base if below is None else self.residual
        size = (picture.shape[0], picture.shape[1])
        data, reconstruct = codec.encode(picture, lambda: self.predict(below, size), quality, keep)

        def computed() -> NDArray[np.uint8]:
            with self.engine.computing():
                return reconstruct()

        return data, computed

    @staticmethod
    def flat(picture: NDArray[np.uint8]) -> tuple[bytes, NDArray[np.uint8]] | None:
        """The same of a layer that is coded as one colour."""
        data = one_colour(picture)
        return None if data is None else (data, of_one_colour(data, (picture.shape[0], picture.shape[1])))

    def decode(self, data: Buffer, layer: int | None = None, max_pixels: int = container.MAX_PIXELS) -> Image.Image:
        """Decode one layer (default: the highest that ``data`` holds whole) as an RGB picture, RGBA if it has alpha.
        The file may be of another set of weights than this codec, if that is found; see ``of``."""
        data = container.as_bytes(data)
        header = container.read_header(data, max_pixels)
        last = container.pick(header, len(data), layer)
        coded = container.alpha(header, data, last)
        size = (header.layers[last].width, header.layers[last].height)
        alpha = pictures.alpha_from_bytes(coded, size) if coded else None
        *_, picture = self.decode_layers(data, header, last)
        return pictures.with_alpha(picture, alpha)

    def decode_layers(self, data: Buffer, header: container.Header, last: int) -> Iterator[NDArray[np.uint8]]:
        """Decode layers 0 to ``last`` in turn, each as uint8 [height, width, 3]. Raises DamagedError on the way,
        TruncatedError, FormatError, and WeightsError if the weights that the file was made with are not found."""
        if header.model != self.model:
            yield from self.of(header.model).decode_layers(data, header, last)
            return
        data = container.as_bytes(data)
        below: NDArray[np.uint8] | None = None
        for k, entry in enumerate(header.layers[: last + 1]):
            size = (entry.height, entry.width)
            part = container.payload(header, data, k)
            codec = self.base if below is None else self.residual
            if part[0] == ONE_COLOUR:
                below = of_one_colour(part, size)
            else:
                with self.engine.computing():
                    below = codec.decode(part, size, self.predict(below, size), entry.quality)
            yield below

    def predict(self, below: NDArray[np.uint8] | None, size: tuple[int, int]) -> Iterator[Array]:
        """Strips [1, 3, rows, width] of what a layer of ``size`` adds to: mid-grey for the base layer, for the others
        what the predictor makes of ``below``."""
        low = self.engine.array(np.full((1, 1, 3), 0.5, np.float32) if below is None else below)
        low = space(low).moveaxis(low, 2, 0)[None]
        for rows in strips.strip_spans(size, self.device):
            if below is None:
                yield space(low).broadcast_to(low, (1, 3, rows[1] - rows[0], size[1]))
            else:
                yield self.predictor.rows(low, size, rows)


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" (one of several: "cuda:1") to a device. Raises OptionError for any other, and if a GPU
    is asked for and not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as e:
        raise OptionError(f"device {name!r}; there are auto, cpu and cuda") from e
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r}; there are auto, cpu and cuda")
    known = torch.cuda.is_available() and (device.index or 0) < max(1, torch.cuda.device_count())
    if device.type == "cuda" and not known:
        raise OptionError(f"--device {name}: PyTorch sees no such CUDA device here")
    return device


def fastest(device: torch.device) -> str:
    """The precision that is fastest there: "float16" on a GPU and on a CPU with matrix units that take it (AMX-FP16),
    otherwise "float32". Without such units a CPU is no faster with 16 bits, and may take twenty times as long."""
    import torch

    if device.type != "cpu":
        return "float16"
    ask = getattr(torch.cpu, "get_capabilities", None)  # which older PyTorch does not have
    here = ask() if ask else {}
    return "float16" if here.get("amx_fp16") else "float32"


def shared(
    device: str = "auto",
    folder: Path | None = None,
    precision: str = "auto",
    model: str | None = None,
    engine: str = "auto",
) -> Codec:
    """A codec that is loaded once in a process, of the set that weights.choose takes. The few used last are kept."""
    wanted = _wanted(device, folder, precision, model, engine)
    with _loading:  # else two threads would load the same
        return _loaded(wanted)


@dataclass(frozen=True)
class Kept:
    """The key of a loaded codec: the identity of its set, engine, device and precision; the folder does not count.
    ``asked`` is the engine asked for, which decides about files of other sets."""

    found: ModelSet = field(compare=False)
    identity: str
    engine: str
    asked: str
    device: str
    precision: str


def _wanted(device: str, folder: Path | None, precision: str, model: str | None, asked: str) -> Kept:
    if precision not in PRECISIONS:
        raise OptionError(f"precision {precision!r}; there are {', '.join(PRECISIONS)}")
    found = choose(None if folder is None else Path(folder), model)
    engine = engines.choose(asked, found.backbone, device, precision)
    if engine == "onnx":
        return Kept(found, found.identity, engine, asked, "cpu", "float32")
    chosen = choose_device(device)
    return Kept(
        found, found.identity, engine, asked, str(chosen), fastest(chosen) if precision == "auto" else precision
    )


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _loaded(wanted: Kept) -> Codec:
    return Codec._load(wanted)
