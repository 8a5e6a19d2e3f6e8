"""The backbones "mei" and "rpn": lean's base codec, and enhancement layers whose latent is predicted.

They need PyTorch. The prediction of the latent is computed for the whole picture at once, at 1/16 of its size; all else
goes through strips, as with lean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from compass_codec import entropy
from compass_codec.backbones.lean import LatentLayer, LeanLayer, tables_of
from compass_codec.engines import Transforms
from compass_codec.engines.torch_engine import TorchEngine, TorchLean, TorchTransforms
from compass_codec.networks.predicted import CODECS, Half, PredictedCodec, halved

PARTS = ("base", "residual")


class PredictedLayer(LatentLayer):
    """A PredictedCodec with its entropy coder."""

    def __init__(self, networks: TorchLean, tables: entropy.Tables, engine: TorchEngine) -> None:
        super().__init__(networks, networks, tables, engine)
        self.searchable = False

    def given(self, networks: Transforms, prediction: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """See PredictedCodec.predict; ``prediction`` are strips of what Half gives."""
        assert isinstance(networks, TorchTransforms) and isinstance(networks.codec, PredictedCodec)
        half = torch.cat([halved(strip) for strip, _ in self._pixels(size, prediction)], 2)
        yield torch.cat(networks.codec.predict(half, networks.level), 1)


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], engine: TorchEngine, precision: str
) -> tuple[LeanLayer, PredictedLayer, Half]:
    """See backbone.Backbone. The prediction of latents is float32 in every precision."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    base = engine.lean(spec["base"], tensors["base"], "float32")
    residual = engine.lean(spec["residual"], tensors["residual"], precision, CODECS[spec["backbone"]])
    return (
        LeanLayer(base, base, tables_of(base, tensors["base"]), engine),
        PredictedLayer(residual, tables_of(residual, tensors["residual"]), engine),
        Half(engine.device),
    )
