"""Arrays of the host to tensors of a device and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(picture: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [height, width, 3] to uint8 [1, 3, height, width]; on the CPU a view."""
    return to_device(picture, device).permute(2, 0, 1)[None]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor: on the CPU a view where it can be, to a GPU through pinned memory and without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> NDArray[Any]:
    """A tensor as an array: on the CPU a view, from a GPU through pinned memory."""
    if x.device.type == "cpu":
        return x.numpy()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x).numpy()


def to_bytes(x: Tensor) -> NDArray[np.uint8]:
    """[1, 3, height, width] in 0..1 to uint8 [height, width, 3]. Layers are predicted from this, at both ends, so
    differences between devices in the last bit of a float mostly vanish and do not add up."""
    pixels = x[0].clamp(0, 1).mul_(255).round_().byte().permute(1, 2, 0)
    return to_host(pixels)
