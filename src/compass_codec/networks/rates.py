"""Rates that vary: where a Lagrangian multiplier lies among those that have gains, and the gains there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
