"""Muon for convolutions: momentum whose matrix is made orthogonal before each step; Adam for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz iteration that lifts all singular values to about 1 (Jordan et al. 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST = 16  # a matrix with fewer rows or columns is left to Adam


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values end between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.bfloat16() if matrix.is_cuda else matrix
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Weights of convolutions and linear layers as matrices [first axis, rest].

    Their update is scaled to the size that Adam's has (0.2 * sqrt(longer side), Liu et al. 2025), so that one
    learning rate suits both kinds of parameter.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim in (2, 4) and min(p.shape[0], p[0].numel()) >= SMALLEST:
                    self._matrix(p, p.grad, group)
                else:
                    self._adam(p, p.grad, group)

    def _matrix(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = orthogonal(grad.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov's momentum
        p.sub_(update.view(p.shape), alpha=group["lr"] * 0.2 * max(update.shape) ** 0.5)

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state["step"], state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros(()),
                torch.zeros_like(p),
                torch.zeros_like(p),
            )
        state["step"] += 1
        t = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - b1)
        state["exp_avg_sq"].lerp_(grad * grad, 1 - b2)
        denominator = (state["exp_avg_sq"] / (1 - b2**t)).sqrt_().add_(group["eps"])
        p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - b1**t))
