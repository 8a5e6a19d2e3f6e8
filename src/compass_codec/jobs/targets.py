"""Find the quality that meets a size or a PSNR, in few encodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

LOWEST, HIGHEST, STEP = 1.0, 100.0, 0.01
START = 50.0
SIZE_WINDOW = 0.02  # a file may be this much smaller than asked for
PSNR_WINDOW = 0.1  # dB that a picture may be better than asked for
# The gain of one step of quality, measured on photographs; only the second encode depends on it.
LOG_BYTES_SLOPE = 0.018
PSNR_SLOPE = 0.075


@dataclass(frozen=True)
class Target:
    """A target: bytes of the whole file ("size"), bits of the whole file for each pixel of the top layer
    ("bpp"), or dB of the top layer ("psnr")."""

    kind: Literal["size", "bpp", "psnr"]
    value: float

    def most_bytes(self, pixels: int) -> int:
        """The largest file that a target of size or bpp allows."""
        return max(1, math.floor(self.value * pixels / 8 if self.kind == "bpp" else self.value))

    def __str__(self) -> str:
        if self.kind == "size":
            return f"{self.value:.0f} bytes"
        return f"{self.value:g} {'dB' if self.kind == 'psnr' else 'bpp'}"


@dataclass(frozen=True)
class Found(Generic[T]):
    """One encode: quality, bytes and PSNR, what it made, and the number of encodes so far. ``reached`` is False when
    the target lies beyond the end of the scale, ``near`` when one step of quality leads past what is near to it."""

    quality: float
    bytes: int
    psnr: float
    result: T
    encodes: int
    reached: bool = True
    near: bool = True


def search(
    target: Target, pixels: int, encode: Callable[[float], T], measure: Callable[[T], tuple[int, float]]
) -> Found[T]:
    """The best quality for ``target``: the largest file that is not above it, the smallest PSNR that is not below.

    ``encode`` encodes at a quality, and ``measure`` gives (bytes, PSNR) of its result; ``pixels`` are those of the top
    layer. A result within 2 % or 0.1 dB is taken, or the nearest step of 0.01 where one step changes more than that.
    """
    of_size = target.kind != "psnr"
    if of_size:
        high, slope = math.log(target.most_bytes(pixels)), LOG_BYTES_SLOPE
        low = high + math.log1p(-SIZE_WINDOW)
    else:
        low, high, slope = target.value, target.value + PSNR_WINDOW, PSNR_SLOPE
    aim = (low + high) / 2

    def height(found: Found[T]) -> float:
        """On a curve that is nearly a straight line over the quality."""
        return math.log(found.bytes) if of_size else found.psnr

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
