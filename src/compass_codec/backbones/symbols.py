"""What layer codecs share: the symbols an encoder makes of latents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compass_codec import entropy
from compass_codec.networks.arrays import Array, cast, space

# Between two integers a latent becomes the larger, by magnitude, only beyond the middle: so much beyond it for each bit
# that the larger costs more, and at most so much. Some 2 % of the bits of training pictures; the decoder does not care.
BEYOND, MOST_BEYOND = 1 / 75, 0.25
MAGNITUDES = 4  # that have thresholds of their own
LATENT_LIMIT = 2**15 - 1  # of the symbols of y that the encoder makes; it holds them in 16 bits


def quantise(centred: Array, index: Array, least: Array) -> Array:
    """Symbols of latents less their means, of scale indices ``index`` (uint8); ``least`` are the ``thresholds``."""
    magnitude = abs(centred)
    below = space(centred).floor(magnitude)
    magnitude -= below
    column = cast(below.clip(0, MAGNITUDES - 1), "uint8")
    # indexed by what fits a byte: 64 scale indices of 4 magnitudes
    below += magnitude > least[cast(index * MAGNITUDES + column, "int32")]
    return space(centred).copysign(below, centred).clip(-LATENT_LIMIT, LATENT_LIMIT)


def thresholds(tables: entropy.Tables) -> NDArray[np.float32]:
    """For each scale index and magnitude m, float32 [LEVELS * MAGNITUDES]: what a latent must be beyond m to become
    m + 1. The last magnitude stands for larger ones; what has no frequency of its own costs an escape at least."""
    found = np.full((len(tables.y), MAGNITUDES), 0.5, np.float32)
    for row, table in zip(found, tables.y, strict=True):
        more = np.diff(-np.log2(table.freq[table.width :][: MAGNITUDES + 1].astype(float)))
        row += np.clip(BEYOND * np.pad(more, (0, MAGNITUDES - len(more)), "edge"), 0, MOST_BEYOND)
    return found.ravel()
