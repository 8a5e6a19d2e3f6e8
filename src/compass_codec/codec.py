"""Where pictures, networks, symbols and bytes meet: encode and decode whole files."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compass_codec import container, filters, pictures, strips
from compass_codec.arrays import to_bytes, to_tensor
from compass_codec.errors import FormatError, LimitError, OptionError
from compass_codec.layer import LayerCodec
from compass_codec.liff import combine
from compass_codec.networks import quality_to_lambda
from compass_codec.pictures import squared_error
from compass_codec.side import FULL_GAIN, Side
from compass_codec.weights import ModelSet, Weights, choose
from compass_codec.weights import load as load_weights

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Buffer

DEFAULT_QUALITY = 60.0
EFFORTS = range(10)
# Gains of LIFF in sixteenths. What predicts best is not quite what costs least, so that without trying only a gain far
# below the full one is taken: at most this. An effort tries to lower it in this step.
FAR_BELOW, GAIN_STEP = 8, 4
# Another strength of restoration is tried where it should lower the cost by this share. It takes a decoding.
WORTH = 1 / 400


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
    try:
        number = float(quality)
    except (TypeError, ValueError) as e:
        raise OptionError(f"quality {quality!r} is no number") from e
    if not 1 <= number <= 100:
        raise OptionError(f"quality {number:g}; it goes from 1 to 100")
    return round(number * 100) / 100


def check_layer_weights(weights: Sequence[float], count: int) -> list[float]:
    """Raises OptionError unless there are ``count`` finite numbers above 0."""
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise OptionError(f"layer weights {', '.join(map(str, weights))}; each of {count} layers needs one above 0")
    return list(weights)


def best_gain(picture: np.ndarray, interpolated: Tensor, added: Tensor) -> float:
    """The multiple of ``added`` that takes ``interpolated``, both [1, 3, height, width] in 0..1, nearest to
    ``picture``, uint8 [height, width, 3]; 1 where nothing is added."""
    energy = float(added.square().sum())
    if not energy:
        return 1.0
    missing = to_tensor(picture, added.device).float().div_(255).sub_(interpolated)
    return float(missing.mul_(added).sum()) / energy


@dataclass(frozen=True)
class CodedLayer:
    """One layer: its bytes, what the decoder will see (uint8 [height, width, 3]), its side information, and
    R + lambda * 255^2 * MSE times its pixels, in bits."""

    data: bytes
    seen: np.ndarray
    side: Side
    cost: float


def rounded(prediction: Iterable[Tensor], size: tuple[int, int]) -> np.ndarray:
    """Strips of a prediction to the layer that is nothing else: uint8 [height, width, 3] of ``size``."""
    done, row = np.empty((*size, 3), np.uint8), 0
    for strip in prediction:
        rows = slice(row, row := row + strip.shape[2])
        done[rows] = to_bytes(strip)
    return done


class Codec:
    """The whole codec with its weights on one device.

    >>> codec = Codec.load(device="cpu")
    >>> data = codec.encode(image, scales=[1, 2, 3.2], quality=60).data
    >>> codec.decode(data, layer=1).size
    """

    adaptive = True  # choose side information; what is measured against the codec may not

    def __init__(self, loaded: Weights, device: torch.device) -> None:
        self.device, self.model, self.precision = device, loaded.identity, loaded.precision
        self.base, self.residual = LayerCodec(loaded.base, device), LayerCodec(loaded.residual, device)
        self.liff = loaded.liff

    @classmethod
    def load(
        cls, device: str = "auto", weights: Path | None = None, precision: str = "auto", model: str | None = None
    ) -> Codec:
        """Load the set of weights in folder ``weights``, or the one whose profile or identity is ``model`` (default:
        the installed set of the default profile; see weights.choose) to "cpu", "cuda" or, with "auto", to the GPU if
        there is one. ``precision`` of what computes the pixels above the base layer: "float32", "float16",
        "bfloat16", or "auto", which is :func:`fastest`.
        Raises WeightsError, and OptionError for a device that is not there."""
        chosen = choose_device(device)
        return cls(load_weights(choose(weights, model), chosen, choose_precision(precision, chosen)), chosen)

    def of(self, model: str) -> Codec:
        """The codec of the set with the identity ``model``, on the same device and in the same precision: this one, or
        one found as ``shared`` does. Raises WeightsError."""
        return self if model == self.model else shared(self.device.type, None, self.precision, model)

    def encode(
        self,
        image: Image.Image | np.ndarray,
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
        progress: Callable[[int, float, list[CodedLayer]], None] | None = None,
        layer_weights: Sequence[float] | None = None,
    ) -> Encoded:
        """Encode pictures that were reduced elsewhere: uint8 [height, width, 3] each, smallest first. ``quality`` is
        one number for all layers or one for each. With an ``effort`` of 1 to 9 a search lowers rate and distortion
        together, for about ``time_budget`` seconds at most, where the cost of each layer counts as much as
        ``layer_weights`` (above 0) say; see search.improve, also for ``progress``."""
        started = time.monotonic()
        scales = container.check_scales(scales)
        qualities = [
            check_quality(q)
            for q in (quality if isinstance(quality, (Sequence, np.ndarray)) else [quality] * len(layers))
        ]
        if not len(layers) == len(scales) == len(qualities):
            raise OptionError(f"{len(layers)} layers, {len(scales)} scale factors, {len(qualities)} qualities")
        if effort not in EFFORTS:
            raise OptionError(f"effort {effort}; it goes from 0 to 9")
        layer_weights = check_layer_weights(layer_weights or [1.0] * len(layers), len(layers))
        if layers[-1].shape[0] * layers[-1].shape[1] > container.MAX_PIXELS:
            raise LimitError(f"more than {container.MAX_PIXELS} pixels")
        deadline = math.inf if time_budget is None else started + time_budget
        coded: list[CodedLayer] = []
        with float32_convolutions():
            for k, (picture, q) in enumerate(zip(layers, qualities, strict=True)):
                below = coded[-1].seen if coded else None
                # what layers above are predicted from, and what repeats a size to be better, is wanted as it is
                raised = below is not None and below.shape == picture.shape and q > qualities[k - 1]
                needed = raised or k < len(layers) - 1
                layer = self.encode_layer(picture, below, q, needed)
                if effort and self.adaptive and below is not None:
                    layer = self.lower_gain(layer, picture, below, q, needed, deadline)
                coded.append(layer)
        if effort:
            from compass_codec import search

            with float32_convolutions():
                coded = search.improve(self, layers, qualities, coded, effort, deadline, progress, layer_weights)
        sizes = [(p.shape[1], p.shape[0]) for p in layers]
        payloads, sides = [layer.data for layer in coded], [layer.side for layer in coded]
        data = container.write(self.model, sizes, scales, qualities, payloads, sides=sides)
        return Encoded(data, [layer.seen for layer in coded])

    def encode_layer(
        self,
        picture: np.ndarray,
        below: np.ndarray | None,
        quality: float,
        needed: bool = False,
        gain: int | None = None,
    ) -> CodedLayer:
        """A layer, uint8 [height, width, 3], given what the decoder will see of the one below it. It is left empty
        where that costs less; a ``needed`` one only if it is no worse for it. ``gain`` is that of LIFF; None chooses
        it where the size repeats, from the first strip."""
        size = (picture.shape[0], picture.shape[1])
        first: list[Tensor] = []
        if gain is None:
            gain = FULL_GAIN
            if self.adaptive and below is not None and below.shape == picture.shape:
                rows = strips.strip_spans(size, self.device)[0]
                interpolated, added = self.liff.parts(to_tensor(below, self.device), size, rows)
                part = best_gain(picture[slice(*rows)], interpolated, added)
                wanted = max(0, round(FULL_GAIN * part))
                gain = wanted if wanted <= FAR_BELOW else FULL_GAIN
                first = [combine(interpolated, added, gain / FULL_GAIN)]
        without = 0  # squared error of the prediction alone; as a picture it would be hundreds of MB of a large one

        def prediction() -> Iterator[Tensor]:
            nonlocal without
            row = 0
            for strip in chain(first, self.predict(below, size, gain, len(first))):
                rows = slice(row, row := row + strip.shape[2])
                without += squared_error(picture[rows], to_bytes(strip))
                yield strip

        codec = self.base if below is None else self.residual
        data, seen, match = codec.encode(picture, prediction(), quality)
        weight = quality_to_lambda(quality) / 3  # bits for each unit of squared error
        error = squared_error(picture, seen)
        side, bare = Side(gain), Side(gain, empty=True)
        if needed and below is not None and below.shape == picture.shape:
            # the prediction may be a little worse than the layer below, which is what is left with a gain of 0
            again = squared_error(picture, below)
            if again < without:
                bare, without = Side(0, empty=True), again
        cost, bare_cost = 8 * len(data) + side.bits + weight * error, bare.bits + weight * without
        coded = self.filtered(CodedLayer(data, seen, side, cost), picture, quality)
        if self.adaptive and weight * match.saved > WORTH * cost:
            side = replace(side, strength=match.strength)
            seen = codec.decode(data, size, self.predict(below, size, gain), quality, match.strength)
            restored = 8 * len(data) + side.bits + weight * squared_error(picture, seen)
            other = self.filtered(CodedLayer(data, seen, side, restored), picture, quality)
            coded = min(coded, other, key=lambda layer: layer.cost)
        if self.adaptive and bare_cost < cost and (without <= error or not needed):
            empty = CodedLayer(b"", rounded(self.predict(below, size, bare.gain), size), bare, bare_cost)
            return min(self.filtered(empty, picture, quality), coded, key=lambda layer: layer.cost)
        return coded

    def filtered(self, coded: CodedLayer, picture: np.ndarray, quality: float) -> CodedLayer:
        """``coded``, which has no filter, or the same layer with one if that costs less."""
        weight = quality_to_lambda(quality) / 3
        found = filters.find(picture, coded.seen, weight)
        if found is None:
            return coded
        side = replace(coded.side, filter=found[0])
        error, before = squared_error(picture, found[1]), squared_error(picture, coded.seen)
        cost = coded.cost + weight * (error - before) + side.bits - coded.side.bits
        return CodedLayer(coded.data, found[1], side, cost) if cost < coded.cost else coded

    def lower_gain(
        self,
        coded: CodedLayer,
        picture: np.ndarray,
        below: np.ndarray,
        quality: float,
        needed: bool,
        deadline: float,
    ) -> CodedLayer:
        """``coded``, or the same layer with a lower gain of LIFF: lowered as long as that costs less, until
        ``deadline`` on the clock of time.monotonic."""
        while coded.side.gain and time.monotonic() < deadline:
            tried = self.encode_layer(picture, below, quality, needed, max(0, coded.side.gain - GAIN_STEP))
            if tried.cost >= coded.cost:
                break
            coded = tried
        return coded

    def decode(self, data: Buffer, layer: int | None = None, max_pixels: int = container.MAX_PIXELS) -> Image.Image:
        """Decode one layer (default: the highest that ``data`` holds whole) as an RGB picture, RGBA if it has alpha.
        The file may be of another set of weights than this codec, if that is found; see ``of``."""
        data = as_bytes(data)
        header = container.read_header(data, max_pixels)
        last = container.pick(header, len(data), layer)
        coded = container.sections(header, data, last).alpha.get(last)
        size = (header.layers[last].width, header.layers[last].height)
        alpha = pictures.alpha_from_bytes(coded, size) if coded else None
        *_, picture = self.decode_layers(data, header, last)
        return pictures.with_alpha(picture, alpha)

    def decode_layers(self, data: bytes, header: container.Header, last: int) -> Iterator[np.ndarray]:
        """Decode layers 0 to ``last`` in turn, each as uint8 [height, width, 3]. Raises DamagedError on the way,
        TruncatedError, FormatError, and WeightsError if the weights that the file was made with are not found."""
        if header.model != self.model:
            yield from self.of(header.model).decode_layers(data, header, last)
            return
        below: np.ndarray | None = None
        for k, entry in enumerate(header.layers[: last + 1]):
            size = (entry.height, entry.width)
            part = container.payload(header, data, k)
            adjust = filters.from_bytes(entry.side.filter) if entry.side.filter else None
            codec = self.base if below is None else self.residual
            with torch.inference_mode(), float32_convolutions():
                prediction = self.predict(below, size, entry.side.gain)
                if entry.side.empty:
                    below = rounded(prediction, size)
                else:
                    below = codec.decode(part, size, prediction, entry.quality, entry.side.strength)
                if adjust is not None:
                    below = filters.apply(adjust, below)
            yield below

    def predict(
        self, below: np.ndarray | None, size: tuple[int, int], gain: int = FULL_GAIN, skip: int = 0
    ) -> Iterator[Tensor]:
        """Strips [1, 3, rows, width] of what a layer of ``size`` adds to, without the first ``skip``: mid-grey for the
        base layer, LIFF's prediction from ``below`` for the others, with ``gain`` sixteenths of what LIFF adds to
        interpolation."""
        low = None if below is None else to_tensor(below, self.device)
        for rows in strips.strip_spans(size, self.device)[skip:]:
            if low is None:
                yield torch.full((1, 3, 1, 1), 0.5, device=self.device).expand(1, 3, rows[1] - rows[0], size[1])
            else:
                yield self.liff.rows(low, size, rows, gain / FULL_GAIN)


def float32_convolutions() -> AbstractContextManager[None]:
    """Keep CUDA from computing convolutions in TF32, whose 10 bits show in the pixels; nothing changes on a CPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def as_bytes(data: Buffer) -> bytes:
    """Bytes, or anything that holds them, such as a memoryview. Raises FormatError for anything else."""
    try:
        return data if isinstance(data, bytes) else memoryview(data).tobytes()
    except TypeError as e:
        raise FormatError(f"the bytes of a file are needed, not {type(data).__name__}") from e


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" (one of several: "cuda:1") to a device. Raises OptionError for any other, and if a GPU
    is asked for and not there."""
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


def choose_precision(name: str, device: torch.device) -> str:
    """What "auto" stands for there, or ``name`` itself."""
    return fastest(device) if name == "auto" else name


def fastest(device: torch.device) -> str:
    """The precision that is fastest there: "float16" on a GPU and on a CPU with matrix units that take it (AMX-FP16),
    "bfloat16" on one whose matrix units take only that (AMX-BF16), otherwise "float32". Without such units a CPU is
    no faster with 16 bits, and may take twenty times as long."""
    if device.type != "cpu":
        return "float16"
    ask = getattr(torch.cpu, "get_capabilities", None)  # which older PyTorch does not have
    here = ask() if ask else {}
    return "float16" if here.get("amx_fp16") else "bfloat16" if here.get("amx_bf16") else "float32"


def shared(
    device: str = "auto", folder: Path | None = None, precision: str = "auto", model: str | None = None
) -> Codec:
    """A codec that is loaded once in a process, of the set that weights.choose takes. The few used last are kept."""
    chosen, found = choose_device(device), choose(folder, model)
    with _loading:  # else two threads would load the same
        return _loaded(Kept(found, found.identity, chosen.type, choose_precision(precision, chosen)))


@dataclass(frozen=True)
class Kept:
    """What tells loaded codecs apart: a set by its identity, wherever it lies."""

    found: ModelSet = field(compare=False)
    identity: str
    device: str
    precision: str


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _loaded(wanted: Kept) -> Codec:
    device = torch.device(wanted.device)
    return Codec(load_weights(wanted.found, device, wanted.precision), device)
