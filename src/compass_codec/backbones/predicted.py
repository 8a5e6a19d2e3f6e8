"""The backbones "mei" and "rpn": lean's base codec, and enhancement layers whose latent is predicted.

They need PyTorch. The prediction of the latent is computed for the whole picture at once, at 1/16 of its size; all else
goes through strips, as with lean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import entropy
from compass_codec.backbones.lean import LeanLayer, tables_of
from compass_codec.engines import Transforms
from compass_codec.engines.torch_engine import TorchEngine, TorchLean, TorchTransforms
from compass_codec.networks import strips
from compass_codec.networks.numbers import CELL
from compass_codec.networks.predicted import CODECS, Half, PredictedCodec, halved

PARTS = ("base", "residual")


class PredictedLayer(LeanLayer):
    """A PredictedCodec with its entropy coder."""

    def __init__(self, networks: TorchLean, tables: entropy.Tables, engine: TorchEngine) -> None:
        super().__init__(networks, tables, engine)
        self.searchable = False

    def analysis(self, networks: Transforms, picture: NDArray[np.uint8], prediction: Iterable[Tensor]) -> Tensor:
        """The latent less its prediction [1, M, h, w]."""
        size = (picture.shape[0], picture.shape[1])
        y: Tensor = super().analysis(networks, picture, self._grey(size))
        return y - self._predicted(networks, prediction, size)[0]

    def reconstruct(
        self, networks: Transforms, y: Tensor, prediction: Iterable[Tensor], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        y = y + self._predicted(networks, prediction, size)[1]
        return super().reconstruct(networks, y, self._grey(size), size)

    def _predicted(
        self, networks: Transforms, prediction: Iterable[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """See PredictedCodec.predict; ``prediction`` are strips of what Half gives."""
        assert isinstance(networks, TorchTransforms) and isinstance(networks.codec, PredictedCodec)
        rows, parts = strips.Rows(prediction), []
        for first, end in strips.spans(-(-size[0] // CELL), self._rows(size[1])):
            parts.append(halved(rows.take(min(size[0], end * CELL) - first * CELL)) - 0.5)
        return networks.codec.predict(torch.cat(parts, 2), networks.level)

    def _grey(self, size: tuple[int, int]) -> Iterator[Tensor]:
        """What analysis and synthesis work on the difference to."""
        grey = self.engine.array(np.full((1, 1, 1, 1), 0.5, np.float32))
        for first, end in strips.strip_spans(size, self.engine.device):
            yield grey.expand(1, 3, end - first, size[1])


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], engine: TorchEngine, precision: str
) -> tuple[LeanLayer, PredictedLayer, Half]:
    """See backbone.Backbone. The prediction of latents is float32 in every precision."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    base = engine.lean(spec["base"], tensors["base"], "float32")
    residual = engine.lean(spec["residual"], tensors["residual"], precision, CODECS[spec["backbone"]])
    return (
        LeanLayer(base, tables_of(base, tensors["base"]), engine),
        PredictedLayer(residual, tables_of(residual, tensors["residual"]), engine),
        Half(engine.device),
    )
