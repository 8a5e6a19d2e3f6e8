"""Training the enhancement layers of the backbones "mei" and "rpn", whose latents are predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compass_codec.networks.lean import eighth
from compass_codec.networks.predicted import Half, MeiCodec, PredictedCodec, RpnCodec, halved
from compass_codec.networks.rates import gain
from compass_codec.training.lean import LeanLayersStage, RatedEntropy, RatedLean
from compass_codec.training.stages import shrink

LEVEL = 4.0  # of the crops that the first prediction is fitted to


class RatedMei(RatedLean):
    kind = MeiCodec


class RatedRpn(RatedLean):
    kind = RpnCodec


class PredictedStage(LeanLayersStage):
    """The enhancement codec above a frozen base, as LeanLayersStage trains it, with Half in the place of LIFF."""

    trains = ("residual",)
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
