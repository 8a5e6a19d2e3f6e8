"""Rows of what lean LIFF predicts, some at a time, whatever computes them.

Constants say what is in hand at a time, so that it stays in a processor's caches and launches on a GPU are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from compass_codec.networks import flow
from compass_codec.networks.arrays import Array, in_unit, space
from compass_codec.networks.places import as_matrix, bicubic_taps, first, sources
from compass_codec.networks.strips import Device, spans

PLACES = {"cpu": 2**12, "cuda": 2**18}  # at half of the lower layer's size
# of bicubic interpolation: target columns, the lower layer's rows that are widened, rows of the target made from those
CUBIC_COLUMNS, CUBIC_ROWS_WIDENED, CUBIC_ROWS = 64, {"cpu": 64, "cuda": 512}, 16

Added = Callable[[Array, int, tuple[int, int]], Array]


class Arithmetic(Protocol):
    """What an engine computes of bicubic interpolation."""

    @property
    def device(self) -> Device: ...

    def array(self, x: NDArray[Any]) -> Array: ...

    def matmul(self, a: Array, b: Array) -> Array:
        """Of two matrices."""
        ...


class Parts(Arithmetic, Protocol):
    """What an engine computes of a LeanLIFF."""

    def through(self) -> Sequence[Callable[[Array], Array]]:
        """The blocks, each on [1, C, rows + 2, W / 2] to [1, C, rows, W / 2]."""
        ...

    def embedded(self, low: Array, span: tuple[int, int]) -> Array:
        """Rows ``span`` (first, last + 1), at half of the size of ``low`` [1, 3, h, w], of what blocks begin with."""
        ...

    def added(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> Added:
        """For layers of these sizes and rows of the target: what turns what the blocks give [n, w / 2, C] from a row
        on, and a span of ``rows``, to what is added to bicubic interpolation there [span, 3, W]."""
        ...


def predict(parts: Parts, low: Array, size: tuple[int, int], rows: tuple[int, int]) -> Array:
    """Rows ``rows`` (first, last + 1) of the prediction of a layer of ``size`` from the one below, ``low``
    [1, 3, h, w], uint8 or in 0..1: float32 [1, 3, rows, W]."""
    height, width = low.shape[-2:]
    out = cubic(parts, low, size, rows)
    added = parts.added((height, width), size, rows)
    begin, last = ((2 * i + 1) * height // (2 * size[0]) // 2 for i in (rows[0], rows[1] - 1))
    for i, x in _strips(parts, low, begin, last + 1):
        span = [min(max(rows[0], first(2 * k, height, size[0])), rows[1]) for k in (i, i + x.shape[0])]
        out[span[0] - rows[0] : span[1] - rows[0]] += added(x, i, (span[0], span[1]))
    return space(out).swapaxes(out, 0, 1)[None]


def _strips(parts: Parts, low: Array, begin: int, last: int) -> Iterator[tuple[int, Array]]:
    """What the blocks give in rows ``begin`` to ``last`` - 1 at half of the lower layer's size: the row that a strip
    starts at, and the strip [n, w / 2, C]."""
    half, blocks = (low.shape[-2] + 1) // 2, parts.through()
    reach = len(blocks) + 1
    top, bottom = max(0, begin - reach), min(half, last + reach)
    step = max(1, PLACES[parts.device.type] // ((low.shape[-1] + 1) // 2))

    def embedded() -> Iterator[flow.Strip]:
        for i in range(top, bottom, step):
            end = min(i + step, bottom)
            yield parts.embedded(low, (i, end)), end == bottom

    for strip, _ in flow.blocks(blocks, embedded()):
        x = space(strip).moveaxis(strip[0], 0, 2)
        wanted = x[max(0, begin - top) : max(0, last - top)]
        if len(wanted):
            yield max(begin, top), wanted
        top += len(x)


def cubic(parts: Arithmetic, low: Array, size: tuple[int, int], rows: tuple[int, int]) -> Array:
    """Bicubic interpolation at ``rows``: [rows, 3, W]. The target may be smaller, too."""
    height, width = low.shape[-2:]
    xp, out = space(low), []
    down, taps = bicubic_taps(height, size[0], rows), bicubic_taps(width, size[1], (0, size[1]))
    columns = []
    for left, right in spans(size[1], CUBIC_COLUMNS):
        x = sources(width, size[1], left, right)
        columns.append((slice(*x), parts.array(as_matrix((taps[0][left:right], taps[1][left:right]), *x).T)))
    few, many = (max(1, n * size[0] // height) for n in (CUBIC_ROWS, CUBIC_ROWS_WIDENED[parts.device.type]))
    for start in range(*rows, many):
        end = min(start + many, rows[1])
        top, bottom = sources(height, size[0], start, end)
        part = in_unit(xp.swapaxes(low[0][:, top:bottom], 0, 1)).reshape(-1, width)
        wide = xp.concatenate([parts.matmul(part[:, x], weights) for x, weights in columns], 1)
        wide = wide.reshape(bottom - top, -1)
        for begin in range(start, end, few):
            last = min(begin + few, end)
            k, y = slice(begin - rows[0], last - rows[0]), sources(height, size[0], begin, last)
            weights = parts.array(as_matrix((down[0][k], down[1][k]), *y))
            out.append(parts.matmul(weights, wide[y[0] - top : y[1] - top]).reshape(last - begin, 3, -1))
    return xp.concatenate(out)
