"""The backbone "mean_scale": sets of weights of the mean-scale hyperprior for both codecs, LIFF and restoration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compass_codec.entropy import Tables
from compass_codec.hyper import HyperDecoder
from compass_codec.liff import LIFF
from compass_codec.networks import ImageCodec
from compass_codec.restoration import Restoration, Restorer
from compass_codec.weights import CodecWeights

N = TypeVar("N", bound=nn.Module)
PARTS = ("base", "residual", "liff")
RESTORATION = "restoration"  # a part that sets may be without


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], device: torch.device, precision: str
) -> tuple[CodecWeights, CodecWeights, LIFF]:
    """The base codec, the residual codec and LIFF of a set on ``device``, out of the tensors of its parts. ``spec`` is
    its model.json, which decides nothing here. ``precision``: see weights.load. Raises KeyError, ValueError or
    RuntimeError where tensors are missing or do not fit."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    liff = _fill(lambda: LIFF(**LIFF.dimensions(tensors["liff"])), tensors["liff"], device)
    restorers: dict[str, Restorer] = {}
    if found := tensors.get(RESTORATION):
        restoration = _fill(lambda: Restoration(**Restoration.dimensions(found)), found, device)
        restorers = {"base": restoration.base, "residual": restoration.residual}
    base, residual = (_codec(tensors[part], restorers.get(part), device) for part in ("base", "residual"))
    if (kind := getattr(torch, precision)) != torch.float32:
        liff.to(kind)
        residual.codec.pixels_in(kind)
        if residual.restorer is not None:
            residual.restorer.pixels_in(kind)
    return base, residual, liff


def _fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` makes, holding ``tensors``, without ever drawing random weights."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _codec(tensors: dict[str, Tensor], restorer: Restorer | None, device: torch.device) -> CodecWeights:
    codec = _fill(lambda: ImageCodec.like(tensors), tensors, device)
    # contexts come with counted tables
    counted = ("y_contexts", "y_weights") if "tables.y_contexts" in tensors else ()
    tables = Tables(*(tensors[f"tables.{k}"].numpy() for k in ("z", "y", "y_lengths", *counted)))
    return CodecWeights(codec, HyperDecoder(codec).to(device), tables, restorer)
