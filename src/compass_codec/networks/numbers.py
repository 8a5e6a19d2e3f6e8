"""The numbers that the lean networks are made with, whatever computes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The rate-distortion trade-offs that have gains of their own; between them gains are interpolated.
LAMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)
UNSHUFFLE = 8  # pixels along the side of a place at 1/8
CELL = 16  # pixels along the side of a cell of y
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # first row and column of a phase: every second row and column from there
STEPS = len(PHASES)
EPSILON = 1e-6  # of the mean square in the norm
CONTEXT, FACTORIZED = "context", "factorized"
POOLINGS = 2  # by 2, from y to the coarsest scale of a pyramid: a place of that lies on each of z
# of integer networks, see exact.py
INTEGERS = "exact."  # what the names of their tensors start with in a set of weights
ACTIVATION = 511  # largest magnitude of an activation
WEIGHT = 127  # of a weight
EXACT = 2**24  # float32 holds every integer below
FINE = 16  # parts of the distance between two scale levels in which log scales are added up
MEAN_UNIT = 64  # means are multiples of one over it
MEAN_LIMIT = 2**15 - 1  # of means in these units


class EntropyModel(NamedTuple):
    """Whether it has hyper networks, how many networks its context model has, and in how many groups of channels the
    places of a scale are coded if it is a pyramid; see order.py."""

    hyper: bool
    networks: int = 0
    groups: int = 0


# Entropy models by their names in model.json.
ENTROPY = {
    CONTEXT: EntropyModel(True, STEPS - 1),
    "hyperprior": EntropyModel(True),
    FACTORIZED: EntropyModel(False),
    "pyramid": EntropyModel(True, 1, 3),
    "pyramid-fast": EntropyModel(True, 1, 1),
}


def entropy_model(name: str) -> EntropyModel:
    """Of ENTROPY. Raises ValueError for a name that it lacks."""
    if name not in ENTROPY:
        raise ValueError(f"entropy model {name!r}; this version has {', '.join(ENTROPY)}")
    return ENTROPY[name]


def check_exact(name: str, weight: NDArray[Any], bias: NDArray[Any], scale: NDArray[Any]) -> None:
    """Raises ValueError for weights [out, in, k, k], bias and scale of an integer convolution that is not exact."""
    fits = weight.dtype == np.int8 and len(weight) == len(bias) == len(scale)
    if fits:
        sums = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1) * ACTIVATION
        fits = bool((sums + np.abs(bias.astype(np.int64))).max() < EXACT)
    if not fits:
        raise ValueError(f"{name}: weights that are not exact")
