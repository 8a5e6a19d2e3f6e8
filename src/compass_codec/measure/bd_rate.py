"""BD-rate: how many per cent more or fewer bits one codec needs than another at equal quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4  # points a curve must have


@dataclass(frozen=True)
class BDRate:
    """``percent``: below zero when the tested codec needs fewer bits, over PSNR ``low``..``high`` in dB."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:+.2f} % over {self.low:.2f} to {self.high:.2f} dB"


def _log_rate(rate: Sequence[float], psnr: Sequence[float]):
    from scipy.interpolate import PchipInterpolator

    if len(rate) != len(psnr) or len(rate) < FEWEST:
        raise ValueError(f"a rate-distortion curve needs at least {FEWEST} points, each with a rate and a PSNR")
    order = np.argsort(psnr)
    x, y = np.asarray(psnr, float)[order], np.log(np.asarray(rate, float)[order])
    if (np.diff(x) <= 0).any() or not np.isfinite(y).all():
        raise ValueError("a rate-distortion curve needs positive rates and PSNRs that differ")
    return PchipInterpolator(x, y), x[0], x[-1]


def bd_rate(
    anchor_rate: Sequence[float], anchor_psnr: Sequence[float], rate: Sequence[float], psnr: Sequence[float]
) -> BDRate:
    """Mean difference of log rate over the PSNR range that both curves cover (Bjontegaard 2001), with PCHIP.

    Rates in any unit, PSNR in dB, points in any order. Raises ValueError for fewer than four points, or when the
    curves have no PSNR in common.
    """
    first, first_low, first_high = _log_rate(anchor_rate, anchor_psnr)
    second, second_low, second_high = _log_rate(rate, psnr)
    low, high = max(first_low, second_low), min(first_high, second_high)
    if low >= high:
        raise ValueError("the two rate-distortion curves have no PSNR in common")
    mean = (second.integrate(low, high) - first.integrate(low, high)) / (high - low)
    return BDRate(100 * float(np.expm1(mean)), float(low), float(high))
