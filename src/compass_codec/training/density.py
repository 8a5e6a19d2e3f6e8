"""The learned density of the hyper-latent: one monotone cumulative function for each channel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactorizedDensity(nn.Module):
    """Fully factorised density c(x) = sigmoid(f_K(... f_1(x))) (Balle et al. 2018, appendix 6.1).

    Parameters have the names and shapes of CompressAI's ``EntropyBottleneck``, so weights can be exchanged with it.
    ``quantiles`` comes along for that reason alone: this codec rounds the hyper-latent to plain integers.
    """

    def __init__(self, channels: int, init_scale: float = 10.0, filters: tuple[int, ...] = (3, 3, 3, 3)) -> None:
        super().__init__()
        widths = (1, *filters, 1)
        scale = init_scale ** (1 / (len(filters) + 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i in range(len(filters) + 1):
            start = math.log(math.expm1(1 / scale / widths[i + 1]))
            self.matrices.append(nn.Parameter(torch.full((channels, widths[i + 1], widths[i]), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, widths[i + 1], 1) - 0.5))
            if i < len(filters):
                self.factors.append(nn.Parameter(torch.zeros(channels, widths[i + 1], 1)))
        self.quantiles: Tensor
        self.register_buffer("quantiles", torch.tensor([-init_scale, 0.0, init_scale]).repeat(channels, 1, 1))

    def logits(self, x: Tensor) -> Tensor:
        """Logit of the cumulative function at x [C, 1, n]."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            x = F.softplus(matrix) @ x + bias
            if i < len(self.factors):
                x = x + self.factors[i].tanh() * x.tanh()
        return x

    def forward(self, x: Tensor, half: Tensor | float = 0.5) -> Tensor:
        """Mass of the interval around x [C, 1, n], by default of length 1: c(x + half) - c(x - half)."""
        low, high = self.logits(x - half), self.logits(x + half)
        # taken on the side where the sigmoids are small, else the upper tail cancels to zero
        sign = -(low + high).sign().detach()
        return ((sign * high).sigmoid() - (sign * low).sigmoid()).abs()
