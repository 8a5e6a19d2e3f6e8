"""Every way of coding the layers of a picture that is measured, behind one function."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import container
from compass_codec.codec import Codec
from compass_codec.measure.peers import PEERS, resolutions
from compass_codec.measure.protocol import LEVELS, OURS, Scales, kind_of, sets_of

Coded = list[tuple[int, NDArray[np.uint8]]]
Size = tuple[int, int]  # height, width


class Measured(Codec):
    """A codec that tells what the tables need."""

    def code(self, layers: Sequence[NDArray[np.uint8]], scales: Scales, quality: float) -> Coded:
        """For each layer, the bytes of the file that it needs and what it decodes to."""
        encoded = self.encode_layers(layers, [s / scales[0] for s in scales], quality)
        ends = [entry.end for entry in container.read_header(encoded.data).layers]
        return list(zip(ends, encoded.layers, strict=True))


class Remembering(Measured):
    """The codec as it is, but it keeps a few predictions: layers that several columns of a table share cost once."""

    KEPT = 4

    def predict(self, below: NDArray[np.uint8] | None, size: tuple[int, int]) -> Iterator[Tensor]:
        if below is None:
            return super().predict(below, size)
        known: OrderedDict[tuple[Any, ...], list[Tensor]] = self.__dict__.setdefault("known", OrderedDict())
        key = (hashlib.sha256(below.tobytes()).digest(), below.shape, size)
        if key not in known:
            known[key] = list(super().predict(below, size))
        known.move_to_end(key)
        while len(known) > self.KEPT:
            known.popitem(last=False)
        return (strip.clone() for strip in known[key])


class Separate(Measured):
    """Layers above the first enhancement layer have a codec and LIFF of their own, those of the set of ``upper``. No
    decoder takes two sets for a file; each layer alone decodes with its set."""

    upper: Codec

    def code(self, layers: Sequence[NDArray[np.uint8]], scales: Scales, quality: float) -> Coded:
        payloads, seen = [], list[NDArray[np.uint8]]()
        for k, layer in enumerate(layers):
            codec = self if k < 2 else self.upper
            with codec.engine.computing():
                data, reconstruct = codec.encode_layer(layer, seen[-1] if seen else None, quality, True)
                payloads.append(data)
                seen.append(reconstruct())
        sizes, factors = [(p.shape[1], p.shape[0]) for p in layers], [s / scales[0] for s in scales]
        data = container.write(self.model, sizes, factors, [quality] * len(layers), payloads)
        return list(zip((entry.end for entry in container.read_header(data).layers), seen, strict=True))


@cache
def codec(method: str, weights: Path | None, device: str) -> Measured:
    """The codec of ``method``, loaded once in a process."""
    first, *others = sets_of(method)
    if not others:
        return Remembering.load(device, weights, model=first, engine="torch")
    found = Separate.load(device, weights, model=first, engine="torch")
    found.upper = Codec.load(device, weights, model=others[0], engine="torch")
    return found


def code(
    method: str, layers: Sequence[NDArray[np.uint8]], scales: Scales, setting: float, weights: Path | None, device: str
) -> Coded:
    """Code ``layers`` (uint8 [height, width, 3], smallest first): for each, the bytes that it and all below it need,
    and what it decodes to. Formats that hold one size take a file for each. Raises Gap for what cannot be done."""
    if kind_of(method) == OURS:
        return codec(method, weights, device).code(layers, scales, setting)
    if method == LEVELS:
        return resolutions(layers, setting)
    coded, total = [], 0
    for layer in layers:
        data = PEERS[method].encode(layer, setting)
        total += len(data)
        coded.append((total, PEERS[method].decode(data)))
    return coded
