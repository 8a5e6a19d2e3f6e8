"""The weights on disk: safetensors files, and the identity that ties a .cmps file to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compass_codec.container import MODEL_BYTES
from compass_codec.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from compass_codec.entropy import Tables
    from compass_codec.hyper import HyperDecoder
    from compass_codec.liff import LIFF
    from compass_codec.networks import ImageCodec
    from compass_codec.restoration import Restorer

N = TypeVar("N", bound="nn.Module")
PARTS = ("base", "residual", "liff")
RESTORATION = "restoration"  # a part that older sets are without


@dataclass(frozen=True)
class CodecWeights:
    """One image codec ready for use: transforms, integer hyper-decoder, probability tables, and what restores its
    layers, if anything does."""

    codec: ImageCodec
    hyper: HyperDecoder
    tables: Tables
    restorer: Restorer | None


@dataclass(frozen=True)
class Weights:
    """Everything a file is decoded with. ``identity`` is the start of the SHA-256 over the files, in hex."""

    base: CodecWeights
    residual: CodecWeights
    liff: LIFF
    identity: str


def folder_or_default(folder: Path | None) -> Path:
    """``folder``, or the weights installed with the package."""
    return folder if folder is not None else Path(str(resources.files("compass_codec.models")))


def _read(folder: Path) -> dict[str, bytes]:
    try:
        parts = [*PARTS, *([RESTORATION] if (folder / f"{RESTORATION}.safetensors").exists() else [])]
        return {part: (folder / f"{part}.safetensors").read_bytes() for part in parts}
    except OSError as e:
        raise WeightsError(f"{e.filename or folder}: cannot read the weights ({e.strerror})") from e


def _identity(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for data in files.values():
        digest.update(data)
    return digest.digest()[:MODEL_BYTES].hex()


def identity(folder: Path | None = None) -> str:
    """The identity of the weights in ``folder`` without loading them."""
    return _identity(_read(folder_or_default(folder)))


def load(folder: Path | None, device: torch.device, precision: str = "float32") -> Weights:
    """Load the parts to ``device``. What computes the pixels of enhancement layers does so in ``precision``, "float32",
    "float16" or "bfloat16"; the base layer, small as it is, stays in float32, as all others build on it and its errors
    are the largest.
    Raises WeightsError if one is missing or does not fit."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    from compass_codec.liff import LIFF
    from compass_codec.restoration import Restoration

    # PyTorch hears of this with its first tensor. Large arrays come from the system anew each time; in pages of 4 KB
    # that alone takes a tenth of a picture's time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    folder = folder_or_default(folder)
    files = _read(folder)
    try:
        tensors = {part: parse(data) for part, data in files.items()}
        with torch.inference_mode():
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
    except (SafetensorError, RuntimeError, KeyError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise WeightsError(f"{folder}: these weights cannot be used ({reason})") from e
    return Weights(base, residual, liff, _identity(files))


def _fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` makes, holding ``tensors``, without ever drawing random weights."""
    import torch

    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)


def _codec(tensors: dict[str, Tensor], restorer: Restorer | None, device: torch.device) -> CodecWeights:
    from compass_codec.entropy import Tables
    from compass_codec.hyper import HyperDecoder
    from compass_codec.networks import ImageCodec

    codec = _fill(lambda: ImageCodec.like(tensors), tensors, device)
    # contexts come with counted tables
    counted = ("y_contexts", "y_weights") if "tables.y_contexts" in tensors else ()
    tables = Tables(*(tensors[f"tables.{k}"].numpy() for k in ("z", "y", "y_lengths", *counted)))
    return CodecWeights(codec, HyperDecoder(codec).to(device), tables, restorer)
