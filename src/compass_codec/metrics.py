"""How much two pictures differ."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def squared_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """Sum of squared differences of two uint8 pictures of one shape."""
    # a few rows at a time: all integers of a large picture take a gigabyte
    parts = ((a[row : row + 64], b[row : row + 64]) for row in range(0, len(a), 64))
    return sum(int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in parts)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB; infinite when they are equal. With
    ``alpha``, uint8 [height, width], each pixel counts as much as it shows; infinite when none does."""
    if alpha is None:
        squares, samples = squared_error(a, b), a.size
    else:
        rows = ((a[k], b[k], alpha[k]) for k in range(len(a)))  # one at a time, for memory
        squares = sum(int((np.square(x.astype(np.int64) - y).sum(1) * weight).sum()) for x, y, weight in rows)
        samples = a.shape[2] * int(alpha.sum(dtype=np.int64))
    return 10 * math.log10(255**2 * samples / squares) if squares else math.inf
