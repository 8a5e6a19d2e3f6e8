"""Side information: what a decoder must know of a layer beside its bytes and its quality, as bytes of the header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compass_codec.errors import FormatError

if TYPE_CHECKING:
    from compass_codec.container import Reader

SIDE_VERSION = 1
# bits: the layer has no bytes; a gain follows; a filter follows; a strength of restoration follows
SIDE_EMPTY, SIDE_GAIN, SIDE_FILTER, SIDE_STRENGTH = 1, 2, 4, 8
MAX_FILTER = 127  # bytes
FULL_GAIN = 16  # of LIFF: in sixteenths of what it adds to interpolation
FULL_STRENGTH, MAX_STRENGTH = 16, 32  # of restoration: in sixteenths of what it adds to the layer


@dataclass(frozen=True)
class Side:
    """Side information of one layer.

    ``gain``: how much of what LIFF adds to interpolation is in the prediction, 0..16 sixteenths; 0 is interpolation
    alone. ``empty``: nothing is added to the prediction, and the layer has no bytes. ``filter``: up to MAX_FILTER
    bytes, those of filters.py, or none. ``strength``: how much of what restoration adds is in the layer, 0..32
    sixteenths; 0 is none of it.
    """

    gain: int = FULL_GAIN
    empty: bool = False
    filter: bytes = b""
    strength: int = FULL_STRENGTH

    def to_bytes(self) -> bytes:
        """What is said of the layer: one byte with bits, and what these announce."""
        gain = [] if self.gain == FULL_GAIN else [self.gain]
        strength = [] if self.strength == FULL_STRENGTH else [self.strength]
        length = [len(self.filter)] if self.filter else []
        there = (SIDE_EMPTY, self.empty), (SIDE_GAIN, gain), (SIDE_FILTER, length), (SIDE_STRENGTH, strength)
        return bytes([sum(bit for bit, said in there if said), *gain, *strength, *length]) + self.filter

    @property
    def bits(self) -> int:
        """What it takes in the file; the first layer of which something is said takes two bytes more."""
        return 0 if self == PLAIN else 8 * (1 + len(self.to_bytes()))


PLAIN = Side()


def read(reader: Reader, layer: int) -> Side:
    """What is said of ``layer``. Raises FormatError and TruncatedError."""
    bits = reader.byte()
    if not 0 < bits <= SIDE_EMPTY | SIDE_GAIN | SIDE_FILTER | SIDE_STRENGTH:
        raise FormatError(f"the header's side information of layer {layer} is out of range")
    gain = reader.byte() if bits & SIDE_GAIN else None
    # the base layer is not predicted by LIFF, and the full gain is said by saying nothing
    if gain is not None and (layer == 0 or gain >= FULL_GAIN):
        raise FormatError(f"the header's gain of layer {layer} is out of range")
    strength = reader.byte() if bits & SIDE_STRENGTH else None
    # an empty layer is not restored, and the full strength is said by saying nothing
    if strength is not None and (bits & SIDE_EMPTY or strength == FULL_STRENGTH or strength > MAX_STRENGTH):
        raise FormatError(f"the header's strength of restoration of layer {layer} is out of range")
    length = reader.byte() if bits & SIDE_FILTER else 0
    if bits & SIDE_FILTER and not 0 < length <= MAX_FILTER:
        raise FormatError(f"the header's filter of layer {layer} has {length} bytes; it may have 1 to {MAX_FILTER}")
    return Side(
        FULL_GAIN if gain is None else gain,
        bool(bits & SIDE_EMPTY),
        reader.take(length),
        FULL_STRENGTH if strength is None else strength,
    )
