"""Training the enhancement layers of COMPASS without its parts, one at a time (the paper's table 4, and more)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compass_codec.backbones.padded import MULTIPLE
from compass_codec.training.lean import LeanResidualStage, RatedLean, codec_of, liff_of
from compass_codec.training.stages import shrink, to_8bit

SECOND = 1.5  # step to the first enhancement layer where none is drawn


class BicubicStage(LeanResidualStage):
    """Bicubic interpolation in the place of LIFF, which stays as it starts and then adds exactly zero to it."""

    trains = ("residual",)


class NoisyStage(LeanResidualStage):
    """The distortion is that of noisy latents, in the place of rounded ones."""

    noisy = True


class PaddedStage(LeanResidualStage):
    """Layers are padded to multiples of 64, as backbones/padded.py does it, in the place of layer-wise padding."""

    backbone = "padded"

    def card_fields(self) -> dict[str, Any]:
        """With the backbone, as model.json may come from the set of the base codec."""
        return super().card_fields() | {"backbone": self.backbone}

    def difference(self, x: Tensor, known: Tensor, level: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        y, layer_of = super().difference(_pad(x), _pad(known), level)
        return y, lambda y: layer_of(y)[..., : x.shape[-2], : x.shape[-1]]

    def lower(self, x: Tensor, level: Tensor) -> Tensor:
        return super().lower(_pad(x), level)[..., : x.shape[-2], : x.shape[-1]]


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE, 0, -x.shape[-2] % MULTIPLE), mode="replicate")


class FirstStage(LeanResidualStage):
    """A first enhancement layer alone."""

    @staticmethod
    def draw_factors(generator: torch.Generator) -> tuple[float, ...]:
        return LeanResidualStage.draw_factors(generator)[:1]


class SecondStage(FirstStage):
    """A second enhancement layer alone, above a first one by the set in ``first``, which stays as it is."""

    def __init__(self, first: Path, **dimensions: Any) -> None:
        super().__init__(**dimensions)
        self.first = LeanResidualStage()
        del self.first.base  # it is not needed, and would be in every checkpoint
        self.first.residual = codec_of(first, "residual", RatedLean)  # type: ignore[assignment]
        self.first.liff = liff_of(first)  # type: ignore[assignment]

    @torch.no_grad()
    def lower(self, x: Tensor, level: Tensor) -> Tensor:
        """What the decoder shows of x as the first enhancement layer."""
        step = 1 + torch.rand(()).item() if self.training else SECOND
        mode = self.first.training
        self.first.eval()
        known = self.first.liff(super().lower(shrink(x, step), level), (x.shape[-2], x.shape[-1]))
        y, layer_of = self.first.difference(x, known, level)
        rec = to_8bit(layer_of(self.first.residual.code(y, level, True)[0]))  # type: ignore[call-arg]
        self.first.train(mode)
        return rec
