"""Training the enhancement layers of the backbones "mei" and "rpn", whose latents are predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.distortions import Distortion, squared
from compass_codec.networks.lean import eighth, from_zero
from compass_codec.networks.numbers import UNSHUFFLE
from compass_codec.networks.predicted import Half, MeiCodec, PredictedCodec, RpnCodec, halved
from compass_codec.networks.rates import gain
from compass_codec.training.lean import LeanLayersStage, RatedEntropy, RatedLean
from compass_codec.training.stages import shrink

LEVEL = 4.0  # of the crops that the first prediction is fitted to
GUIDED = 0.5  # of the schedule is done when the uncertainty begins to guide
HIDDEN = 64  # channels of the network that estimates it
LEAST = 0.1  # that a logarithm is above the least, for a weight
USUAL = 1e-3  # squared error where it starts
ESTIMATE = 1e-5  # that its likelihood counts beside squared errors, so little that gradients are clipped as without


class RatedMei(RatedLean):
    kind = MeiCodec


class RatedRpn(RatedLean):
    kind = RpnCodec


class PredictedStage(LeanLayersStage):
    """The enhancement codec above a frozen base, as LeanLayersStage trains it, with Half in the place of LIFF."""

    trains: tuple[str, ...] = ("residual",)
    writes = ("base", "residual")
    rated: type[RatedLean]

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        self.liff = Half()  # type: ignore[assignment]

    def card_fields(self) -> dict[str, Any]:
        """With the backbone, as model.json may come from the set of the base codec."""
        return super().card_fields() | {"backbone": self.backbone}

    def difference(self, x: Tensor, known: Tensor, level: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        codec = self.residual.codec
        assert isinstance(codec, PredictedCodec)
        size, (predicted, added) = (x.shape[-2], x.shape[-1]), codec.predict(halved(known) - 0.5, level)
        return codec.analysis(x - 0.5, level) - predicted, lambda y: codec.synthesis(y + added, level, size) + 0.5

    @torch.no_grad()
    def begin(self, residual: RatedEntropy) -> None:
        """Let the codec predict what is best by linear regression of the latents of crops on their lower layers."""
        codec, x = residual.codec, self.crops
        assert isinstance(codec, PredictedCodec) and x is not None
        level, size = x.new_full((len(x),), LEVEL), (x.shape[-2], x.shape[-1])
        seen = eighth(halved(self.liff(self.lower(shrink(x, 2), level), size) - 0.5))
        y = codec.analysis(x - 0.5, level) / gain(codec.log_gain, level)
        a, b = (part.transpose(0, 1).flatten(1).double() for part in (seen, y))
        # errors of a grey level in what is seen, which keep weights small
        noise = a.shape[1] / 255**2 * torch.eye(len(a), dtype=a.dtype)
        left, s, right = torch.linalg.svd(torch.linalg.solve(a @ a.T + noise, a @ b.T).T, full_matrices=False)
        rank = min(len(s), codec.width)
        assert codec.from_half.bias is not None
        codec.from_half.weight[:rank] = (s.sqrt()[:, None] * right)[:rank, :, None, None].float()
        codec.from_half.bias.zero_()
        codec.to_prediction.weight[:, :rank] = (left * s.sqrt())[:, :rank, None, None].float()


class MeiStage(PredictedStage):
    backbone = "mei"
    rated = RatedMei


class RpnStage(PredictedStage):
    backbone = "rpn"
    rated = RatedRpn


class UncertainRpnStage(RpnStage):
    """The same with an uncertainty-guided loss in two stages (RPN's abstract; Ning et al. 2021).

    The first stage is the first half of the schedule. From a decoded layer, a network learns how large the squared
    error of its cells of 8x8 pixels is: as the logarithm of a variance, by the likelihood of a Gaussian. In the second
    stage it stays as it is, and weights the distortion of the layer below.
    """

    trains: tuple[str, ...] = ("residual", "uncertainty")

    def __init__(self, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        last = from_zero(nn.Conv2d(HIDDEN, 1, 1))
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(USUAL))
        self.uncertainty = nn.Sequential(nn.Conv2d(3 * UNSHUFFLE**2, HIDDEN, 1), nn.GELU(), last)

    def distortions(self, layers: list[tuple[Tensor, Tensor]]) -> list[Distortion]:
        if not self.training:
            return super().distortions(layers)
        logs = [self.uncertainty(eighth(rec.detach() - 0.5)) for _, rec in layers]
        if self.progress < GUIDED:
            return [estimated(log_variance) for log_variance in logs]
        return [*(weighted(log_variance.detach()) for log_variance in logs[1:]), self.distortion]


def estimated(log_variance: Tensor) -> Distortion:
    """The squared error, and some of how unlikely it is given the logarithms of the variances of cells of 8x8 pixels
    [B, 1, H / 8, W / 8], rounded up: a multiple of the negative logarithm of the likelihood, less a constant, which
    teaches nothing but them."""

    def distortion(x: Tensor, rec: Tensor) -> Tensor:
        error = F.avg_pool2d((x - rec.detach()).square().mean(1, keepdim=True), UNSHUFFLE, ceil_mode=True)
        unlikely = ((-log_variance).exp() * error + log_variance).mean((1, 2, 3))
        return squared(x, rec) + ESTIMATE * unlikely

    return distortion


def weighted(log_variance: Tensor) -> Distortion:
    """The squared error, in which pixels count by how far the logarithm of their variance is above the least in their
    picture (Ning et al. 2021), one on average."""

    def distortion(x: Tensor, rec: Tensor) -> Tensor:
        weight = F.interpolate(log_variance, size=(x.shape[-2], x.shape[-1]), mode="bilinear", align_corners=False)
        weight = weight - weight.amin((2, 3), keepdim=True) + LEAST
        return ((x - rec).square() * (weight / weight.mean((2, 3), keepdim=True))).mean((1, 2, 3))

    return distortion
