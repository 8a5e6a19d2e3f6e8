"""The training loop: one for all stages, resumable at any second, on one device or several.

State on disk is one safetensors file per stage (weights, EMA and optimiser; the counters as JSON in its metadata),
written whole and renamed, so that a run stopped at any moment goes on from its last checkpoint. What a step draws at
random is a function of the seed, the step and the process alone, so a resumed run repeats what it would have drawn.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import click
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compass_codec.networks.rates import level_of
from compass_codec.training import lean
from compass_codec.training.data import Pictures
from compass_codec.training.muon import Muon
from compass_codec.training.stages import STAGES, Stage, draw_factors, draw_lambdas

HELD_OUT_LAMBDAS = (0.0035, 0.013, 0.0483)
HELD_OUT_FACTORS = (2.0, 1.6)


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do. Given ``steps``, the schedule counts steps, otherwise minutes.

    ``side`` and ``batch`` hold one value or several, each for an equal share of the schedule: small crops first.
    ``hyper_lr`` is the hyper networks' learning rate relative to ``lr``. Every ``every`` seconds a checkpoint.
    ``compile``: let torch.compile fuse what a step does, which takes minutes for each size of crops. ``tune``: what the
    distortion of lean stages follows, "psnr" or "visual".
    """

    stage: str
    minutes: float = 20.0
    steps: int = 0
    batch: tuple[int, ...] = (8,)
    side: tuple[int, ...] = (128,)
    lr: float = 3e-4
    warmup: float = 0.03
    lr_end: float = 0.02
    hyper_lr: float = 1.0
    optimiser: str = "adam"
    ema: float = 0.999
    clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 1
    every: float = 120.0
    log_every: float = 10.0
    tune: str = "psnr"


def learning_rate(plan: Plan, progress: float) -> float:
    """Linear warm-up, then a cosine down to ``lr_end`` of the peak; ``progress`` in 0..1."""
    if progress < plan.warmup:
        return plan.lr * (0.02 + 0.98 * progress / plan.warmup)
    t = min(1.0, (progress - plan.warmup) / (1 - plan.warmup))
    return plan.lr * (plan.lr_end + (1 - plan.lr_end) * 0.5 * (1 + math.cos(math.pi * t)))


def at(values: tuple[int, ...], progress: float) -> int:
    """The value whose share of the schedule ``progress`` (0..1) falls into."""
    return values[min(int(progress * len(values)), len(values) - 1)]


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: where the hardware multiplies it; elsewhere it is far slower than float32."""
    if precision == "auto":
        supported: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
        return device.type == "cuda" or supported()
    return precision == "bf16"


def make_optimiser(plan: Plan, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The plan's optimiser; the hyper networks, which start cold, have a learning rate of their own."""
    hyper = [n for n in trained if ".h_" in n or ".bottleneck." in n]
    split = ([n for n in trained if n not in hyper], 1.0), (hyper, plan.hyper_lr)
    groups = [{"params": [trained[n] for n in names], "factor": factor} for names, factor in split if names]
    if plan.optimiser == "muon":
        return Muon(groups, lr=plan.lr)
    return torch.optim.Adam(groups, lr=plan.lr, fused=True)


class Run:
    """One stage being trained: the model, its EMA and optimiser, and how far it has come."""

    def __init__(self, plan: Plan, stage: Stage, pictures: Pictures, folder: Path, device: torch.device) -> None:
        if plan.compile and stage.layered:
            raise ValueError(f"{plan.stage}: layers of any size cannot be compiled; --compile is for base codecs")
        compiler = os.environ.get("CXX", "g++")  # what PyTorch takes on a CPU
        if plan.compile and device.type == "cpu" and not shutil.which(compiler):
            raise ValueError(f"--compile needs a C++ compiler; there is no {compiler}")
        self.plan, self.stage, self.pictures, self.folder, self.device = plan, stage, pictures, folder, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        stage.freeze()
        stage.to(device).to(memory_format=torch.channels_last).train()
        self.model: nn.Module = cast(nn.Module, torch.compile(stage)) if plan.compile else stage
        if self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
            # what the processes agree on each step goes over the CPU, so that nobody waits for the GPU
            self.control: Any = dist.new_group(backend="gloo")
        self.trained = {n: p for n, p in stage.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.trained.items()}
        self.optimiser = make_optimiser(plan, self.trained)
        self.generator = torch.Generator()
        self.step, self.patches, self.seconds = 0, 0, 0.0
        self.bf16 = use_bf16(plan.precision, device)

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.plan.stage}.state.safetensors"

    def progress(self) -> float:
        """How much of the schedule is done, 0..1 and beyond."""
        return self.step / self.plan.steps if self.plan.steps else self.seconds / (60 * self.plan.minutes)

    def _seed(self, purpose: int, process: int) -> int:
        return int(np.random.SeedSequence([self.plan.seed, self.step, purpose, process]).generate_state(1)[0])

    def advance(self, progress: float) -> dict[str, Any]:
        """One optimiser step; its loss and parts, as tensors that nobody has waited for yet."""
        lr = learning_rate(self.plan, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        batch = at(self.plan.batch, progress)
        # the sizes of layers must agree between processes, crops and noise must not
        draw = getattr(self.stage, "draw_factors", draw_factors)
        factors = draw(self.generator.manual_seed(self._seed(0, 0)))
        self.generator.manual_seed(self._seed(1, self.rank))
        torch.manual_seed(self._seed(2, self.rank))
        x = self.pictures.sample(batch, at(self.plan.side, progress), self.generator)
        lam = draw_lambdas(batch, self.generator, self.stage.lambdas)
        rates = torch.stack((lam, level_of(lam, self.stage.lambdas).float())).to(self.device, non_blocking=True)
        x = self.stage.varied(x, rates[0])
        self.stage.progress = progress
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss, parts = self.model(x.contiguous(memory_format=torch.channels_last), *rates, factors)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.plan.clip)
        # a non-finite gradient must not reach the weights; where() does it without waiting for a GPU
        if norm.is_cuda or not norm.isfinite():
            for p in self.trained.values():
                if p.grad is not None:
                    p.grad = torch.where(norm.isfinite(), p.grad, torch.zeros((), device=p.device))
        self.optimiser.step()
        self.step += 1
        self.patches += batch * self.world
        decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            names = list(self.trained)
            torch._foreach_lerp_([self.ema[n] for n in names], [self.trained[n] for n in names], 1 - decay)
        return {"lr": lr, "lambda": lam.log().mean().exp(), "loss": loss.detach(), **parts}

    @torch.no_grad()
    def held_out(self) -> list[dict[str, float]]:
        """Rate, distortion and loss of the EMA weights on pictures that are never trained on."""
        side = min(256, 2 * max(self.plan.side))
        x = torch.stack([p[:, :side, :side] for p in self.pictures.held_out]).to(self.device).float() / 255
        kept = {n: p.detach().clone() for n, p in self.trained.items()}
        self.put(self.ema)
        self.stage.eval()
        points = []
        for value in HELD_OUT_LAMBDAS:
            lam = torch.full((len(x),), value)
            rates = torch.stack((lam, level_of(lam, self.stage.lambdas).float())).to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                loss, parts = self.stage(x, *rates, HELD_OUT_FACTORS)
            points.append({"lambda": value, "loss": float(loss), **{k: float(v) for k, v in parts.items()}})
        self.stage.train()
        self.put(kept)
        return points

    def put(self, values: dict[str, Tensor]) -> None:
        """Set the trained weights, for example to the EMA before an export."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(values[name])

    def save(self) -> None:
        """Write the checkpoint; the frozen parts are in it too, so that resuming needs no other file."""
        if self.rank:
            return
        tensors = {f"weights.{n}": p for n, p in self.stage.state_dict().items()}
        tensors |= {f"ema.{n}": p for n, p in self.ema.items()}
        for n, p in self.trained.items():
            tensors |= {f"optimiser.{n}|{key}": value for key, value in self.optimiser.state[p].items()}
        counters = {"step": self.step, "patches": self.patches, "seconds": self.seconds, "plan": asdict(self.plan)}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"run": json.dumps(counters)}
        )
        temporary.replace(self.checkpoint)

    def load(self) -> list[str]:
        """Go on from the checkpoint. Returns the names of the plan's settings that are not those it was made with.

        Raises ValueError when it is no checkpoint of this stage.
        """
        try:
            with safe_open(self.checkpoint, "pt") as file:
                counters = json.loads(file.metadata()["run"])
            tensors = load_file(self.checkpoint)
            self.stage.load_state_dict({n: tensors[f"weights.{n}"] for n in self.stage.state_dict()})
            with torch.no_grad():
                for n, value in self.ema.items():
                    value.copy_(tensors[f"ema.{n}"])
            self.step, self.patches, self.seconds = counters["step"], counters["patches"], counters["seconds"]
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: not a checkpoint of this stage") from error
        self.stage.freeze()
        self._put_moments(tensors)
        stored = counters["plan"]
        return [k for k, v in json.loads(json.dumps(asdict(self.plan))).items() if k in stored and stored[k] != v]

    def load_moments(self, checkpoint: Path) -> None:
        """Take the optimiser's moments from another run's checkpoint, of this stage or another, for the parameters that
        both train, so that a new schedule does not begin with an optimiser that knows nothing.

        Raises ValueError when it is no checkpoint, or one of another optimiser or without a parameter of this stage.
        """
        try:
            with safe_open(checkpoint, "pt") as file:
                optimiser = json.loads(file.metadata()["run"])["plan"]["optimiser"]
            tensors = load_file(checkpoint)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{checkpoint}: not a checkpoint") from error
        if optimiser != self.plan.optimiser:
            raise ValueError(f"{checkpoint}: moments of another optimiser, {optimiser}")
        if not self._put_moments(tensors):
            raise ValueError(f"{checkpoint}: no moments of what {self.plan.stage} trains")

    def _put_moments(self, tensors: dict[str, Tensor]) -> int:
        """The optimiser's state out of a checkpoint's tensors, where a parameter is trained here; of how many."""
        found = set()
        for name, value in tensors.items():
            n, _, key = name.removeprefix("optimiser.").partition("|")
            p = self.trained.get(n) if name.startswith("optimiser.") else None
            if p is None or (value.ndim and value.shape != p.shape):
                continue
            found.add(n)
            # a matrix keeps the weights' memory layout; the step counter lives where fused Adam wants it
            counter = "cpu" if self.plan.optimiser == "muon" else p.device
            state = torch.empty_like(p).copy_(value) if value.ndim else value.to(counter)
            self.optimiser.state[p][key] = state
        return len(found)

    def _agree(self, progress: float, stop: bool) -> tuple[float, bool]:
        """Progress and whether to stop, the same in all processes."""
        if self.world == 1:
            return progress, stop
        both = torch.tensor([progress, float(stop)], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.control)
        return float(both[0]), bool(both[1])

    def go(self, log: Path, quiet: bool = False) -> int:
        """Train to the end of the plan, or until SIGTERM or SIGINT; both end with a checkpoint.

        Appends JSON lines to ``log``. Returns the number of the signal, 0 at the end of the plan.
        """
        stop = _StopSignal()
        chief = self.rank == 0
        start, saved = time.monotonic() - self.seconds, time.monotonic()
        logged, counted = self.seconds, self.patches
        with (log if chief else Path(os.devnull)).open("a") as file:

            def note(entry: dict[str, Any]) -> None:
                file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 2)} | entry) + "\n")
                file.flush()

            def note_step() -> None:
                nonlocal logged, counted
                numbers = {k: float(v) for k, v in parts.items()}
                speed = (self.patches - counted) / max(1e-9, self.seconds - logged)
                note(numbers | {"patches_per_second": round(speed, 2)})
                logged, counted = self.seconds, self.patches

            def note_held_out() -> None:
                if chief:
                    points = self.held_out()
                    note({"held_out": points})
                    if not quiet:
                        curve = "  ".join(f"{p['bpp']:.3f} bpp {p['psnr']:.2f} dB" for p in points)
                        click.echo(f"\nstep {self.step}: {curve}")

            with click.progressbar(length=1000, label=self.plan.stage, hidden=quiet or not chief) as bar:
                while True:
                    progress, stopped = self._agree(self.progress(), bool(stop.number))
                    if progress >= 1 or stopped:
                        break
                    parts = self.advance(progress)
                    self.seconds = time.monotonic() - start
                    if self.step == 1 or self.seconds - logged >= self.plan.log_every:
                        note_step()
                        bar.update(max(0, int(1000 * progress) - bar.pos))
                    if time.monotonic() - saved >= self.plan.every:
                        self.save()
                        note_held_out()
                        saved = time.monotonic()
            if self.patches > counted:
                note_step()
            self.save()
            note_held_out()
        stop.restore()
        return 0 if progress >= 1 else stop.number or signal.SIGTERM


class _StopSignal:
    """Remembers SIGTERM and SIGINT until the step in hand is done."""

    def __init__(self) -> None:
        self.number = 0
        self.old = {s: signal.signal(s, self._raise) for s in (signal.SIGTERM, signal.SIGINT)}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def make_stage(name: str, tune: str = "psnr") -> Stage:
    """A stage; one of lean with the distortion of ``tune``."""
    stage = (STAGES | lean.STAGES)[name]()
    if isinstance(stage, lean.LeanStage):
        stage.tune = tune
    return stage
