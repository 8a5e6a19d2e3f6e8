"""Find the quality that meets a size or the value of a metric, in few encodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from compass_codec.metrics import METRICS

T = TypeVar("T")

LOWEST, HIGHEST, STEP = 1.0, 100.0, 0.01
START = 50.0
SIZE_WINDOW = 0.02  # a file may be this much smaller than asked for
# How much better than asked for a picture may be, on the axis of a metric.
WINDOWS = {"psnr": 0.1, "ms-ssim": 0.1, "butteraugli": 0.05, "ssimulacra2": 0.5}
# The gain of one step of quality, measured on photographs; only the second encode depends on it.
LOG_BYTES_SLOPE = 0.018
SLOPES = {"psnr": 0.075, "ms-ssim": 0.11, "butteraugli": 0.023, "ssimulacra2": 0.7}


@dataclass(frozen=True)
class Target:
    """A target: bytes of the whole file ("size"), bits of the whole file for each pixel of the top layer
    ("bpp"), or the value of the top layer by one of metrics.METRICS, such as dB ("psnr")."""

    kind: str
    value: float

    @property
    def of_size(self) -> bool:
        return self.kind in ("size", "bpp")

    def most_bytes(self, pixels: int) -> int:
        """The largest file that a target of size or bpp allows."""
        return max(1, math.floor(self.value * pixels / 8 if self.kind == "bpp" else self.value))

    def __str__(self) -> str:
        if self.kind == "size":
            return f"{self.value:.0f} bytes"
        return f"{self.value:g} bpp" if self.of_size else METRICS[self.kind].asked(self.value)


@dataclass(frozen=True)
class Found(Generic[T]):
    """One encode: quality, bytes and the value by the target's metric, what it made, and the number of encodes so far.
    ``reached`` is False when the target lies beyond the end of the scale, ``near`` when one step of quality leads past
    what is near to it."""

    quality: float
    bytes: int
    value: float
    result: T
    encodes: int
    reached: bool = True
    near: bool = True


def search(
    target: Target, pixels: int, encode: Callable[[float], T], measure: Callable[[T], tuple[int, float]]
) -> Found[T]:
    """The best quality for ``target``: the largest file that is not above it, the worst picture that is not worse.

    ``encode`` encodes at a quality, and ``measure`` gives bytes and the value by the target's metric of its result;
    ``pixels`` are those of the top layer. A result within 2 % or WINDOWS (0.1 dB) is taken, or the nearest step of 0.01
    where one step changes more than that.
    """
    of_size = target.of_size
    axis = float if of_size else METRICS[target.kind].axis
    if of_size:
        high, slope = math.log(target.most_bytes(pixels)), LOG_BYTES_SLOPE
        low = high + math.log1p(-SIZE_WINDOW)
    else:
        low, slope = axis(target.value), SLOPES[target.kind]
        high = low + WINDOWS[target.kind]
    aim = (low + high) / 2

    def height(found: Found[T]) -> float:
        """On a curve that is nearly a straight line over the quality."""
        return math.log(found.bytes) if of_size else axis(found.value)

    below: Found[T] | None = None
    above: Found[T] | None = None
    before: Found[T] | None = None
    quality, count = START, 0
    while True:
        count += 1
        result = encode(quality)
        found = Found(quality, *measure(result), result, count)
        here = height(found)
        if low <= here <= high:
            return found
        if here < low:
            below = found
        else:
            above = found
        if (here < low and quality == HIGHEST) or (here > high and quality == LOWEST):
            return replace(found, reached=False)
        if below and above:
            room = above.quality - below.quality
            if room < 1.5 * STEP:
                return replace(below if of_size else above, encodes=count, near=False)
            # halving now and then makes sure of the end on a curve with steps; equal pictures have infinite PSNR
            halve = count % 4 == 0 or math.isinf(height(above))
            share = 0.5 if halve else (aim - height(below)) / (height(above) - height(below))
            guess = below.quality + share * room
        else:
            if before:
                # noise must not turn the line round
                measured = (here - height(before)) / (quality - before.quality)
                slope = min(max(measured, slope / 3), slope * 3)
            guess = quality + (aim - here) / slope
        before = found
        least = below.quality + STEP if below else LOWEST
        most = above.quality - STEP if above else HIGHEST
        quality = round(min(max(guess, least), most), 2)
