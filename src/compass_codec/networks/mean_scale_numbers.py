"""The numbers that the mean-scale networks are made with, whatever computes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compass_codec.entropy import scale_levels
from compass_codec.errors import WeightsError

# The rate-distortion trade-offs that have a gain vector of their own; between them gains are interpolated.
LAMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)
LEAK = 2.0**-7  # a power of two, so that the hyper-decoder has an exact integer form
PEDESTAL = 2.0**-36  # of GDN
BETA_LEAST = 1e-6
# of the hyper-decoder in integers, see hyper.py
ACTIVATION_BITS = 12  # fractional bits of activations, scales and means
WEIGHT_BITS = 16  # fractional bits of weights
CLAMP = 2.0**24  # of activations; such integers are exact in float32 too


def half(side: int) -> int:
    """Samples left of ``side`` after a convolution of stride 2 with layer-wise padding."""
    return (side + 1) // 2


def stages(size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Sizes (height, width) before each of ``count`` halvings, and after the last: ``count + 1`` of them."""
    sizes = [size]
    for _ in range(count):
        sizes.append((half(sizes[-1][0]), half(sizes[-1][1])))
    return sizes


def latent_size(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of y, of a layer of ``size``."""
    return stages(size, 4)[-1]


def hyper_size(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of z."""
    return stages(size, 6)[-1]


def quality_to_lambda(quality: float) -> float:
    """Quality 1..100 to a Lagrangian multiplier, log-linear over the trained range."""
    t = (quality - 1) / 99
    return math.exp((1 - t) * math.log(LAMBDAS[0]) + t * math.log(LAMBDAS[-1]))


def integers(
    weight: NDArray[Any], bias: NDArray[Any], transposed: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [out, in, k, k], or [in, out, k, k] of a ``transposed`` convolution, and bias as integers in float64.
    Raises WeightsError where sums would not be exact."""
    whole = np.round(weight.astype(np.float64) * 2.0**WEIGHT_BITS)
    offset = np.round(bias.astype(np.float64) * 2.0 ** (WEIGHT_BITS + ACTIVATION_BITS))
    reach = np.abs(whole).sum((0, 2, 3) if transposed else (1, 2, 3)) * CLAMP + np.abs(offset)
    if not reach.max() < 2.0**52:
        raise WeightsError("the hyper-decoder's weights are too large for exact integer arithmetic")
    return whole, offset


def scale_bounds() -> NDArray[np.float64]:
    """Between the scales of two indices [63], as activations: the nearer level in log scale is taken."""
    levels = scale_levels()
    bounds: NDArray[np.float64] = np.round(np.sqrt(levels[:-1] * levels[1:]) * 2.0**ACTIVATION_BITS)
    return bounds
