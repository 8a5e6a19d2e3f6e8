"""The mean of two sets of weights, of which one was trained further from the other.

``python -m compass_codec.training.average OLD NEW --part base`` writes that of a part into NEW. The ends of successive
runs scatter around an optimum, and the mean of two ends can be nearer to it
(Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization").

Sets of lean get integer networks of the mean, whose activations are measured on the pictures of ``--data``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from torch import Tensor

from compass_codec.backbones.mean_scale import PARTS
from compass_codec.files import write_file
from compass_codec.training.data import Pictures
from compass_codec.training.export import BACKBONE as MEAN_SCALE
from compass_codec.training.export import describe, export, remember
from compass_codec.training.lean import BACKBONE as LEAN
from compass_codec.training.lean import LeanContextStage, LeanLayersStage, LeanResidualStage, LeanStage, start
from compass_codec.training.tensors import read_tensors
from compass_codec.weights import read_set


def average(old: dict[str, Tensor], new: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """``share`` of ``old`` and the rest of ``new``, name by name, in the types of ``new``; what are not floats, the
    tables, are those of ``new``. Raises ValueError if they are not of one architecture."""
    shapes, others = ({k: tuple(v.shape) for k, v in t.items() if v.is_floating_point()} for t in (old, new))
    if differ := sorted(dict(shapes.items() ^ others.items())):
        raise ValueError(f"not weights of the same architecture ({differ[0]} differs)")
    return new | {name: old[name].double().lerp(new[name].double(), 1 - share).to(new[name].dtype) for name in others}


def lean_stage(spec: dict[str, Any]) -> LeanStage:
    """A stage that exports the parts that a set of lean has, by its model.json."""
    if "residual" not in spec["parts"]:
        return LeanContextStage()
    return LeanLayersStage() if "transforms" in spec.get("residual", {}) else LeanResidualStage()


@click.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("new", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, required=True, help="Part to average.")
@click.option(
    "--data", type=click.Path(path_type=Path), multiple=True, help="Training pictures; sets of lean need them."
)
@click.option("--share", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Weight of OLD in the mean.")
def main(old: Path, new: Path, parts: tuple[str, ...], data: tuple[Path, ...], share: float) -> None:
    """Average parts of the set in the folder NEW with those in the folder OLD, and write them to NEW. Count the tables
    of codecs again afterwards."""
    try:
        spec, means = read_set(new).spec, {}
        if spec["backbone"] not in (LEAN, MEAN_SCALE):
            raise ValueError(f"{new}: sets of the backbone {spec['backbone']} are not averaged")
        stage = lean_stage(spec) if spec["backbone"] == LEAN else None
        pictures = None if stage is None else Pictures(list(data), torch.device("cpu"), smallest=256)
        for part in dict.fromkeys(parts):
            before, file = old / f"{part}.safetensors", new / f"{part}.safetensors"
            both = read_tensors(before), read_tensors(file)
            try:
                means[file] = average(*both, share)
            except ValueError as error:
                raise ValueError(f"{before}: {error}") from error
        for file, tensors in means.items():
            write_file(file, save(tensors))
        if stage is None or pictures is None:
            describe(new)
        else:
            start(stage, new, pictures, seed=1)
            export(stage, new)
        remember(new, {"stage": "average", "parts": list(dict.fromkeys(parts)), "share_of_old": share})
    except (ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
