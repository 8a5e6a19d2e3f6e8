"""Shared by layer codecs: the encoder's rounding of latents to symbols, and networks that hold loaded tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec import entropy

N = TypeVar("N", bound=nn.Module)

# Rate-aware rounding: a latent is rounded away from zero above the threshold 0.5 + BEYOND * bits, at most 0.5 +
# MOST_BEYOND, where bits are those that the larger symbol costs more. This saves some 2 % of the bits of training
# pictures. The decoder does not depend on it.
BEYOND, MOST_BEYOND = 1 / 75, 0.25
MAGNITUDES = 4  # the number of magnitudes with thresholds of their own
LATENT_LIMIT = 2**15 - 1  # largest magnitude of a symbol of y, which the encoder holds in 16 bits


def quantise(centred: Tensor, index: Tensor, least: Tensor) -> Tensor:
    """Rate-aware rounding of latents less their means, with scale indices ``index`` (uint8); ``least`` is the result of
    ``thresholds``."""
    magnitude = centred.abs()
    below = magnitude.floor()
    column = below.clamp(max=MAGNITUDES - 1).to(torch.uint8)
    # 64 scale indices of 4 magnitudes: the position fits a byte
    beyond = magnitude.sub_(below) > least[(index * MAGNITUDES + column).int()]
    return below.add_(beyond).copysign_(centred).clamp_(-LATENT_LIMIT, LATENT_LIMIT)


def thresholds(tables: entropy.Tables) -> NDArray[np.float32]:
    """The fraction above which a latent between the magnitudes m and m + 1 becomes m + 1, for each scale index and m:
    float32 [LEVELS * MAGNITUDES]. The last m stands for all larger ones. A symbol without a frequency of its own has
    that of the escape."""
    found = np.full((len(tables.y), MAGNITUDES), 0.5, np.float32)
    for row, table in zip(found, tables.y, strict=True):
        more = np.diff(-np.log2(table.freq[table.width :][: MAGNITUDES + 1].astype(float)))
        row += np.clip(BEYOND * np.pad(more, (0, MAGNITUDES - len(more)), "edge"), 0, MOST_BEYOND)
    return found.ravel()


def fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` returns with ``tensors`` as its weights; random weights are never drawn."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)
