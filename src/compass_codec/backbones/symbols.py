"""What layer codecs share: the symbols an encoder makes of latents, and networks that hold loaded tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec import entropy

N = TypeVar("N", bound=nn.Module)

# Between two integers a latent becomes the larger, by magnitude, only beyond the middle: so much beyond it for each bit
# that the larger costs more, and at most so much. Some 2 % of the bits of training pictures; the decoder does not care.
BEYOND, MOST_BEYOND = 1 / 75, 0.25
MAGNITUDES = 4  # that have thresholds of their own
LATENT_LIMIT = 2**15 - 1  # of the symbols of y that the encoder makes; it holds them in 16 bits


def quantise(centred: Tensor, index: Tensor, least: Tensor) -> Tensor:
    """Symbols of latents less their means, of scale indices ``index`` (uint8); ``least`` are the ``thresholds``."""
    magnitude = centred.abs()
    below = magnitude.floor()
    column = below.clamp(max=MAGNITUDES - 1).to(torch.uint8)
    # indexed by what fits a byte: 64 scale indices of 4 magnitudes
    beyond = magnitude.sub_(below) > least[(index * MAGNITUDES + column).int()]
    return below.add_(beyond).copysign_(centred).clamp_(-LATENT_LIMIT, LATENT_LIMIT)


def thresholds(tables: entropy.Tables, beyond: float = BEYOND, most: float = MOST_BEYOND) -> NDArray[np.float32]:
    """For each scale index and magnitude m, float32 [LEVELS * MAGNITUDES]: what a latent must be beyond m to become
    m + 1. The last magnitude stands for larger ones; what has no frequency of its own costs an escape at least."""
    found = np.full((len(tables.y), MAGNITUDES), 0.5, np.float32)
    for row, table in zip(found, tables.y, strict=True):
        more = np.diff(-np.log2(table.freq[table.width :][: MAGNITUDES + 1].astype(float)))
        row += np.clip(beyond * np.pad(more, (0, MAGNITUDES - len(more)), "edge"), 0, most)
    return found.ravel()


def fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` makes, holding ``tensors``, without ever drawing random weights."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)
