"""Systems that the papers compare, each trained for as many steps as the others on the lean backbone.

``python -m compass_codec.training.baselines RUN --data photos.tar --steps 5000`` trains those of SYSTEMS in turn: first
the base codec, which systems with one entropy model share, then the enhancement layers. RUN/weights gets a set of
weights for each, with the system's name as profile. A run that was stopped goes on with the same command. ``--weights``
names a trained lean set, whose base codec all base codecs start from as far as they share networks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from compass_codec.commands import values
from compass_codec.training.ablations import BicubicStage, FirstStage, NoisyStage, PaddedStage, SecondStage
from compass_codec.training.command import carry_out
from compass_codec.training.lean import LeanContextStage, LeanLayersStage, LeanResidualStage, LeanStage
from compass_codec.training.predicted import MeiStage, RpnStage, UncertainRpnStage
from compass_codec.training.trainer import Plan

RATE, HYPER_RATE = 5e-4, 2.0  # learning rates; that of hyper networks is relative
DIMENSIONS: dict[str, Any] = {}  # of all base codecs, and so of the enhancement codecs that start from them


@dataclass(frozen=True)
class System:
    """``entropy`` is the entropy model of both codecs, ``layers`` the stage of the enhancement layers."""

    purpose: str
    entropy: str = "context"
    layers: type[LeanLayersStage] = LeanResidualStage


SYSTEMS = {
    "context": System("COMPASS with the context model in four steps"),
    "hyperprior": System("COMPASS with the mean-scale hyperprior", entropy="hyperprior"),
    "factorized": System("COMPASS with the factorized prior", entropy="factorized"),
    "msp": System("COMPASS with a multi-scale progressive model in seven steps", entropy="pyramid"),
    "msp-fast": System("COMPASS with a multi-scale progressive model in three steps", entropy="pyramid-fast"),
    "latent": System("as context, with the difference of latents as lean has it", layers=LeanLayersStage),
    "bicubic": System("as context, with bicubic interpolation for LIFF", layers=BicubicStage),
    "noisy": System("as context, with noisy latents in the distortion of training", layers=NoisyStage),
    "padded": System("as context, with layers padded to multiples of 64", layers=PaddedStage),
    "first": System("as context, for first enhancement layers alone", layers=FirstStage),
    "second": System("as context, for second enhancement layers alone, above first", layers=SecondStage),
    "mei": System("Mei et al. with the mean-scale hyperprior", entropy="hyperprior", layers=MeiStage),
    "mei-original": System("Mei et al. with the factorized prior", entropy="factorized", layers=MeiStage),
    "rpn": System("RPN with the mean-scale hyperprior", entropy="hyperprior", layers=RpnStage),
    "rpn-guided": System("as rpn, with its uncertainty-guided loss", entropy="hyperprior", layers=UncertainRpnStage),
}


def steps_of(folder: Path, stage: str) -> int | None:
    """How many steps the set in ``folder`` was trained in ``stage``, which was its last; None if there is none."""
    if not (history := folder / "history.json").exists():
        return None
    last = json.loads(history.read_text())[-1]
    return int(last["steps"]) if last["stage"] == stage else None


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--data", type=click.Path(path_type=Path), multiple=True, required=True, help="Tar file or folder of pictures."
)
@click.option("--steps", type=click.IntRange(1), default=5000, show_default=True, help="Steps of each stage.")
@click.option("--batch", type=values.INTEGERS, default="8", show_default=True, help="As for compass train.")
@click.option("--side", type=values.INTEGERS, default="128", show_default=True, help="As for compass train.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of a lean set whose base codec all base codecs start from. Default: the linear start.",
)
@click.option("--only", type=click.Choice(list(SYSTEMS)), multiple=True, help="Some of the systems.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def main(
    run: Path,
    data: tuple[Path, ...],
    steps: int,
    batch: tuple[int, ...],
    side: tuple[int, ...],
    weights: Path | None,
    only: tuple[str, ...],
    device: str,
    quiet: bool,
) -> None:
    """Train the systems that the papers compare, in the folder RUN."""
    for name in only or SYSTEMS:
        system = SYSTEMS[name]
        base = f"base-{system.entropy}"
        trained, begin = run / base / "weights", weights and weights / "base.safetensors"

        def make_base(entropy: str = system.entropy) -> LeanStage:
            return LeanContextStage(**DIMENSIONS, entropy=entropy)

        def make_layers(name: str = name, system: System = system) -> LeanStage:
            kind = system.layers
            stage = kind(run / "weights" / "first") if issubclass(kind, SecondStage) else kind()
            stage.card = {"profile": name, "purpose": system.purpose}
            return stage

        for stage, make, start, out in (
            (base, make_base, begin, trained),
            (name, make_layers, trained, run / "weights" / name),
        ):
            done = steps_of(out, stage)
            if done not in (None, steps):
                raise click.ClickException(f"{out}: trained for {done} steps, not {steps}; take another folder")
            plan = Plan(stage, steps=steps, batch=batch, side=side, lr=RATE, hyper_lr=HYPER_RATE)
            if done is None:
                carry_out(plan, make, data, run / stage, start, out, device=device, quiet=quiet)


if __name__ == "__main__":
    main()
