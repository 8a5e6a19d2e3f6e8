"""BD-rate and BD-PSNR (Bjontegaard 2001): how far two rate-distortion curves are apart, on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # x, rising, and y

FEWEST = 4  # points a curve must have


@dataclass(frozen=True)
class BDRate:
    """``percent``: below zero when the tested codec needs fewer bits, over PSNR ``low``..``high`` in dB."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:+.2f} % over {self.low:.2f} to {self.high:.2f} dB"


def _curve(rate: Sequence[float], psnr: Sequence[float]) -> Points:
    """PSNR and log rate of the points, by rising PSNR."""
    import numpy as np

    if len(rate) != len(psnr) or len(rate) < FEWEST:
        raise ValueError(f"a rate-distortion curve needs at least {FEWEST} points, each with a rate and a PSNR")
    order = np.argsort(psnr)
    x, y = np.asarray(psnr, float)[order], np.log(np.asarray(rate, float)[order])
    if (np.diff(x) <= 0).any() or not np.isfinite(y).all():
        raise ValueError("a rate-distortion curve needs positive rates and PSNRs that differ")
    return x, y


def _difference(first: Points, second: Points, what: str) -> tuple[float, float, float]:
    """Mean of ``second`` minus ``first``, each (x, y) with rising x, over the x that both cover; and that range."""
    from scipy.interpolate import PchipInterpolator

    low, high = max(first[0][0], second[0][0]), min(first[0][-1], second[0][-1])
    if low >= high:
        raise ValueError(f"the two rate-distortion curves have no {what} in common")
    area = PchipInterpolator(*second).integrate(low, high) - PchipInterpolator(*first).integrate(low, high)
    return float(area) / float(high - low), float(low), float(high)


def bd_rate(
    anchor_rate: Sequence[float], anchor_psnr: Sequence[float], rate: Sequence[float], psnr: Sequence[float]
) -> BDRate:
    """Mean difference of log rate over the PSNR range that both curves cover, with PCHIP.

    Rates in any unit, PSNR (or any other quality) in dB, points in any order. Raises ValueError for fewer than four
    points, or when the curves have no PSNR in common.
    """
    mean, low, high = _difference(_curve(anchor_rate, anchor_psnr), _curve(rate, psnr), "PSNR")
    return BDRate(100 * math.expm1(mean), low, high)


def bd_psnr(
    anchor_rate: Sequence[float], anchor_psnr: Sequence[float], rate: Sequence[float], psnr: Sequence[float]
) -> float:
    """Mean difference of PSNR in dB over the log rates that both curves cover, with PCHIP: above zero when the tested
    codec is better. Raises ValueError as bd_rate does, and when more bits do not give a higher PSNR."""
    first, second = _curve(anchor_rate, anchor_psnr), _curve(rate, psnr)
    if any((log_rate[1:] <= log_rate[:-1]).any() for _, log_rate in (first, second)):
        raise ValueError("more bits do not give a higher PSNR")
    return _difference(first[::-1], second[::-1], "rate")[0]
