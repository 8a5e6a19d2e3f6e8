"""The filter of a layer: a few numbers, found for this very picture, that take a decoded layer nearer to it.

It is an adaptive loop filter as video codecs have one. To each sample is added a weighted sum of how much the samples
around it differ from it, where differences beyond a bound count as the bound: small ones are noise that the codec left,
large ones are edges. Then each channel may take something of the others and an offset. All of it is arithmetic in
integers, so that it is the same on every device; the layer above is predicted from what comes out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from compass_codec.errors import FormatError
from compass_codec.side import MAX_FILTER

# Rows and columns away. The samples on both sides have one weight. The first few lie nearest.
TAPS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (2, 1), (1, -2), (2, -1), (2, 2), (2, -2))
NEAREST, REACH = 4, 2
BOUNDS = 3  # a first one, the second, which is WIDER times as large, and none
WIDER = 5
BITS = 9  # fractional bits of weights
MIDDLE, OFFSET = 128, 64  # what channels count from, and what the weight of an offset is multiplied with
LARGEST = 2047  # of a weight
BOUNDS_MASK, MANY_TAPS, COLOUR = 7, 8, 16  # bits of the first byte
BLOCK = 64, 512  # rows and columns that are filtered at once
PROBE = 32, 128  # and those that a filter is found from, of which
PROBES = 96  # are enough
RIDGE = 1.0


@dataclass(frozen=True)
class Filter:
    """``weights`` int32 [BOUNDS, len(TAPS)] and ``colour`` int32 [3, 4] (what a channel takes of the three, and an
    offset) in units of 2**-BITS, 0 where there is none; ``bound`` 1..51, the first one."""

    bound: int
    weights: np.ndarray
    colour: np.ndarray

    @property
    def limits(self) -> tuple[int, ...]:
        """What differences are clipped to, for each of the bounds."""
        return self.bound, WIDER * self.bound, 255


def differences(samples: np.ndarray, limits: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Of samples int16 [height, width, 3] with REACH more on every side: for each of TAPS and ``limits`` their numbers,
    and the sums int16 [height, width, 3] of how much the two samples there differ from the one in the middle."""
    h, w = samples.shape[0] - 2 * REACH, samples.shape[1] - 2 * REACH
    for tap, (down, right) in enumerate(TAPS):
        # from REACH - down rows on, so that what is ``down`` rows below itself is there as well
        top, left, right_too = REACH - down, REACH - max(right, 0), REACH - min(right, 0)
        near = samples[top : REACH + h, left : w + right_too]
        far = samples[top + down : REACH + h + down, left + right : w + right_too + right]
        steps = far - near
        for k, limit in enumerate(limits):
            cut = steps if limit >= 255 else np.clip(steps, -limit, limit)
            at = max(right, 0), max(-right, 0)
            here = cut[down:, at[0] : at[0] + w]
            yield tap, k, here - cut[:h, at[1] : at[1] + w]


def blocks(layer: np.ndarray, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the parts of a layer, of ``size`` at most."""
    rows, columns = (
        [slice(start, min(start + step, side)) for start in range(0, side, step)]
        for side, step in zip(layer.shape, size, strict=False)
    )
    return list(product(rows, columns))


def probes(layer: np.ndarray) -> list[tuple[slice, slice]]:
    """The blocks that a filter is found from, drawn alike each time: a fixed step might keep to one column."""
    parts = blocks(layer, PROBE)
    return parts if len(parts) <= PROBES else random.Random(0).sample(parts, PROBES)


def bordered(layer: np.ndarray, block: tuple[slice, slice]) -> np.ndarray:
    """A block of a layer, uint8 [height, width, 3], as int16 with REACH more on every side, the outermost repeated."""
    rows, columns = (
        np.clip(np.arange(part.start - REACH, part.stop + REACH), 0, side - 1)
        for part, side in zip(block, layer.shape, strict=False)
    )
    return layer[rows[:, None], columns].astype(np.int16)


def apply(found: Filter, layer: np.ndarray) -> np.ndarray:
    """The layer, uint8 [height, width, 3], filtered."""
    done = np.empty_like(layer)
    for block in blocks(layer, BLOCK):
        samples = bordered(layer, block)
        here = samples[REACH:-REACH, REACH:-REACH].astype(np.int32)
        total = (here << BITS) + (1 << BITS - 1)
        if found.weights.any():
            for tap, k, sums in differences(samples, found.limits):
                if weight := found.weights[k, tap]:
                    total += np.multiply(sums, weight, dtype=np.int32)
        if found.colour.any():
            total += (here - MIDDLE) @ found.colour[:, :3].T + OFFSET * found.colour[:, 3]
        done[block] = np.clip(total >> BITS, 0, 255)
    return done


def find(picture: np.ndarray, layer: np.ndarray, error_counts: float) -> tuple[bytes, np.ndarray] | None:
    """The filter that brings ``layer`` nearer to ``picture``, both uint8 [height, width, 3], as bytes, and the filtered
    layer: by least squares, of as many weights as pay where a unit of squared error costs ``error_counts`` bits. None
    where none does, by what it predicts."""
    best, least = None, 0.0
    equations = Equations(picture, layer)
    for chosen in choices():
        found, saved = equations.solve(*chosen)
        if not (found.weights.any() or found.colour.any()):
            continue
        data = to_bytes(found)
        cost = 8 * len(data) - error_counts * saved
        if len(data) <= MAX_FILTER and cost < least:
            best, least = (data, found), cost
    return None if best is None else (best[0], apply(best[1], layer))


def choices() -> Iterator[tuple[int, int, bool]]:
    """What a filter may have: bounds (a bit for each), taps, and colour."""
    for mask, taps, colour in product(range(1 << BOUNDS), (NEAREST, len(TAPS)), (False, True)):
        if (mask or colour) and (mask or taps == NEAREST):
            yield mask, taps, colour


class Equations:
    """The normal equations of a layer's filter: unknowns are the weights, bound by bound, and those of colour, channel
    by channel. All in float64, which holds these sums of integers exactly, so that their order does not matter."""

    def __init__(self, picture: np.ndarray, layer: np.ndarray) -> None:
        shared, parts = BOUNDS * len(TAPS), probes(layer)
        missing = [picture[part].astype(np.int16) - layer[part] for part in parts]
        error = sum(float(np.square(m, dtype=np.int32).sum()) for m in missing)
        count = sum(m.size for m in missing)
        self.scale = layer.size / count
        self.bound = min(255 // WIDER, max(1, round(math.sqrt(error / count))))
        limits = Filter(self.bound, np.empty(0), np.empty(0)).limits
        self.products, self.targets = np.zeros((shared + 12, shared + 12)), np.zeros(shared + 12)
        for part, wanted in zip(parts, missing, strict=True):
            samples = bordered(layer, part)
            terms = np.empty((3, shared + 4, *wanted.shape[:2]))
            for tap, k, sums in differences(samples, limits):
                terms[:, k * len(TAPS) + tap] = np.moveaxis(sums, 2, 0)
            terms[:, shared : shared + 3] = np.moveaxis(samples[REACH:-REACH, REACH:-REACH] - MIDDLE, 2, 0)
            terms[:, shared + 3] = OFFSET
            for channel, own in enumerate(terms.reshape(3, shared + 4, -1)):
                at = np.r_[0:shared, shared + 4 * channel : shared + 4 * channel + 4]
                self.products[np.ix_(at, at)] += own @ own.T
                self.targets[at] += own @ wanted[..., channel].ravel().astype(float)

    def solve(self, mask: int, taps: int, colour: bool) -> tuple[Filter, float]:
        """The best filter of those bounds and taps, and how much less squared error it leaves in the layer."""
        shared = BOUNDS * len(TAPS)
        used = [k * len(TAPS) + tap for k in range(BOUNDS) if mask >> k & 1 for tap in range(taps)]
        used += range(shared, shared + 12) if colour else ()
        products, targets = self.products[np.ix_(used, used)], self.targets[used]
        weights = np.linalg.solve(products + RIDGE * np.eye(len(used)), targets)
        weights = np.clip(np.rint(weights * 2**BITS), -LARGEST, LARGEST)
        every = np.zeros(shared + 12, np.int32)
        every[used] = weights
        weights /= 2**BITS
        saved = 2 * weights @ targets - weights @ products @ weights
        found = Filter(self.bound, every[:shared].reshape(BOUNDS, len(TAPS)), every[shared:].reshape(3, 4))
        return found, self.scale * float(saved)


def to_bytes(found: Filter) -> bytes:
    """What :func:`from_bytes` reads."""
    mask = sum(1 << k for k in range(BOUNDS) if found.weights[k].any())
    many = bool(found.weights[:, NEAREST:].any())
    colour = bool(found.colour.any())
    head = [mask | (MANY_TAPS if many else 0) | (COLOUR if colour else 0)]
    if mask & 3:
        head.append(found.bound)
    used = [k for k in range(BOUNDS) if mask >> k & 1]
    groups = found.weights[used, : len(TAPS) if many else NEAREST].ravel(), found.colour.ravel()[: 12 * colour]
    low, bits = [], ""
    for values in groups:
        coded = [_rice(values.tolist(), k) for k in range(12)]
        low.append(min(range(12), key=lambda k: len(coded[k])))
        bits += coded[low[-1]]
    head.append(low[0] | low[1] << 4)
    bits += "0" * (-len(bits) % 8)
    return bytes(head) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def from_bytes(data: bytes) -> Filter:
    """Raises FormatError where ``data`` is no filter."""
    problem = FormatError("the header's filter makes no sense")
    fields = iter(data)
    try:
        first = next(fields)
        mask = first & BOUNDS_MASK
        bound = next(fields) if mask & 3 else 1
        low = next(fields)
    except StopIteration:
        raise problem from None
    used = [k for k in range(BOUNDS) if mask >> k & 1]
    taps = len(TAPS) if first & MANY_TAPS else NEAREST
    colour = bool(first & COLOUR)
    if (
        first >= 2 * COLOUR
        or not (mask or colour)
        or (first & MANY_TAPS and not mask)
        or not 1 <= bound <= 255 // WIDER
    ):
        raise problem
    bits = "".join(f"{byte:08b}" for byte in fields)
    values, at = [], 0
    for count, k in ((len(used) * taps, low & 15), (12 if colour else 0, low >> 4)):
        for _ in range(count):
            stop = bits.find("0", at)
            if stop < 0 or stop + 1 + k > len(bits):
                raise problem
            value = (stop - at) << k | int(bits[stop + 1 : stop + 1 + k] or "0", 2)
            at = stop + 1 + k
            if value > 2 * LARGEST:
                raise problem
            values.append(value // 2 if value % 2 == 0 else -(value + 1) // 2)
    if len(bits) - at > 7 or "1" in bits[at:]:
        raise problem
    weights, rest = np.zeros((BOUNDS, len(TAPS)), np.int32), len(used) * taps
    weights[used, :taps] = np.reshape(values[:rest], (-1, taps))
    return Filter(bound, weights, np.array(values[rest:] or [0] * 12, np.int32).reshape(3, 4))


def _rice(values: Sequence[int], k: int) -> str:
    """Golomb-Rice codes of integers: v >= 0 as 2v, v < 0 as -2v - 1, its part above ``k`` bits in unary."""
    folded = [2 * v if v >= 0 else -2 * v - 1 for v in values]
    return "".join("1" * (u >> k) + "0" + (f"{u & (1 << k) - 1:0{k}b}" if k else "") for u in folded)
