"""Weights as files: float16 safetensors, those of codecs with the integer tables their streams are coded with."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from compass_codec.backbones.mean_scale import PARTS
from compass_codec.entropy import frequencies, gaussian_tables
from compass_codec.files import write_file
from compass_codec.networks import liff_rows
from compass_codec.networks.lean import EntropyModel
from compass_codec.networks.liff import LIFF, SIZES
from compass_codec.networks.numbers import FACTORIZED, LAMBDAS
from compass_codec.training.density import FactorizedDensity
from compass_codec.training.lean import RatedEntropy
from compass_codec.training.stages import RatedCodec, Stage
from compass_codec.training.tensors import below, fill_module, read_tensors
from compass_codec.weights import CARD, part_of, read_set, write_card

BACKBONE = "mean_scale"
REACH = 32  # hyper-latent symbols -REACH..REACH have a frequency of their own; beyond them, an escape
MOST_REACH, SELDOM = 1023, 2**-14  # the most of y without hyper networks, and how often its symbols may escape


@torch.no_grad()
def z_table(density: FactorizedDensity) -> Tensor:
    """Integer frequencies of each channel's symbols -REACH..REACH and an escape, int32 [C, 2 * REACH + 2]."""
    density = copy.deepcopy(density).cpu().double()
    n = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    mass = density(n.expand(len(density.quantiles), 1, -1))[:, 0]
    return torch.from_numpy(np.stack([frequencies(row) for row in mass.numpy()]))


@torch.no_grad()
def tables_of(part: RatedCodec | RatedEntropy) -> dict[str, Tensor]:
    """The tables of a codec: of z by its density and of y by normal distributions; or, without hyper networks, of the
    level, all of which are as likely, and of each channel of y at each level by its density."""
    if not isinstance(part.codec, EntropyModel) or part.codec.entropy != FACTORIZED:
        return {"tables.z": z_table(part.bottleneck)} | named(*gaussian_tables())
    levels, found = len(LAMBDAS), list[NDArray[np.int32]]()
    density, scales = copy.deepcopy(part.bottleneck).cpu().double(), part.codec.log_scale.cpu().double().exp()
    n = torch.arange(-MOST_REACH, MOST_REACH + 1, dtype=torch.float64)
    for scale in scales[:, :, None, None]:
        mass = density(n / scale, 0.5 / scale)[:, 0]
        for row in mass.numpy():
            beyond = 1 - np.cumsum(row[MOST_REACH:] + row[MOST_REACH::-1]) + row[MOST_REACH]
            width = max(1, int(np.argmax(np.append(beyond, 0) < SELDOM)))
            found.append(frequencies(row[MOST_REACH - width : MOST_REACH + width + 1]))
    level = torch.from_numpy(frequencies(np.repeat([0, 1 / levels], [levels - 1, levels])))[None]
    return {"tables.z": level} | named(np.concatenate(found), np.array([len(table) for table in found], np.int32))


def named(y: NDArray[np.int32], lengths: NDArray[np.int32]) -> dict[str, Tensor]:
    return {"tables.y": torch.from_numpy(y), "tables.y_lengths": torch.from_numpy(lengths)}


def tensors_of(part: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of one weights file. Raises ValueError when a weight is not a finite float16."""
    if isinstance(part, RatedCodec | RatedEntropy):
        tensors = {name: value.half() for name, value in part.codec.state_dict().items()}
        tensors |= {f"bottleneck.{name}": value.float() for name, value in part.bottleneck.state_dict().items()}
        tensors |= tables_of(part)
    else:
        tensors = {name: value.half() for name, value in part.state_dict().items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: not finite in float16, so these weights are not exported")
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def export(stage: Stage, folder: Path, card_entry: dict[str, Any] | None = None) -> list[Path]:
    """Write the parts that ``stage`` trains to ``folder``, and the base that lean layers are for; returns the files.
    model.json there then names the parts that the set has; it is made if it is not there. ``card_entry`` says how they
    were trained and is appended to ``folder``/history.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    parts = stage.writes or stage.trains
    for part in parts:
        path = part_of(folder, part)
        write_file(path, save(tensors_of(getattr(stage, part)) | stage.integers(part)))
        written.append(path)
    describe(folder, stage.backbone, stage.card_fields(), parts)
    if card_entry is not None:
        remember(folder, card_entry)
    return written


def describe(
    folder: Path, backbone: str = BACKBONE, fields: dict[str, Any] | None = None, parts: Sequence[str] = PARTS
) -> None:
    """Bring ``folder``/model.json up to date with those of its parts and of ``parts`` that are there, and set
    ``fields``. A new one names ``backbone``. Raises WeightsError for a broken one."""
    if (folder / CARD).exists():
        spec = read_set(folder).spec
    else:
        spec = {"profile": "new", "backbone": backbone, "purpose": "made by compass train", "parts": {}}
    write_card(folder, spec | (fields or {}) | {"parts": dict.fromkeys([*spec["parts"], *PARTS, *parts])})


def device_name(device: torch.device) -> str:
    """A device as history.json names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def remember(folder: Path, entry: dict[str, Any]) -> None:
    """Append ``entry``, how weights were made, and today's date to ``folder``/history.json."""
    history = folder / "history.json"
    entries = json.loads(history.read_text()) if history.exists() else []
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_file(history, (json.dumps([*entries, entry | {"date": date}], indent=1) + "\n").encode())


def load_parts(stage: Stage, folder: Path, size: str | None = None) -> set[str]:
    """Load into ``stage`` the weights files that ``folder`` has; returns which parts were there. LIFF gets the size of
    its weights, or the ``size`` asked for; weights of another size are then left out.

    Raises ValueError naming the file that cannot be read or belongs to another architecture.
    """
    if (folder / CARD).exists() and (backbone := read_set(folder).backbone) != BACKBONE:
        raise ValueError(f"{folder / CARD}: weights of the backbone {backbone}; these stages train {BACKBONE}")
    if size is not None:
        stage.liff = LIFF(**SIZES[size])
    found = {part for part in PARTS if (folder / f"{part}.safetensors").exists()}
    for part in sorted(found):
        path = folder / f"{part}.safetensors"
        tensors, module = read_tensors(path), getattr(stage, part)
        if isinstance(module, RatedCodec):
            fill_module(module.codec, tensors, path)
            fill_module(module.bottleneck, below(tensors, "bottleneck."), path)
        else:
            found -= set() if load_liff(stage, tensors, path, size) else {part}
    return found


def load_liff(stage: Stage, tensors: dict[str, Tensor], path: Path, size: str | None) -> bool:
    try:
        dimensions = liff_rows.dimensions(tensors)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: not weights of this architecture (no {error})") from error
    if size is not None and dimensions != SIZES[size]:
        return False
    stage.liff = LIFF(**dimensions)
    fill_module(stage.liff, tensors, path)
    return True


def import_start(stage: Stage, path: Path) -> None:
    """Load the base layer from one file with CompressAI's names, trained on pictures in 0..1.

    Pictures are centred on zero here: the offset of 1/2 moves into the first and the last bias.
    """
    tensors = read_tensors(path)
    fill_module(stage.base.codec, tensors, path)
    fill_module(stage.base.bottleneck, below(tensors, "entropy_bottleneck."), path)
    with torch.no_grad():
        weights = dict(stage.base.codec.named_parameters())
        weights["g_a.0.bias"].add_(0.5 * weights["g_a.0.weight"].sum((1, 2, 3)))
        weights["g_s.6.bias"].sub_(0.5)
