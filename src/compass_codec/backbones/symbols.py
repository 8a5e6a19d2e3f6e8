"""Shared by layer codecs: the encoder's rounding of latents to symbols."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compass_codec import entropy
from compass_codec.networks.arrays import Array, cast, space

# Rate-aware rounding: a latent is rounded away from zero above the threshold 0.5 + BEYOND * bits, at most 0.5 +
# MOST_BEYOND, where bits are those that the larger symbol costs more. This saves some 2 % of the bits of training
# pictures. The decoder does not depend on it.
BEYOND, MOST_BEYOND = 1 / 75, 0.25
MAGNITUDES = 4  # the number of magnitudes with thresholds of their own
LATENT_LIMIT = 2**15 - 1  # largest magnitude of a symbol of y, which the encoder holds in 16 bits


def quantise(centred: Array, index: Array, least: Array) -> Array:
    """Rate-aware rounding of latents less their means, with scale indices ``index`` (uint8); ``least`` is the result of
    ``thresholds``."""
    magnitude = abs(centred)
    below = space(centred).floor(magnitude)
    magnitude -= below
    column = cast(below.clip(0, MAGNITUDES - 1), "uint8")
    # 64 scale indices of 4 magnitudes: the position fits a byte
    below += magnitude > least[cast(index * MAGNITUDES + column, "int32")]
    return space(centred).copysign(below, centred).clip(-LATENT_LIMIT, LATENT_LIMIT)


def thresholds(tables: entropy.Tables, beyond: float = BEYOND, most: float = MOST_BEYOND) -> NDArray[np.float32]:
    """The fraction above which a latent between the magnitudes m and m + 1 becomes m + 1, for each scale index and m:
    float32 [LEVELS * MAGNITUDES]. The last m stands for all larger ones. A symbol without a frequency of its own has
    that of the escape."""
    found = np.full((len(tables.y), MAGNITUDES), 0.5, np.float32)
    for row, table in zip(found, tables.y, strict=True):
        more = np.diff(-np.log2(table.freq[table.width :][: MAGNITUDES + 1].astype(float)))
        row += np.clip(beyond * np.pad(more, (0, MAGNITUDES - len(more)), "edge"), 0, most)
    return found.ravel()
