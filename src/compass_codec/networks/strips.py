"""Networks over pictures of any height, a strip of rows at a time, with the same result as all at once.

A network here turns cells into cells: ``cell_in`` rows and columns of its input belong to ``cell_out`` of its output,
and an output cell depends on input cells at most ``reach`` away. A strip is therefore computed with that many cells
more on either side, which are then cut off. Arrays are [1, channels, height, width].
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from compass_codec.networks.arrays import Array, channels_last, copy, space

# What is computed at once, in pixels of the layer: columns of a tile, rows of a strip, and what a strip may hold where
# the picture is wide. The arrays of a tile take some hundred MB, and what is computed twice at its borders stays small.
TILE = {"cpu": 768, "cuda": 4096}
STRIP = {"cpu": 512, "cuda": 2048}
STRIP_PIXELS = {"cpu": 3 << 19, "cuda": 1 << 24}


class Device(Protocol):
    """What computes, as torch.device: its type is "cpu" or "cuda"."""

    @property
    def type(self) -> str: ...


def strip_spans(size: tuple[int, int], device: Device, cell: int = 1) -> list[tuple[int, int]]:
    """First row and last row + 1, in cells of ``cell`` pixels, of each strip that a picture of ``size`` (height, width)
    is computed in."""
    return spans(-(-size[0] // cell), strip_rows(size[1], device) // cell)


def strip_rows(width: int, device: Device) -> int:
    """The most rows of a strip of a picture so wide."""
    return max(64, min(STRIP[device.type], STRIP_PIXELS[device.type] // width))


def spans(length: int, largest: int) -> list[tuple[int, int]]:
    """Starts and ends of the fewest pieces, none longer than ``largest``, that 0..length is cut into evenly."""
    count = max(1, -(-length // largest))
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def release() -> None:
    """Give freed memory back to the system. glibc keeps what lies between arrays that live on: hundreds of MB in a
    picture of many strips."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Network:
    """``apply`` takes a part of the input, and (height, width) of the output that belongs to it.

    ``tile`` and ``height``: cells that are computed at once along a row and along a column.
    """

    apply: Callable[[Array, tuple[int, int]], Array]
    cell_in: int
    cell_out: int
    reach: int
    tile: int
    height: int


def run(network: Network, strips: Iterable[Array], rows: int, size: tuple[int, int]) -> Iterator[Array]:
    """Strips of the output, of ``size`` in all, as soon as the strips of the input (``rows`` in all) allow.

    Where the output is cut depends on its size alone and not on how the input comes, which encoder and decoder do not
    agree on: a convolution may add up in another order where it computes another number of rows.
    """
    cells = -(-rows // network.cell_in)
    due = deque(spans(cells, network.height))
    buffer: Array | None = None
    start = received = 0  # the buffer's first cell, the rows that have come
    for strip in strips:
        if received:
            release()
        buffer = strip if buffer is None else space(strip).concatenate([buffer, strip], 2)
        received += strip.shape[2]
        del strip  # here and below: nothing that is not needed outlives its turn
        ready = cells if received == rows else received // network.cell_in - network.reach
        while due and due[0][1] <= ready:
            first, last = due.popleft()
            low, high = max(0, first - network.reach), min(cells, last + network.reach)
            part = buffer[:, :, (low - start) * network.cell_in : (high - start) * network.cell_in]
            out = _columns(network, part, min(size[0], high * network.cell_out) - low * network.cell_out, size[1])
            del part
            yield out[:, :, (first - low) * network.cell_out : (last - low) * network.cell_out]
            del out
            keep = max(start, last - network.reach)
            buffer, start = copy(buffer[:, :, (keep - start) * network.cell_in :]), keep
    if cells > network.height:
        release()


def _columns(network: Network, x: Array, height: int, width: int) -> Array:
    """``run`` along a row: a strip of output ``height`` and ``width``, a tile at a time."""
    cells = -(-x.shape[3] // network.cell_in)
    tiles = []
    for left, right in spans(cells, network.tile):
        first, last = max(0, left - network.reach), min(cells, right + network.reach)
        part = channels_last(x[..., first * network.cell_in : last * network.cell_in])
        out = network.apply(part, (height, min(width, last * network.cell_out) - first * network.cell_out))
        tiles.append(out[..., (left - first) * network.cell_out : (right - first) * network.cell_out])
    return tiles[0] if len(tiles) == 1 else space(x).concatenate(tiles, 3)


def fork(strips: Iterable[Array]) -> tuple[Iterator[Array], Iterator[Array]]:
    """The strips twice. Only those are kept that one of the two has still to take: itertools.tee, which hands out its
    memory in blocks of 57 items, would hold gigabytes of a large picture."""
    source = iter(strips)
    waiting: tuple[deque[Array], deque[Array]] = deque(), deque()

    def branch(own: deque[Array]) -> Iterator[Array]:
        while True:
            if not own:
                try:
                    strip = next(source)
                except StopIteration:
                    return
                for each in waiting:
                    each.append(strip)
                del strip
            yield own.popleft()

    return branch(waiting[0]), branch(waiting[1])


class Rows:
    """Rows of a picture that comes in strips, taken in any other numbers."""

    def __init__(self, strips: Iterable[Array]) -> None:
        self.strips, self.kept = iter(strips), list[Array]()

    def take(self, count: int) -> Array:
        """The next ``count`` rows."""
        while sum(strip.shape[2] for strip in self.kept) < count:
            self.kept.append(next(self.strips))
        rows = self.kept[0] if len(self.kept) == 1 else space(self.kept[0]).concatenate(self.kept, 2)
        self.kept = [copy(rows[:, :, count:])] if rows.shape[2] > count else []
        return rows[:, :, :count]
