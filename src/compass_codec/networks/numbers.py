"""The numbers that the lean networks are made with, whatever computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The rate-distortion trade-offs that have gains of their own; between them gains are interpolated.
LAMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)
UNSHUFFLE = 8  # pixels along the side of a place at 1/8
CELL = 16  # pixels along the side of a cell of y
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # first row and column of a phase: every second row and column from there
STEPS = len(PHASES)
EPSILON = 1e-6  # of the mean square in the norm
FACTORIZED = "factorized"
# Entropy models by their names in model.json: whether they have hyper networks, and whether they have a context model.
ENTROPY = {"context": (True, True), "hyperprior": (True, False), FACTORIZED: (False, False)}
# of integer networks, see exact.py
INTEGERS = "exact."  # what the names of their tensors start with in a set of weights
ACTIVATION = 511  # largest magnitude of an activation
WEIGHT = 127  # of a weight
EXACT = 2**24  # float32 holds every integer below
FINE = 16  # parts of the distance between two scale levels in which log scales are added up
MEAN_UNIT = 64  # means are multiples of one over it
MEAN_LIMIT = 2**15 - 1  # of means in these units


def entropy_parts(name: str) -> tuple[bool, bool]:
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
