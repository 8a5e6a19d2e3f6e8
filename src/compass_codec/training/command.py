"""``compass train``: trains one stage for the time given and exports its weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compass_codec.commands import values
from compass_codec.commands.common import one_line

if TYPE_CHECKING:
    import torch

    from compass_codec.training.data import Pictures
    from compass_codec.training.stages import Stage
    from compass_codec.training.trainer import Plan, Run

# Nothing above needs torch, so that listing the commands stays quick.

LEAN = ("lean", "lean-context", "lean-layers", "lean-residual")


def choose_device(name: str) -> torch.device:
    """The device of this process; ValueError when there is no such device. Sets up the processes under torchrun."""
    import os

    import torch
    import torch.distributed as dist

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: use --device cpu or auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def fill(stage: Stage, weights: Path | None, pictures: Pictures, seed: int, liff: str | None = None) -> str:
    """Give ``stage`` something better than random weights to start from; returns what that was, in words.

    ``weights``: a folder of exported weights (None: the installed ones, if there are any) or one file with CompressAI's
    names. A base layer that is not there starts as a block transform, a residual codec as a copy of the base layer,
    LIFF as bicubic interpolation, as it does when ``liff`` names another size than its weights have.
    """
    import torch

    from compass_codec.backbones.mean_scale import PARTS
    from compass_codec.training import lean
    from compass_codec.training.export import BACKBONE, import_start, load_parts
    from compass_codec.training.start import block_transform
    from compass_codec.weights import folder_of

    if isinstance(stage, lean.LeanStage):
        return lean.start(stage, weights, pictures, seed)
    if weights is not None and weights.is_file():
        import_start(stage, weights)
        found = {"base"}
    else:
        if weights is not None and not weights.is_dir():
            raise ValueError(f"{weights}: no such file or folder of weights")
        folder = weights or folder_of(BACKBONE)
        found = load_parts(stage, folder, liff) if folder else set()
    words = [f"{part} from weights" for part in PARTS if part in found]
    if "base" not in found:
        crops = pictures.sample(32, 128, torch.Generator().manual_seed(seed))
        block_transform(stage.base.codec, crops, seed)
        words.append("base from the block transform")
    if "residual" not in found:
        stage.residual.load_state_dict(stage.base.state_dict())
        words.append("residual from base")
    if "liff" not in found:
        words.append("liff from bicubic")
    return ", ".join(words)


def finish(run: Run, weights: Path | None, out: Path, sources: tuple[Path, ...], start: str) -> list[Path]:
    """Export the EMA weights to ``out``, next to copies of the parts that this stage did not train."""
    from dataclasses import asdict

    from compass_codec.backbones.mean_scale import PARTS
    from compass_codec.training.export import BACKBONE, device_name, export
    from compass_codec.training.lean import LeanStage
    from compass_codec.weights import CARD, folder_of

    plan, name = asdict(run.plan), device_name(run.device)
    entry = {
        "stage": plan.pop("stage"),
        "minutes": round(run.seconds / 60, 1),
        "device": f"{run.world} x {name}" if run.world > 1 else name,
        "steps": run.step,
        "patches": run.patches,
        "pictures": {"count": len(run.pictures), "sources": [source.name for source in sources]},
        "start": start,
        "settings": plan | {"precision": "bf16" if run.bf16 else "fp32"},
    }
    run.put(run.ema)
    out.mkdir(parents=True, exist_ok=True)
    lean = isinstance(run.stage, LeanStage)
    folder = weights or (None if lean else folder_of(BACKBONE))
    if folder is not None and folder.is_dir():
        others = [f"{part}.safetensors" for part in PARTS if part not in run.stage.trains]
        for file in [*others, CARD, "history.json"]:
            if (folder / file).exists() and not (out / file).exists():
                shutil.copyfile(folder / file, out / file)
    return export(run.stage, out, entry)


@click.command("train")
@click.argument(
    "stage",
    type=click.Choice(["base", "liff", "residual", "joint", "hyper", *LEAN]),
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Tar file or folder of pictures with sides of 256 pixels or more; can be given several times.",
)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=20, show_default=True, help="Length of the schedule."
)
@click.option("--steps", type=click.IntRange(1), help="Length of the schedule in steps instead of minutes.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the checkpoint and the log; a run found there is resumed.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Folder or file to start from. Default: the set paper where it is installed; else a linear transform.",
)
@click.option(
    "--moments",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Checkpoint of another run whose optimiser moments a new run takes over.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the exported weights. Default: RESUME/weights.",
)
@click.option(
    "--batch",
    type=values.INTEGERS,
    default="16",
    show_default=True,
    help="Crops per step and process; several values take equal shares of the schedule.",
)
@click.option(
    "--side",
    type=values.INTEGERS,
    default="128,256",
    show_default=True,
    help="Side of crops in pixels; several values take equal shares of the schedule.",
)
@click.option(
    "--tune",
    type=click.Choice(["psnr", "visual"]),
    default="psnr",
    show_default=True,
    help="What the distortion of lean stages follows: the squared error, or what people see.",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True, help="Highest learning rate."
)
@click.option(
    "--hyper-lr",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Learning rate of the hyper networks, relative to --lr.",
)
@click.option(
    "--optimiser",
    type=click.Choice(["adam", "muon"]),
    default="adam",
    show_default=True,
    help="Optimiser; muon takes the matrices of convolutions and Adam the rest.",
)
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.999,
    show_default=True,
    help="Decay of the averaged weights, which are exported.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="Number format of the networks; auto is bf16 where the hardware multiplies it.",
)
@click.option(
    "--compile",
    is_flag=True,
    help="Compile the networks of base codecs first, which takes minutes; steps then take 0.7 of the time or less.",
)
@click.option("--liff", type=click.Choice(["small", "paper"]), help="Size of LIFF. Default: that of the weights.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of crops, rates and scale factors."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def train(
    stage: str,
    data: tuple[Path, ...],
    resume: Path,
    weights: Path | None,
    moments: Path | None,
    out: Path | None,
    liff: str | None,
    device: str,
    quiet: bool,
    **settings: Any,
) -> None:
    """Train STAGE on pictures for the time given, and export its weights.

    Ctrl-C or SIGTERM stops a run at any moment, and the same command resumes it. The schedule counts the minutes or
    steps of all these runs together.

    \b
    compass train base --data photos.tar --minutes 20 --resume runs/a
    compass train residual --data photos/ --weights runs/a/weights --resume runs/a
    torchrun --nproc-per-node 8 -m compass_codec train joint --data photos.tar --resume runs/b
    """
    from compass_codec.training.trainer import Plan, make_stage

    if settings["tune"] != "psnr" and stage not in LEAN:
        raise click.UsageError(f"--tune goes with {', '.join(LEAN)}")
    if liff is not None and stage in LEAN:
        raise click.UsageError(f"--liff does not go with {', '.join(LEAN)}")
    plan = Plan(stage, **settings | {"steps": settings["steps"] or 0})
    carry_out(
        plan,
        lambda: make_stage(stage, plan.tune),
        data,
        resume,
        weights,
        out,
        moments,
        liff,
        device=device,
        quiet=quiet,
    )


def carry_out(
    plan: Plan,
    make: Callable[[], Stage],
    data: tuple[Path, ...],
    resume: Path,
    weights: Path | None,
    out: Path | None = None,
    moments: Path | None = None,
    liff: str | None = None,
    *,
    device: str,
    quiet: bool,
) -> None:
    """Train the stage that ``make`` makes as ``train`` does with these options."""
    import torch
    import torch.distributed as dist

    from compass_codec.training.data import Pictures
    from compass_codec.training.trainer import Run

    try:
        with one_line():
            chosen = choose_device(device)
            resume.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before pictures are read
            pictures = Pictures(list(data), chosen, smallest=max(256, *plan.side))
            torch.manual_seed(plan.seed)
            networks = make()
            start = fill(networks, weights, pictures, plan.seed, liff)
            run = Run(plan, networks, pictures, resume, chosen)
            chief = run.rank == 0
            if run.checkpoint.exists():
                changed = run.load()
                if changed and chief:
                    click.echo(f"note: not as in the checkpoint: {', '.join(changed)}", err=True)
            elif moments is not None:
                run.load_moments(moments)
        if chief and not quiet:
            origin = f"step {run.step}, {run.seconds / 60:.1f} minutes" if run.step else start
            click.echo(f"{plan.stage}: {len(pictures)} pictures; start: {origin}")
        stopped = run.go(resume / f"{plan.stage}.jsonl", quiet)
        report = f"stopped at step {run.step}; the same command goes on from there"
        if chief and not stopped:
            with one_line():
                files = finish(run, weights, out or resume / "weights", data, start)
            report = ", ".join(f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in files)
        if chief and not quiet:
            click.echo(report)
        if stopped:
            sys.exit(128 + stopped)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
