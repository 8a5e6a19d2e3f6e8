"""The .cmps file, version 2: a header with the place of everything, then the layers from small to large, and around
them optional sections: alpha, an ICC profile, EXIF, XMP.

This module handles bytes, sizes and checksums, and no networks. docs/format.md describes every byte.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from enum import Enum
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from compass_codec.errors import DamagedError, FormatError, LayerError, LimitError, OptionError, TruncatedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"CMPS"
VERSION = 2
MODEL_BYTES = 6
MAX_LAYERS = 16
MAX_SIDE = 2**21 - 1
MAX_PIXELS = 178_956_970  # of the largest layer; where Pillow too refuses a picture as a decompression bomb
SCALE_DIGITS = 8  # significant digits kept of a scale factor
MAX_EXPONENT = 6
MAX_HEADER = 17 + 21 * MAX_LAYERS + 1 + 10 * (3 + MAX_LAYERS)  # bytes: fixed fields, layers, table of sections

WITH_SECTIONS = 1  # flag: a table of sections follows the layer entries


class Place(Enum):
    """Where the sections of a kind lie."""

    FIRST = "before layer 0"
    BEFORE = "before the layer's own bytes"  # no kind yet
    AFTER = "behind the layer's own bytes"
    LAST = "behind all layers"


@dataclass(frozen=True)
class Kind:
    """One kind of section: its field in Sections, its name, its place, and how many bytes one may have."""

    field: str
    name: str
    place: Place
    limit: int

    @property
    def of_layer(self) -> bool:
        return self.place in (Place.BEFORE, Place.AFTER)


KINDS = {
    1: Kind("icc", "ICC profile", Place.FIRST, 2**24 - 1),
    2: Kind("exif", "EXIF", Place.LAST, 2**24 - 1),
    3: Kind("xmp", "XMP", Place.LAST, 2**24 - 1),
    4: Kind("alpha", "alpha", Place.AFTER, 2**28 - 1),
}


@dataclass(frozen=True)
class Section:
    """One section's place in the file; ``layer`` is 0 for what belongs to the whole picture."""

    kind: int
    layer: int
    start: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def name(self) -> str:
        kind = KINDS[self.kind]
        return f"{kind.name} of layer {self.layer}" if kind.of_layer else kind.name


@dataclass(frozen=True)
class Sections:
    """What a file holds beside its layers: an ICC profile, EXIF (a TIFF structure), XMP (UTF-8), each None if absent,
    and the coded alpha of each layer that has one."""

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    alpha: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One layer's place in the file. ``end`` is also the length of the shortest file that decodes it with all that
    belongs to it."""

    width: int
    height: int
    scale: float
    quality: float
    start: int
    length: int
    checksum: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file: the identity of its weights, its layers, and its sections in the order of the file."""

    model: str
    layers: tuple[Layer, ...]
    length: int
    sections: tuple[Section, ...] = ()

    @property
    def end(self) -> int:
        """Length of the whole file; only metadata lies behind the last layer's end."""
        return max([self.layers[-1].end, *(section.end for section in self.sections)])

    def has_alpha(self, layer: int) -> bool:
        return any(KINDS[section.kind].field == "alpha" and section.layer == layer for section in self.sections)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
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
    above = max(0, exponent - MAX_EXPONENT)
    return int("".join(map(str, digits))) * 10**above, exponent - above


def check_scales(scales: Sequence[float]) -> list[float]:
    """The scale factors as the file will store them. Raises OptionError unless they are 1 to 16 positive finite
    numbers, none smaller than the one before."""
    try:
        scales = [float(s) for s in scales]
    except (TypeError, ValueError) as e:
        raise OptionError("scale factors must be a list of numbers") from e
    if not 1 <= len(scales) <= MAX_LAYERS:
        raise OptionError(f"{len(scales)} scale factors; a file holds 1 to {MAX_LAYERS} layers")
    if not all(math.isfinite(s) and s > 0 for s in scales):
        raise OptionError("scale factors must be positive numbers")
    if any(b < a for a, b in pairwise(scales)):
        raise OptionError("scale factors must be non-decreasing")
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
    sections: Sections | None = None,
) -> bytes:
    """A whole file. ``sizes`` are (width, height) of each layer, smallest first; ``payloads`` their bytes."""
    extras = _laid_out(sections or Sections(), len(payloads))
    flags = WITH_SECTIONS if extras else 0
    head = bytearray(MAGIC + bytes([VERSION, flags]) + bytes.fromhex(model) + bytes([len(payloads)]))
    for (width, height), scale, quality, payload in zip(sizes, scales, qualities, payloads, strict=True):
        assert payload, "a layer without bytes"
        if max(width, height) > MAX_SIDE:
            raise LimitError(f"a layer of {width} x {height}; a side may have {MAX_SIDE} samples")
        if len(payload) >= 2**28:
            raise LimitError(f"a layer of {len(payload)} bytes; the format holds {2**28 - 1}")
        mantissa, exponent = _decimal(scale)
        head += _varint(width) + _varint(height) + _varint(mantissa) + struct.pack("<b", exponent)
        head += _varint(round(quality * 100)) + _varint(len(payload)) + struct.pack("<I", zlib.crc32(payload))
    if extras:
        head += bytes([len(extras)])
    for kind, layer, data in extras:
        head += bytes([kind, layer]) + _varint(len(data)) + struct.pack("<I", zlib.crc32(data))
    head += struct.pack("<I", zlib.crc32(head))
    parts = [(_order(kind, layer), data) for kind, layer, data in extras]
    parts += [(_order(None, k), data) for k, data in enumerate(payloads)]
    return bytes(head) + b"".join(data for _, data in sorted(parts))


def _laid_out(sections: Sections, layers: int) -> list[tuple[int, int, bytes]]:
    """The sections that are not empty as (kind, layer, bytes), in the order of the file."""
    found = []
    for number, kind in KINDS.items():
        value = getattr(sections, kind.field)
        for layer, data in value.items() if kind.of_layer else [(0, value)]:
            if not data:
                continue
            if not 0 <= layer < layers:
                raise LayerError(f"{kind.name} for layer {layer}; the file has layers 0 to {layers - 1}")
            if len(data) > kind.limit:
                raise LimitError(f"{kind.name} of {len(data)} bytes; the format holds {kind.limit}")
            found.append((number, layer, data))
    return sorted(found, key=lambda section: _order(*section[:2]))


def _order(kind: int | None, layer: int) -> tuple[int, int, int]:
    """The sort key of a section in the file, or of the layer's own bytes (``kind`` None)."""
    if kind is None:
        return layer, 0, 0
    return {
        Place.FIRST: (-1, 0, kind),
        Place.BEFORE: (layer, -1, kind),
        Place.AFTER: (layer, 1, kind),
        Place.LAST: (MAX_LAYERS, 0, kind),
    }[KINDS[kind].place]


def extract(data: Buffer, layer: int, tail: bytes = b"", strip: bool = False) -> bytes:
    """A file of layers 0 to ``layer``, with their alpha and, unless ``strip``, ICC profile, EXIF and XMP as far as they
    are there. ``data`` is the file, or its first part with ``tail``, the bytes behind the last layer's end. Raises
    LayerError, TruncatedError or DamagedError, and what read_header raises."""
    data = as_bytes(data)
    header = read_header(data, MAX_SIDE**2)
    last = pick(header, len(data), layer)
    kept = sections(without_metadata(header) if strip else header, data, range(last + 1), tail)
    if strip:
        kept = Sections(alpha=kept.alpha)
    layers = header.layers[: last + 1]
    sizes = [(e.width, e.height) for e in layers]
    scales, qualities = [e.scale for e in layers], [e.quality for e in layers]
    return write(header.model, sizes, scales, qualities, [payload(header, data, k) for k in range(last + 1)], kept)


def without_metadata(header: Header) -> Header:
    """The header less its EXIF and XMP, which are then left alone."""
    return replace(header, sections=tuple(s for s in header.sections if KINDS[s.kind].place is not Place.LAST))


def strip_header(header: Header, data: bytes) -> bytes:
    """The header's bytes, with which ``data`` begins, without the entries of EXIF and XMP. With the same bytes up to
    the last layer's end behind it, it is a file without them, as both lie behind all layers."""
    entries = [
        bytes([entry.kind, entry.layer]) + _varint(entry.length) + struct.pack("<I", entry.checksum)
        for entry in header.sections
    ]
    kept = [e for e, entry in zip(entries, header.sections, strict=True) if KINDS[entry.kind].place is not Place.LAST]
    if len(kept) == len(entries):
        return data[: header.length]
    table = bytes([len(kept)]) + b"".join(kept) if kept else b""
    head = bytearray(data[: header.length - 4 - 1 - sum(map(len, entries))] + table)
    if not kept:
        head[len(MAGIC) + 1] &= ~WITH_SECTIONS
    return bytes(head) + struct.pack("<I", zlib.crc32(head))


def stored_quality(quality: float) -> float:
    """As the file stores it, in steps of 0.01."""
    return round(quality * 100) / 100


def as_bytes(data: Buffer) -> bytes:
    """Bytes, or anything that holds them, such as a memoryview. Raises FormatError for anything else."""
    try:
        return data if isinstance(data, bytes) else memoryview(data).tobytes()
    except TypeError as e:
        raise FormatError(f"expected the bytes of a .cmps file, not {type(data).__name__}") from e


def read_header(data: Buffer, max_pixels: int = MAX_PIXELS) -> Header:
    """Read and check a file's header; ``data`` is the file or any first part that holds the header.

    Raises FormatError, DamagedError, TruncatedError or LimitError. Nothing of the layers is read.
    """
    data = as_bytes(data)
    reader = Reader(data)
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise FormatError("not a .cmps file" if data else "the file is empty")
    reader.take(len(MAGIC))
    version = reader.byte()
    if version != VERSION:
        raise FormatError(f"format version {version}; this program reads version {VERSION}")
    flags = reader.byte()
    if flags & ~WITH_SECTIONS:
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
        if not -16 <= exponent <= MAX_EXPONENT:
            raise FormatError("the header's scale factor is out of range")
        quality = reader.varint("quality", 100, 10000) / 100
        length = reader.varint("layer length", 1, 2**28 - 1)
        (checksum,) = struct.unpack("<I", reader.take(4))
        fields.append((width, height, _from_decimal(mantissa, exponent), quality, length, checksum))
    table = _read_table(reader, count) if flags & WITH_SECTIONS else []
    expected = zlib.crc32(data[: reader.at])
    (found,) = struct.unpack("<I", reader.take(4))
    if found != expected:
        raise DamagedError("the header is damaged (its checksum does not match)")
    lengths = {_order(None, k): entry[4] for k, entry in enumerate(fields)}
    lengths |= {_order(kind, layer): length for kind, layer, length, _ in table}
    starts, ends, at = {}, {}, reader.at
    for order, length in sorted(lengths.items()):
        starts[order] = at
        at += length
        ends[order[0]] = at
    layers: list[Layer] = []
    for k, (width, height, scale, quality, length, checksum) in enumerate(fields):
        layer = Layer(width, height, scale, quality, starts[_order(None, k)], length, checksum, ends[k])
        if layers and (width < layers[-1].width or height < layers[-1].height or scale < layers[-1].scale):
            raise FormatError("the header's layers get smaller")
        if width * height > max_pixels:
            raise LimitError(f"a layer of {width} x {height}, {width * height} pixels; the limit is {max_pixels}")
        layers.append(layer)
    extras = [Section(kind, of, starts[_order(kind, of)], length, checksum) for kind, of, length, checksum in table]
    return Header(model, tuple(layers), reader.at, tuple(extras))


def _read_table(reader: Reader, layers: int) -> list[tuple[int, int, int, int]]:
    """The table of sections: kind, layer, length and checksum of each, in the order in which they lie."""
    table: list[tuple[int, int, int, int]] = []
    count = reader.byte()
    if not count:
        raise FormatError("the header's table of sections is empty")
    for _ in range(count):
        kind, layer = reader.byte(), reader.byte()
        if kind not in KINDS:
            raise FormatError(f"the header names a section of kind {kind}, which this program does not know")
        if layer >= (layers if KINDS[kind].of_layer else 1):
            raise FormatError(f"the header names {KINDS[kind].name} of layer {layer}")
        if table and _order(kind, layer) <= _order(*table[-1][:2]):
            raise FormatError("the header's sections are repeated or out of order")
        length = reader.varint(f"length of {KINDS[kind].name}", 1, KINDS[kind].limit)
        (checksum,) = struct.unpack("<I", reader.take(4))
        table.append((kind, layer, length, checksum))
    return table


def pick(header: Header, size: int, layer: int | None) -> int:
    """Index of the layer to decode from ``size`` bytes of file: ``layer``, or the highest that is all there."""
    complete = sum(entry.end <= size for entry in header.layers)
    if layer is None:
        if not complete:
            raise TruncatedError(f"cut off after {size} bytes; layer 0 ends at {header.layers[0].end}")
        return complete - 1
    if not hasattr(layer, "__index__") or not 0 <= layer < len(header.layers):
        raise LayerError(f"no layer {layer!r}; the file has layers 0 to {len(header.layers) - 1}")
    if layer >= complete:
        raise TruncatedError(f"cut off after {size} bytes; layer {layer} ends at {header.layers[layer].end}")
    return layer


def states(header: Header, data: bytes) -> list[str]:
    """The state of each layer with its sections, and then of each section: "ok", "damaged" or "cut off"."""
    extras = [_state(entry, data) for entry in header.sections]
    found = []
    for k, entry in enumerate(header.layers):
        own = {_state(entry, data)}
        own |= {s for e, s in zip(header.sections, extras, strict=True) if KINDS[e.kind].of_layer and e.layer == k}
        found.append(next(state for state in ("cut off", "damaged", "ok") if state in own))
    return found + extras


def _state(entry: Layer | Section, data: bytes) -> str:
    part = data[entry.start : entry.start + entry.length]
    if len(part) < entry.length:
        return "cut off"
    return "ok" if zlib.crc32(part) == entry.checksum else "damaged"


def soundest(header: Header, data: bytes, last: int) -> int:
    """The highest layer up to ``last`` that decodes: it and all below are sound, and so is its own alpha. Raises
    DamagedError if there is none."""
    alpha = {entry.layer: entry for entry in header.sections if KINDS[entry.kind].of_layer}
    whole = list(takewhile(lambda k: _state(header.layers[k], data) == "ok", range(last + 1)))
    for k in reversed(whole):
        if k not in alpha or _state(alpha[k], data) == "ok":
            return k
    raise DamagedError(f"{f'the alpha of layer {whole[-1]}' if whole else 'layer 0'} is damaged; nothing decodes")


def sections(
    header: Header,
    data: bytes,
    layers: Container[int] | None = None,
    tail: bytes = b"",
    best_effort: bool = False,
    lost: list[str] | None = None,
) -> Sections:
    """The sections that are whole; of those that belong to a layer, only those of ``layers`` (default: all). Where
    ``data`` is only a first part of the file, ``tail`` may give the bytes behind the last layer's end, where EXIF and
    XMP are.

    Raises DamagedError; with ``best_effort`` a damaged section is left out instead. ``lost`` gets a sentence for each
    that is left out or cut off.
    """
    found: dict[str, Any] = {}
    lost = [] if lost is None else lost
    for entry in header.sections:
        kind = KINDS[entry.kind]
        if kind.of_layer and layers is not None and entry.layer not in layers:
            continue
        apart = header.layers[-1].end if tail and kind.place is Place.LAST else 0
        part = (tail if apart else data)[entry.start - apart : entry.end - apart]
        if len(part) < entry.length:
            lost.append(f"the {entry.name} is cut off")
            continue
        if zlib.crc32(part) != entry.checksum:
            if best_effort:
                lost.append(f"the {entry.name} is damaged, and left out")
                continue
            raise DamagedError(f"the {entry.name} is damaged (its checksum does not match)")
        if kind.of_layer:
            found.setdefault(kind.field, {})[entry.layer] = part
        else:
            found[kind.field] = part
    return Sections(**found)


def alpha(header: Header, data: bytes, layer: int) -> bytes | None:
    """The coded alpha of one layer, checked; None if it has none. Raises DamagedError."""
    only = replace(header, sections=tuple(s for s in header.sections if KINDS[s.kind].of_layer))
    return sections(only, data, (layer,)).alpha.get(layer)


def payload(header: Header, data: bytes, layer: int) -> bytes:
    """The bytes of one layer, checked. Raises DamagedError, naming the layers below that still decode."""
    entry = header.layers[layer]
    part = data[entry.start : entry.start + entry.length]
    if len(part) < entry.length:
        raise TruncatedError(f"cut off after {len(data)} bytes; layer {layer} ends at {entry.end}")
    if zlib.crc32(part) != entry.checksum:
        below = {0: "no layer decodes", 1: "layer 0 decodes"}.get(layer, f"layers 0 to {layer - 1} decode")
        raise DamagedError(f"layer {layer} is damaged (its checksum does not match); {below}")
    return part
