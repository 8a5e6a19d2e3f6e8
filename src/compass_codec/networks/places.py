"""Where the samples of a target lie among those of the layer below, along one axis. Integer arithmetic decides what is
nearest, so every device agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def nearest(low: int, high: int, span: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For ``span`` of the ``high`` target samples along an axis: index of the nearest of ``low`` samples, and offset.

    The offset is the paper's local grid, target minus source coordinate in -1..1 coordinates, times ``low`` so
    that it spans -1..1 within a source sample (LIIF's convention).
    """
    i = np.arange(*span)
    source = (2 * i + 1) * low // (2 * high)
    offset = ((2 * i + 1) * low - (2 * source + 1) * high) / high
    return source, offset.astype(np.float32)


def first(row: Any, low: int, high: int) -> Any:
    """The first of ``high`` target samples along an axis whose nearest of ``low`` samples is ``row`` or one after it;
    integers or arrays of them."""
    return -((low - 2 * high * row) // (2 * low))


def sources(low: int, high: int, first: int, last: int) -> tuple[int, int]:
    """The source samples (first, last + 1) of bicubic interpolation at target samples ``first`` to ``last`` - 1."""
    top, bottom = ((2 * i + 1) * low // (2 * high) for i in (first, last - 1))
    return max(0, top - 2), min(low, bottom + 3)


def bicubic_taps(low: int, high: int, span: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The source samples [target samples of ``span``, 4] that bicubic interpolation works on along an axis, and their
    weights: Keys' kernel with a = -0.75, the edge sample repeated."""
    position = (np.arange(*span, dtype=np.float64) + 0.5) * low / high - 0.5
    source = np.floor(position)[:, None] + np.arange(-1, 3)
    t = np.abs(position[:, None] - source)
    inner = (1.25 * t - 2.25) * t * t + 1
    outer = -0.75 * (((t - 5) * t + 8) * t - 4)
    return source.clip(0, low - 1).astype(np.int64), np.where(t <= 1, inner, outer)


def as_matrix(taps: tuple[NDArray[np.int64], NDArray[np.float64]], first: int, last: int) -> NDArray[np.float32]:
    """Sources and weights [N, 4] as a matrix [N, source samples first..last - 1]."""
    source, weights = taps
    matrix = np.zeros((len(source), last - first))
    np.add.at(matrix, (np.arange(len(source))[:, None], source - first), weights)
    return matrix.astype(np.float32)
