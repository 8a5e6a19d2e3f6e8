"""The backbone "padded": lean's layer codecs, with every layer padded to multiples of 64 (its edges repeated), as
codecs are that have no layer-wise padding. LIFF predicts between the true sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compass_codec.backbones import lean
from compass_codec.backbones.lean import LeanLayer
from compass_codec.networks.arrays import Array, space

if TYPE_CHECKING:
    from compass_codec.engines import Engine, Predictor

MULTIPLE = 64

Size = tuple[int, int]  # height, width


def padded(size: Size) -> Size:
    return -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE


def pad(strips: Iterable[Array], size: Size) -> Iterator[Array]:
    """Strips [1, C, rows, W] of a picture of ``size``, and more rows and columns like its last."""
    (high, wide), row = padded(size), 0
    for strip in strips:
        row += strip.shape[2]
        right = [strip[..., -1:]] * (wide - size[1])
        whole = space(strip).concatenate([strip, *right], 3)
        yield space(strip).concatenate([whole, *[whole[:, :, -1:]] * (high - row if row == size[0] else 0)], 2)


class PaddedLayer:
    """A layer codec whose layers are padded before it codes them, and cropped after it decoded them."""

    searchable = False

    def __init__(self, layer: LeanLayer) -> None:
        self.layer = layer

    def lambda_of(self, quality: float) -> float:
        return self.layer.lambda_of(quality)

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Array]], quality: float, keep: bool = False
    ) -> tuple[bytes, Callable[[], NDArray[np.uint8]]]:
        """See backbones.LayerCodec."""
        size = (picture.shape[0], picture.shape[1])
        high, wide = padded(size)
        whole = np.pad(picture, ((0, high - size[0]), (0, wide - size[1]), (0, 0)), "edge")
        data, reconstruct = self.layer.encode(whole, lambda: pad(prediction(), size), quality, keep)
        return data, lambda: reconstruct()[: size[0], : size[1]]

    def decode(self, data: bytes, size: Size, prediction: Iterable[Array], quality: float) -> NDArray[np.uint8]:
        """See backbones.LayerCodec."""
        return self.layer.decode(data, padded(size), pad(prediction, size), quality)[: size[0], : size[1]]

    def parse(self, data: bytes, size: Size) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """See backbones.LayerCodec."""
        return self.layer.parse(data, padded(size))


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Any]], engine: Engine, precision: str
) -> tuple[PaddedLayer, PaddedLayer, Predictor]:
    """See backbone.Backbone; parts and ``spec`` are those of lean."""
    base, residual, predictor = lean.build(spec, tensors, engine, precision)
    return PaddedLayer(base), PaddedLayer(residual), predictor
