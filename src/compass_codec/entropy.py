"""Symbols to bytes and back: range coding with integer probability tables (constriction).

Symbols are coded in groups that share a table, for speed: first z, channel by channel, then y, scale
index by scale index. A table holds the frequencies of -w..w and, last, of an escape that stands for any other value;
escaped values follow in a list of their own ahead of the range-coded words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from compass_codec.errors import DamagedError

PRECISION = 24  # frequencies of a table sum to 2**24, constriction's own precision, so that it keeps them as they are
LEVELS = 64
SCALE_RANGE = (0.11, 256.0)
SYMBOL_LIMIT = 2**20  # no encoder writes larger ones; corrupt data must not overflow integers
PIECE = 2**20  # symbols sorted or coded in one call, which bounds the memory of the calls

Symbols = NDArray[np.signedinteger[Any]]  # of any width


def scale_levels() -> NDArray[np.float64]:
    """Standard deviations [64] that have a table, evenly spaced in log scale."""
    low, high = map(math.log, SCALE_RANGE)
    levels: NDArray[np.float64] = np.exp(np.linspace(low, high, LEVELS))
    return levels


def frequencies(pmf: NDArray[np.float64]) -> NDArray[np.int32]:
    """Probabilities of -w..w to integer frequencies of -w..w and escape: each at least 1, their sum 2**PRECISION."""
    pmf = np.append(pmf, max(0.0, 1.0 - float(pmf.sum())))
    out: NDArray[np.int64] = np.maximum(1, np.rint(pmf * 2.0**PRECISION)).astype(np.int64)
    out[out.argmax()] += 2**PRECISION - out.sum()
    return out.astype(np.int32)


def gaussian_tables() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tables of zero-mean normal distributions, one for each scale level, one after the other: frequencies (int32)
    and the length of each table [64] (int32). Made once, then stored with the weights."""
    tables = []
    for scale in scale_levels():
        width = math.ceil(6 * scale) + 1
        edges = np.arange(-width - 0.5, width + 1) / (scale * math.sqrt(2))
        # differences of the smaller tail, so that far symbols keep their digits
        tail = np.array([math.erfc(abs(e)) / 2 for e in edges])
        middle = len(edges) // 2
        pmf = np.concatenate([np.diff(tail[:middle]), [1 - 2 * tail[middle]], -np.diff(tail[middle:])])
        tables.append(frequencies(pmf))
    return np.concatenate(tables), np.array([len(t) for t in tables], np.int32)


class Table:
    """One probability table, ready for the coder; symbols are integers of any size."""

    def __init__(self, freq: NDArray[np.int32]) -> None:
        self.freq = freq
        self.width = len(freq) // 2 - 1

    @cached_property
    def model(self) -> Any:
        # constriction gives every symbol 1 and shares out the rest in proportion; handed f - 1 it arrives at f
        return stream.model.Categorical((self.freq - 1).astype(np.float64), perfect=False)

    @cached_property
    def least_bits(self) -> float:
        return PRECISION - math.log2(int(self.freq.max()))

    def indices(self, symbols: Symbols) -> tuple[NDArray[np.int32], Symbols]:
        """Positions in the table (int32) and the values that had to be escaped."""
        escaped = np.abs(symbols) > self.width
        positions = np.where(escaped, 2 * self.width + 1, symbols + self.width).astype(np.int32, copy=False)
        return positions, symbols[escaped]


class Tables:
    """All tables of one codec: ``z[channel]`` and ``y[scale index]``, from frequencies one row for each channel, and
    those of y one after the other with the length of each.

    Symbols of scale indices below ``skipped`` are zero and are not coded."""

    def __init__(
        self, z: NDArray[np.int32], y: NDArray[np.int32], y_lengths: NDArray[np.int32], *, skipped: int = 0
    ) -> None:
        self.skipped = skipped
        self.z = [Table(freq) for freq in z]
        self.y = [Table(freq) for freq in np.split(y, np.cumsum(y_lengths)[:-1])]

    def least_bytes(self, z_count: int, y_count: int) -> int:
        """A lower bound of the bytes of a stream with ``z_count`` symbols in each channel of z and ``y_count`` of y:
        the cost of the likeliest symbols."""
        z_bits = sum(t.least_bits for t in self.z) * z_count
        y_bits = min(t.least_bits for t in self.y) * y_count
        return max(0, math.floor((z_bits + y_bits) / 8) - 8)


def _zigzag(values: Symbols) -> bytes:
    out = bytearray()
    for v in values.tolist():
        u = 2 * v if v >= 0 else -2 * v - 1
        while u > 127:
            out.append(u & 127 | 128)
            u >>= 7
        out.append(u)
    return bytes(out)


def groups(index: NDArray[Any], tables: int = LEVELS) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """The scale indices below ``tables`` that occur, and their positions in the flat array."""
    flat = index.ravel()
    starts = range(0, len(flat), PIECE)
    counts = [np.bincount(flat[at : at + PIECE], minlength=tables) for at in starts]
    # sorted a piece at a time, into positions of half the width: a large layer has a quarter as many as pixels
    order, total = np.empty(len(flat), np.int32), np.sum([np.zeros(tables, int), *counts], 0)
    first = np.cumsum(total) - total
    ends = first.copy()
    for at, count in zip(starts, counts, strict=True):
        found, here = np.argsort(flat[at : at + PIECE], kind="stable"), 0
        for number in np.flatnonzero(count).tolist():
            more = count[number]
            order[ends[number] : ends[number] + more] = found[here : here + more] + at
            ends[number] += more
            here += more
    for number in np.flatnonzero(total).tolist():
        yield number, order[first[number] : ends[number]]


class Encoder:
    """Writes one layer's symbols: z first, then y in as many parts as scale indices become known."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.coder, self.escapes = tables, stream.queue.RangeEncoder(), list[Symbols]()

    def _put(self, table: Table, symbols: Symbols) -> None:
        for at in range(0, len(symbols), PIECE):
            positions, escaped = table.indices(symbols[at : at + PIECE])
            self.coder.encode(positions, table.model)
            self.escapes.append(escaped)

    def z(self, z: Symbols) -> None:
        """The hyper-latent's symbols [channels, height, width], int32."""
        for table, channel in zip(self.tables.z, z, strict=True):
            self._put(table, channel.ravel())

    def y(self, index: NDArray[Any], symbols: Symbols) -> None:
        """Symbols of the latent, int32, and their scale indices, of one shape."""
        for number, where in groups(index, len(self.tables.y)):
            if number >= self.tables.skipped:
                self._put(self.tables.y[number], symbols.ravel()[where])

    def data(self) -> bytes:
        """The bytes of all symbols so far."""
        values = np.concatenate([np.empty(0, np.int32), *self.escapes])
        words: bytes = self.coder.get_compressed().astype(">u4").tobytes()
        return _zigzag(np.array([len(values)])) + _zigzag(values) + words[:-3] + words[-3:].rstrip(b"\0")


def encode(z: Symbols, y: Symbols, index: NDArray[np.uint8], tables: Tables) -> bytes:
    """Code one layer's symbols: z [channels, h, w] and y [M, h, w] in integers, and the scale indices of y in uint8."""
    coder = Encoder(tables)
    coder.z(z)
    coder.y(index, y)
    return coder.data()


class Decoder:
    """Reads one layer's symbols back: z first, then y once the scale indices are known from z."""

    def __init__(self, data: bytes, tables: Tables, z_count: int, y_count: int) -> None:
        """``z_count``: symbols in each channel of z; ``y_count``: symbols of y. Raises DamagedError if so few bytes
        cannot hold so many symbols, which is found before anything is allocated for them."""
        self.tables, self.at, self.data = tables, 0, data
        if len(data) < tables.least_bytes(z_count, y_count):
            raise DamagedError(f"a layer of {len(data)} bytes is too short for its size")
        count = self._varint()
        if not 0 <= count <= len(data):  # an escape takes a byte at least
            raise DamagedError("corrupt layer: invalid symbol stream")
        self.escapes = iter([self._varint() for _ in range(count)])
        words = data[self.at :]
        words += b"\0" * (-len(words) % 4)
        self.coder = stream.queue.RangeDecoder(np.frombuffer(words, ">u4").astype(np.uint32))

    def _varint(self) -> int:
        value, shift = 0, 0
        while True:
            if self.at >= len(self.data) or shift > 28:
                raise DamagedError("corrupt layer: invalid symbol stream")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if value > 2 * SYMBOL_LIMIT:
            raise DamagedError("corrupt layer: invalid symbol stream")
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def _group(self, table: Table, count: int) -> NDArray[np.int32]:
        lengths = [min(PIECE, count - at) for at in range(0, count, PIECE)]
        try:
            pieces: list[NDArray[np.int32]] = [self.coder.decode(table.model, length) for length in lengths]
        except AssertionError as e:  # constriction's error for data that no encoder writes
            raise DamagedError("corrupt layer: invalid symbol stream") from e
        symbols = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        symbols -= table.width
        if symbols.max() > table.width:
            for i in np.flatnonzero(symbols > table.width):
                symbols[i] = next(self.escapes, 0)
        return symbols

    def z(self, channels: int, height: int, width: int) -> NDArray[np.int32]:
        """The hyper-latent's symbols [channels, height, width]."""
        return np.stack([self._group(t, height * width) for t in self.tables.z]).reshape(channels, height, width)

    def y(self, index: NDArray[Any]) -> NDArray[np.int32]:
        """The latent's symbols, in the shape of their scale indices ``index``."""
        symbols = np.zeros(index.size, np.int32)
        for number, where in groups(index, len(self.tables.y)):
            if number >= self.tables.skipped:
                symbols[where] = self._group(self.tables.y[number], len(where))
        return symbols.reshape(index.shape)
