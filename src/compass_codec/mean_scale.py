"""The backbone "mean_scale", that of the paper: the mean-scale hyperprior for both image codecs, and LIFF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compass_codec.entropy import Tables
from compass_codec.layer import MeanScaleLayer
from compass_codec.liff import LIFF
from compass_codec.networks import ImageCodec

N = TypeVar("N", bound=nn.Module)
PARTS = ("base", "residual", "liff")


def build(
    spec: dict[str, Any], tensors: dict[str, dict[str, Tensor]], device: torch.device, precision: str
) -> tuple[MeanScaleLayer, MeanScaleLayer, LIFF]:
    """See backbone.Backbone. ``spec`` decides nothing here."""
    if missing := [part for part in PARTS if part not in tensors]:
        raise ValueError(f"no part {missing[0]}")
    base, residual = (_layer(tensors[part], device) for part in ("base", "residual"))
    liff = _fill(lambda: LIFF(**LIFF.dimensions(tensors["liff"])), tensors["liff"], device)
    if (kind := getattr(torch, precision)) != torch.float32:
        liff.to(kind)
        residual.codec.pixels_in(kind)
    return base, residual, liff


def _fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` makes, holding ``tensors``, without ever drawing random weights."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _layer(tensors: dict[str, Tensor], device: torch.device) -> MeanScaleLayer:
    tables = Tables(*(tensors[f"tables.{k}"].numpy() for k in ("z", "y", "y_lengths")))
    return MeanScaleLayer(_fill(lambda: ImageCodec.like(tensors), tensors, device), tables, device)
