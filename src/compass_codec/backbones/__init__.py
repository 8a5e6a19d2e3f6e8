"""The protocols of a backbone: the layer codecs and the predictor with which codec.py makes files.

A backbone is a module whose ``build`` makes these three from the tensors of a set of weights; NAMES names the
modules. Sizes are (height, width) in pixels. A prediction comes as strips from top to bottom: float32
[1, 3, rows, width] in about 0..1, arrays of the engine that the backbone was built with, and as high as
strips.strip_spans says. A strip may be a broadcast view, so nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.engines import Engine, Predictor
    from compass_codec.networks.arrays import Array

NAMES = {
    "mean_scale": "compass_codec.backbones.mean_scale",
    "lean": "compass_codec.backbones.lean",
    "padded": "compass_codec.backbones.padded",
    "mei": "compass_codec.backbones.predicted",
    "rpn": "compass_codec.backbones.predicted",
}


class LayerCodec(Protocol):
    """Codes a layer given its prediction. Encoder and decoder reconstruct the same pixels on the same device."""

    searchable: bool
    """Whether search.py can look for symbols that cost less: encoding takes an effort above 0."""

    def lambda_of(self, quality: float) -> float:
        """The Lagrangian multiplier of a quality 1..100, rising with it; the cost of a layer is R + lambda * 255^2 *
        MSE, with R in bits a pixel and samples in 0..1."""
        ...

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Array]], quality: float, keep: bool = False
    ) -> tuple[bytes, Callable[[], NDArray[np.uint8]]]:
        """Encode a layer, uint8 [height, width, 3], to 1 to 2^28 - 1 bytes, and give what computes the decoder's
        reconstruction, of the same shape. ``prediction`` computes the prediction anew at each call: that of a large
        picture is too much to keep. ``keep`` what else the reconstruction needs if it follows at once."""
        ...

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Array], quality: float
    ) -> NDArray[np.uint8]:
        """Decode a layer of ``size`` from its bytes and its prediction to uint8 [height, width, 3]. Raises DamagedError
        for bytes that no encoder writes."""
        ...

    def parse(
        self, data: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], *tuple[Any, ...]]:
        """Decode the bytes of a layer of ``size`` to integers: hyper-latent and latent, int32 [channels, rows, columns]
        each, and further values of the backbone. They are the same on every device and in every precision. Raises
        DamagedError."""
        ...


class Backbone(Protocol):
    """The module of a backbone."""

    def build(
        self, spec: dict[str, Any], tensors: dict[str, dict[str, Any]], engine: Engine, precision: str
    ) -> tuple[LayerCodec, LayerCodec, Predictor]:
        """The codec of base layers, that of all layers above, and the predictor, with ``engine``. ``spec`` is the set's
        model.json, ``tensors`` those of each part that it names. ``precision``, "float32" or "float16", is
        that of the networks that compute pixels above the base layer; no symbol depends on it. Raises KeyError,
        ValueError, IndexError, RuntimeError or WeightsError where tensors are missing or do not fit."""
        ...
