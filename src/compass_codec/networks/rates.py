"""Rates that vary: what a layer costs at a Lagrangian multiplier, and the gains for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Amount = TypeVar("Amount", float, Tensor)


def cost(rate: Amount, distortion: Amount, lam: Amount) -> Amount:
    """The cost of a layer, R + lambda * 255^2 * MSE: bits per pixel and the mean squared error of samples in 0..1, or
    both times the pixels of the layer."""
    return rate + lam * 255**2 * distortion


def level_of(lam: Tensor | float, lambdas: Sequence[float]) -> Tensor:
    """Real-valued index into ``lambdas`` of a Lagrangian multiplier, linear in log(lambda) between neighbours."""
    x = torch.as_tensor(lam, dtype=torch.float64).log()
    knots = torch.tensor(lambdas, dtype=torch.float64, device=x.device).log()
    i = torch.bucketize(x, knots[1:-1])
    return i + (x - knots[i]) / (knots[i + 1] - knots[i])


def gain(table: Tensor, level: Tensor) -> Tensor:
    """Gains [B, M, 1, 1] at real levels [B], interpolated geometrically between rows of ``table``."""
    i = level.floor().clamp(0, len(table) - 2).long()
    t = (level - i).to(table.dtype)[:, None]
    return ((1 - t) * table[i] + t * table[i + 1]).exp()[:, :, None, None]
