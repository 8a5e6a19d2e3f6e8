"""Tensors out of weights files and checkpoints, and into modules."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A weights file. Raises ValueError naming it if it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error


def fill_module(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load ``module`` from those of ``tensors`` that it has a name for."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(f"{path}: not weights of this architecture (no {name} of shape {tuple(value.shape)})")
    module.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()})


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
