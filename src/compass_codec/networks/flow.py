"""Networks over pictures of any height as a flow of strips: nothing is computed twice, and memory is that of strips.

A strip is an array [1, C, rows, W], of NumPy or PyTorch, and whether it is the last. A 3x3 convolution sees a row
beyond its strip, so its output lags behind its input by one row. Where strips are cut depends on the picture's size
alone: encoder and decoder cut alike, and so compute the same floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from compass_codec.networks.arrays import Array, of_height, space

Strip = tuple[Array, bool]


def each(apply: Callable[[Array], Array], strips: Iterable[Strip]) -> Iterator[Strip]:
    """``apply``, which sees no neighbouring rows, of every strip."""
    for strip, last in strips:
        yield apply(strip), last


def blocks(blocks: Iterable[Callable[[Array], Array]], strips: Iterator[Strip]) -> Iterator[Strip]:
    """Strips through blocks in turn, each of which takes [1, C, rows + 2, W] to [1, C, rows, W]."""
    for block in blocks:
        strips = each(block, with_neighbours(strips))
    return strips


def with_neighbours(strips: Iterable[Strip]) -> Iterator[Strip]:
    """Strips with a row more above and below, which is zero beyond the picture."""
    held: Array | None = None
    for strip, last in strips:
        edge = space(strip).zeros_like(strip[:, :, :1])
        parts = [edge if held is None else held, strip, *([edge] if last else [])]
        held = space(strip).concatenate(parts, 2)
        if held.shape[2] > 2:
            yield held, last
            held = held[:, :, -2:]


def even(strips: Iterable[Strip]) -> Iterator[Strip]:
    """Strips of an even number of rows and columns; the picture's last row and column are repeated where one lacks."""
    held: Array | None = None
    for strip, last in strips:
        if strip.shape[3] % 2:
            strip = space(strip).concatenate([strip, strip[..., -1:]], 3)
        whole = strip if held is None else space(strip).concatenate([held, strip], 2)
        if last and whole.shape[2] % 2:
            whole = space(strip).concatenate([whole, whole[:, :, -1:]], 2)
        rows = whole.shape[2] // 2 * 2
        held = whole[:, :, rows:] if rows < whole.shape[2] else None
        if rows:
            yield whole[:, :, :rows], last


def within(height: int, width: int, strips: Iterable[Strip]) -> Iterator[Strip]:
    """The part of strips that lies in a picture of ``height`` and ``width``."""
    for strip, last in strips:
        yield strip[:, :, :height, :width], last
        height -= strip.shape[2]


def gather(height: int, strips: Iterable[Strip]) -> Array:
    """All strips, of ``height`` rows in all, as one array."""
    found, row = None, 0
    for strip, _ in strips:
        found = of_height(strip, height) if found is None else found
        found[:, :, row : (row := row + strip.shape[2])] = strip
    return found


def cut(x: Array, rows: int) -> Iterator[Strip]:
    """An array [1, C, H, W] as strips of ``rows``, the last of what remains."""
    height = x.shape[2]
    for first in range(0, height, rows):
        yield x[:, :, first : first + rows], first + rows >= height
