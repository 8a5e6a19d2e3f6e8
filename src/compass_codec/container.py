"""The .cmps file, version 1: a header that says where every layer is, then the layers from small to large.

Knows bytes, sizes and checksums, and nothing of networks. docs/format.md describes every byte.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from itertools import pairwise

from compass_codec.errors import DamagedError, FormatError, LayerError, LimitError, OptionError, TruncatedError

MAGIC = b"CMPS"
VERSION = 1
MODEL_BYTES = 6
MAX_LAYERS = 16
MAX_SIDE = 2**21 - 1
MAX_PIXELS = 178_956_970  # of the largest layer; where Pillow too refuses a picture as a decompression bomb
SCALE_DIGITS = 8  # significant digits kept of a scale factor


@dataclass(frozen=True)
class Layer:
    """One layer's place in the file. ``end`` is also the length of the shortest file that decodes it."""

    width: int
    height: int
    scale: float
    quality: float
    start: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Header:
    """What a file says of itself: the weights it needs (hex of the first bytes of their hash) and its layers."""

    model: str
    layers: tuple[Layer, ...]
    length: int


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _Reader:
    """Reads the header's fields in turn."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise TruncatedError(f"cut off inside the header, after {len(self.data)} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self, name: str, low: int, high: int) -> int:
        """An integer in 7-bit groups, lowest first, in its shortest form and within ``low..high``."""
        value, shift = 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 28:
                raise FormatError(f"the header's {name} is out of range")
        if (byte == 0 and shift > 7) or not low <= value <= high:
            raise FormatError(f"the header's {name} is out of range")
        return value


def _decimal(scale: float) -> tuple[int, int]:
    """A scale factor as integer times power of ten, rounded to SCALE_DIGITS significant digits."""
    number = Decimal(repr(float(scale))).normalize(Context(prec=SCALE_DIGITS))
    _, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    return int("".join(map(str, digits))), exponent


def check_scales(scales: Sequence[float]) -> list[float]:
    """The scale factors as the file will store them. Raises OptionError unless they are 1 to 16 positive finite
    numbers, none smaller than the one before."""
    scales = [float(s) for s in scales]
    if not 1 <= len(scales) <= MAX_LAYERS:
        raise OptionError(f"{len(scales)} scale factors; a file holds 1 to {MAX_LAYERS} layers")
    if not all(math.isfinite(s) and s > 0 for s in scales):
        raise OptionError("scale factors must be positive numbers")
    if any(b < a for a, b in pairwise(scales)):
        raise OptionError("scale factors must not fall from one layer to the next")
    if scales[0] < 1e-6 or scales[-1] > 1e6:
        raise OptionError("scale factors must lie between 0.000001 and 1000000")
    return [_from_decimal(*_decimal(s)) for s in scales]


def _from_decimal(mantissa: int, exponent: int) -> float:
    return float(Decimal(mantissa).scaleb(exponent))


def write(
    model: str,
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    qualities: Sequence[float],
    payloads: Sequence[bytes],
) -> bytes:
    """A whole file. ``sizes`` are (width, height) of each layer, smallest first; ``payloads`` their bytes."""
    head = bytearray(MAGIC + bytes([VERSION, 0]) + bytes.fromhex(model) + bytes([len(payloads)]))
    for (width, height), scale, quality, payload in zip(sizes, scales, qualities, payloads, strict=True):
        if max(width, height) > MAX_SIDE:
            raise LimitError(f"a layer of {width} x {height}; a side may have {MAX_SIDE} samples")
        if len(payload) >= 2**28:
            raise LimitError(f"a layer of {len(payload)} bytes; the format holds {2**28 - 1}")
        mantissa, exponent = _decimal(scale)
        head += _varint(width) + _varint(height) + _varint(mantissa) + struct.pack("<b", exponent)
        head += _varint(round(quality * 100)) + _varint(len(payload)) + struct.pack("<I", zlib.crc32(payload))
    head += struct.pack("<I", zlib.crc32(head))
    return bytes(head) + b"".join(payloads)


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read and check a file's header; ``data`` is the file or any first part that holds the header.

    Raises FormatError, DamagedError, TruncatedError or LimitError. Nothing of the layers is read.
    """
    reader = _Reader(data)
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise FormatError("not a .cmps file" if data else "the file is empty")
    reader.take(len(MAGIC))
    version = reader.byte()
    if version != VERSION:
        raise FormatError(f"format version {version}; this program reads version {VERSION}")
    if flags := reader.byte():
        raise FormatError(f"the file uses features that this program does not know (flags {flags:#04x})")
    model = reader.take(MODEL_BYTES).hex()
    count = reader.byte()
    if not 1 <= count <= MAX_LAYERS:
        raise FormatError(f"the header claims {count} layers; a file holds 1 to {MAX_LAYERS}")
    fields = []
    for _ in range(count):
        width = reader.varint("width", 1, MAX_SIDE)
        height = reader.varint("height", 1, MAX_SIDE)
        mantissa = reader.varint("scale factor", 1, 10**SCALE_DIGITS - 1)
        (exponent,) = struct.unpack("<b", reader.take(1))
        if not -16 <= exponent <= 6:
            raise FormatError("the header's scale factor is out of range")
        quality = reader.varint("quality", 100, 10000) / 100
        length = reader.varint("layer length", 1, 2**28 - 1)
        (checksum,) = struct.unpack("<I", reader.take(4))
        fields.append((width, height, _from_decimal(mantissa, exponent), quality, length, checksum))
    expected = zlib.crc32(data[: reader.at])
    (found,) = struct.unpack("<I", reader.take(4))
    if found != expected:
        raise DamagedError("the header is damaged (its checksum does not match)")
    start = reader.at
    layers: list[Layer] = []
    for width, height, scale, quality, length, checksum in fields:
        layer = Layer(width, height, scale, quality, start, length, checksum)
        if layers and (width < layers[-1].width or height < layers[-1].height or scale < layers[-1].scale):
            raise FormatError("the header's layers get smaller")
        if width * height > max_pixels:
            raise LimitError(f"a layer of {width} x {height}, {width * height} pixels; the limit is {max_pixels}")
        layers.append(layer)
        start = layer.end
    return Header(model, tuple(layers), reader.at)


def pick(header: Header, size: int, layer: int | None) -> int:
    """Index of the layer to decode from ``size`` bytes of file: ``layer``, or the highest that is all there."""
    complete = sum(entry.end <= size for entry in header.layers)
    if layer is None:
        if not complete:
            raise TruncatedError(f"cut off after {size} bytes; layer 0 ends at {header.layers[0].end}")
        return complete - 1
    if not 0 <= layer < len(header.layers):
        raise LayerError(f"no layer {layer}; the file has layers 0 to {len(header.layers) - 1}")
    if layer >= complete:
        raise TruncatedError(f"cut off after {size} bytes; layer {layer} ends at {header.layers[layer].end}")
    return layer


def states(header: Header, data: bytes) -> list[str]:
    """What became of each layer in ``data``: "ok", "damaged" or "cut off"."""
    found = []
    for entry in header.layers:
        part = data[entry.start : entry.end]
        found.append(
            "cut off" if len(part) < entry.length else "ok" if zlib.crc32(part) == entry.checksum else "damaged"
        )
    return found


def payload(header: Header, data: bytes, layer: int) -> bytes:
    """The bytes of one layer, checked. Raises DamagedError, naming the layers below that still decode."""
    entry = header.layers[layer]
    part = data[entry.start : entry.end]
    if len(part) < entry.length:
        raise TruncatedError(f"cut off after {len(data)} bytes; layer {layer} ends at {entry.end}")
    if zlib.crc32(part) != entry.checksum:
        below = {0: "no layer decodes", 1: "layer 0 decodes"}.get(layer, f"layers 0 to {layer - 1} decode")
        raise DamagedError(f"layer {layer} is damaged (its checksum does not match); {below}")
    return part
