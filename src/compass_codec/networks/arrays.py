"""Arrays of whatever computes: NumPy's, or tensors of PyTorch on a CPU or a GPU.

Code that only cuts, joins and rounds takes both: ``space`` finds the functions that they share by name and order of
arguments. PyTorch is not imported here, as whoever made a tensor has done that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = Any  # NDArray or Tensor


def space(x: Array) -> Any:
    """The module, numpy or torch, whose functions take ``x``."""
    return np if isinstance(x, np.ndarray) else sys.modules["torch"]


def cast(x: Array, kind: str) -> Array:
    """``x`` in another type, as "float32"."""
    return x.astype(kind, copy=False) if isinstance(x, np.ndarray) else x.to(getattr(space(x), kind))


def copy(x: Array) -> Array:
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def of_height(x: Array, height: int) -> Array:
    """An array [1, C, height, W], channels last in memory and not set to anything, for strips [1, C, rows, W] as
    ``x``."""
    shape = (1, height, x.shape[3], x.shape[1])
    empty = np.empty(shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(shape)
    return space(x).moveaxis(empty, 3, 1)


def channels_last(x: Array) -> Array:
    """``x`` [B, C, H, W] as convolutions of PyTorch want it; of NumPy as it is."""
    return x if isinstance(x, np.ndarray) else x.contiguous(memory_format=space(x).channels_last)


def in_unit(x: Array) -> Array:
    """Samples, uint8 or in 0..1, in 0..1."""
    return cast(x, "float32") / 255 if str(x.dtype).endswith("uint8") else cast(x, "float32")


def to_tensor(picture: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [height, width, 3] to uint8 [1, 3, height, width]; on the CPU a view."""
    return to_device(picture, device).permute(2, 0, 1)[None]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor: on the CPU a view where it can be, to a GPU through pinned memory and without waiting."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(x: Array) -> NDArray[Any]:
    """As an array of NumPy: of what is in memory already a view, from a GPU through pinned memory."""
    if isinstance(x, np.ndarray):
        return x
    torch = space(x)
    if x.device.type != "cpu":
        x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    found: NDArray[Any] = x.numpy()
    return found


def to_bytes(x: Array) -> NDArray[np.uint8]:
    """[1, 3, height, width] in 0..1 to uint8 [height, width, 3]. Layers are predicted from this, at both ends, so
    differences between devices in the last bit of a float mostly vanish and do not add up."""
    pixels = x[0].clip(0, 1)
    pixels *= 255
    return to_host(space(x).moveaxis(cast(space(x).round(pixels), "uint8"), 0, 2))
