"""What a backbone offers: the codecs of layers and the predictor that codec.py makes files with.

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

NAMES = {"mean_scale": "compass_codec.backbones.mean_scale", "lean": "compass_codec.backbones.lean"}


class LayerCodec(Protocol):
    """Codes what a layer adds to its prediction. Encoder and decoder see the same pixels on the same device."""

    searchable: bool
    """Whether search.py can look for symbols that cost less: encoding takes an effort above 0."""

    def lambda_of(self, quality: float) -> float:
        """The Lagrangian multiplier of a quality 1..100, rising with it; the cost of a layer is R + lambda * 255^2 *
        MSE, with R in bits a pixel and samples in 0..1."""
        ...

    def encode(
        self, picture: NDArray[np.uint8], prediction: Callable[[], Iterable[Array]], quality: float
    ) -> tuple[bytes, NDArray[np.uint8]]:
        """A layer, uint8 [height, width, 3], to its bytes, at least one and fewer than 2^28, and what the decoder will
        see, like the layer. ``prediction`` makes its prediction, anew whenever it is called: of a large picture it is
        too much to keep."""
        ...

    def decode(
        self, data: bytes, size: tuple[int, int], prediction: Iterable[Array], quality: float
    ) -> NDArray[np.uint8]:
        """The bytes of a layer of ``size`` and its prediction to the layer, uint8 [height, width, 3]. Raises
        DamagedError for bytes that no encoder writes."""
        ...

    def parse(
        self, data: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], *tuple[Any, ...]]:
        """The bytes of a layer of ``size`` to all that they say, in integers: hyper-latent and latent, int32 [channels,
        rows, columns] each, and what else a backbone makes of them. The same on every device and in every precision.
        Raises DamagedError."""
        ...


class Backbone(Protocol):
    """The module of a backbone."""

    def build(
        self, spec: dict[str, Any], tensors: dict[str, dict[str, Any]], engine: Engine, precision: str
    ) -> tuple[LayerCodec, LayerCodec, Predictor]:
        """The codec of base layers, that of all layers above, and the predictor, with ``engine``. ``spec`` is the set's
        model.json, ``tensors`` those of each part that it names. ``precision``, "float32", "float16" or "bfloat16", is
        that of what computes pixels above the base layer; no symbol depends on it. Raises KeyError, ValueError,
        IndexError, RuntimeError or WeightsError where tensors are missing or do not fit."""
        ...
