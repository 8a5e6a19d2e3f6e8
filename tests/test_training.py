"""Training: what it starts from, that every stage learns, resumes exactly, and exports what the codec reads."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import noise_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

from compass_codec import weights
from compass_codec.backbones import mean_scale, symbols
from compass_codec.backbones.mean_scale import PARTS
from compass_codec.codec import Codec
from compass_codec.entropy import PRECISION, scale_levels
from compass_codec.jobs.fresh import ORIENTATION
from compass_codec.networks import liff_rows
from compass_codec.networks.liff import LIFF, SIZES, bicubic
from compass_codec.networks.mean_scale import ImageCodec
from compass_codec.networks.mean_scale_numbers import LAMBDAS
from compass_codec.networks.rates import level_of
from compass_codec.training import data as training_data
from compass_codec.training import stages
from compass_codec.training.command import train
from compass_codec.training.data import HELD_OUT, Pictures
from compass_codec.training.density import FactorizedDensity
from compass_codec.training.export import REACH, describe, export, import_start, load_parts, z_table
from compass_codec.training.stages import draw_lambdas
from compass_codec.training.start import block_transform
from compass_codec.training.trainer import Plan, Run, at, learning_rate, make_stage
from compass_codec.weights import choose, folder_of, read_set

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def shrink_networks() -> None:
    """Networks small enough that a step takes milliseconds."""
    stages.ImageCodec = functools.partial(ImageCodec, 16, 24)  # type: ignore[misc, assignment]
    SIZES["small"] = {"channels": 8, "hidden": 16, "depth": 4, "growth": 8, "blocks": 2, "convs": 2}
    torch.set_num_threads(1)  # more would only wait for each other


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(stages, "ImageCodec", stages.ImageCodec)
    monkeypatch.setitem(SIZES, "small", SIZES["small"])
    threads = torch.get_num_threads()
    shrink_networks()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def portrait() -> Image.Image:
    return Image.open(Path(matplotlib.__file__).parent / "mpl-data/sample_data/grace_hopper.jpg").convert("RGB")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, portrait) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        left, top = i % 3 * 128, i // 3 * 300
        portrait.crop((left, top, left + 256, top + 300)).save(path / f"{i}.png")
    for i, picture in enumerate(noise_pictures(4, 256)):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(path / f"noise{i}.png")
    (path / "notes.txt").write_text("not a picture")
    (path / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 damaged")
    return path


@pytest.fixture(scope="session")
def pictures(folder) -> Pictures:
    return Pictures([folder], CPU)


def started(name: str) -> stages.Stage:
    torch.manual_seed(0)
    stage = make_stage(name)
    block_transform(stage.base.codec, noise_pictures())
    stage.residual.load_state_dict(stage.base.state_dict())
    return stage


def tensors(run: Run) -> dict[str, torch.Tensor]:
    found = {f"weights.{n}": p.detach().clone() for n, p in run.trained.items()}
    found |= {f"ema.{n}": p.clone() for n, p in run.ema.items()}
    for n, p in run.trained.items():
        found |= {f"{n}.{k}": v.clone() for k, v in run.optimiser.state[p].items()}
    return found


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process of its own, with the small networks."""
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(stages.__file__).parents[2])])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"import test_training as t; t.shrink_networks()\n{code}"]
        + [str(a) for a in arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class TestStart:
    def test_untrained_codec_reconstructs(self, portrait):
        x = torch.from_numpy(np.array(portrait)[:400, 100:452]).permute(2, 0, 1)[None].float() / 255
        codec = ImageCodec()
        block_transform(codec, noise_pictures())
        level = torch.tensor([3.0])
        with torch.no_grad():
            y = codec.analysis(x - 0.5, level)
            psnr = [
                float(-10 * ((codec.synthesis(v, level, (400, 352)) + 0.5).clamp(0, 1) - x).square().mean().log10())
                for v in (y, y.round())
            ]
        print(f"untrained start: {psnr[0]:.2f} dB, {psnr[1]:.2f} dB rounded")
        assert psnr[0] > 31.8 and psnr[1] > 30.0

    def test_gains_follow_lambda(self):
        codec = ImageCodec(16, 24)
        block_transform(codec, torch.rand(2, 3, 70, 50))
        ratio = codec.log_gain.exp()[-1] / codec.log_gain.exp()[0]
        assert torch.allclose(ratio, torch.tensor((LAMBDAS[-1] / LAMBDAS[0]) ** 0.5))
        assert torch.equal(codec.log_inv_gain, -codec.log_gain)

    def test_training_rounds_as_the_encoder_does(self):
        """Up to what the tables it is coded with differ from a normal distribution."""
        codec = Codec.load("cpu", model="paper")
        generator = torch.Generator().manual_seed(3)
        index = torch.randint(0, 40, (1, 192, 40, 40), generator=generator)
        scales = torch.from_numpy(scale_levels()).float()[index]
        y = scales * torch.randn(scales.shape, generator=generator)
        ours, theirs = stages.encoded(y, scales), codec.base.quantise(y.clone(), index.to(torch.uint8))
        plain = y.round()
        assert (ours != theirs).float().mean() < 0.4 * (plain != theirs).float().mean()
        assert ((ours - y).abs() <= 0.5 + stages.MOST_BEYOND + 1e-6).all()

    def test_untrained_liff_is_bicubic(self):
        x = torch.rand(1, 3, 9, 12)
        with torch.no_grad():
            torch.testing.assert_close(LIFF(**SIZES["small"])(x, (20, 31)), bicubic(x, (20, 31)), atol=5e-6, rtol=0)


class TestPictures:
    def test_sample(self, pictures):
        for side in (16, 128, 200):
            x = pictures.sample(3, side, torch.Generator().manual_seed(1))
            assert x.shape == (3, 3, side, side) and x.dtype == torch.float32
            assert 0 <= x.min() < x.max() <= 1
            assert torch.equal(x, pictures.sample(3, side, torch.Generator().manual_seed(1)))

    def test_crops_stay_within_their_picture(self, tmp_path):
        for i in range(12):
            Image.new("RGB", (256 + 7 * i, 300 - i), (20 * i, 5, 250 - 20 * i)).save(tmp_path / f"{i:02}.png")
        flat = Pictures([tmp_path], CPU)
        assert len(flat) == 12 - HELD_OUT == len(flat.held_out)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            x = flat.sample(4, 128, generator)
            assert (x - x[:, :, :1, :1]).abs().max() < 1e-5

    def test_lambdas_are_spread_over_the_range(self):
        draws = torch.stack([draw_lambdas(8, torch.Generator().manual_seed(seed)) for seed in range(64)])
        part = (draws / LAMBDAS[0]).log() / np.log(LAMBDAS[-1] / LAMBDAS[0]) * 8
        assert torch.equal(part.floor().sort(1)[0], torch.arange(8.0).expand(64, 8))
        assert len(part[:, 0].floor().unique()) == 8  # in no order
        assert 0.4 < float(part.frac().mean()) < 0.6 and len(part.frac().unique()) > 400

    def test_tar_is_read_like_a_folder(self, folder, pictures, tmp_path):
        with tarfile.open(tmp_path / "p.tar", "w") as tar:
            for file in sorted(folder.iterdir()):
                info = tarfile.TarInfo(f"inside/{file.name}")
                info.size = file.stat().st_size
                tar.addfile(info, io.BytesIO(file.read_bytes()))
        assert torch.equal(Pictures([tmp_path / "p.tar"], CPU).flat, pictures.flat)


class TestLearning:
    @pytest.mark.parametrize("name", ["base", "liff", "residual", "joint", "hyper"])
    def test_stage_lowers_its_held_out_loss(self, small, pictures, tmp_path, name):
        plan = Plan(name, steps=48 if name == "liff" else 16, batch=(3,), side=(64,), lr=5e-4, ema=0.5)
        stage = started(name)
        run = Run(plan, stage, pictures, tmp_path, CPU)
        frozen = {n: p.clone() for n, p in run.stage.named_parameters() if not p.requires_grad}
        before = sum(p["loss"] for p in run.held_out())
        assert run.go(tmp_path / "log.jsonl", quiet=True) == 0
        after = sum(p["loss"] for p in run.held_out())
        print(f"{name}: held-out loss {before:.4f} -> {after:.4f}")
        assert after < before
        assert all(torch.equal(p, frozen[n]) for n, p in run.stage.named_parameters() if n in frozen)
        # several processes would wait for the gradient of a parameter that has none
        assert not [n for n, p in run.trained.items() if p.grad is None]
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert {"step", "seconds", "lr", "lambda", "loss", "bpp", "psnr", "patches_per_second"} <= log[0].keys()
        assert log[-1]["step"] == plan.steps and len(log[-1]["held_out"]) == 3

    def test_hyper_stage_leaves_the_transforms_and_keeps_latents(self, small, pictures, tmp_path):
        run = Run(Plan("hyper", steps=3, batch=(2,), side=(64, 96)), started("hyper"), pictures, tmp_path, CPU)
        before = {n: p.detach().clone() for n, p in run.stage.named_parameters()}
        sizes = []
        for _ in range(3):
            run.advance(run.progress())
            sizes.append((len(run.stage.kept), run.stage.kept[0][0].shape[-1]))
        assert sizes == [(2, 4), (4, 4), (2, 6)]  # other crops, other latents
        changed = {n for n, p in run.stage.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(".codec.h_" in n or ".bottleneck." in n for n in changed)
        assert {n.split(".")[0] for n in changed} == {"base", "residual"}

    def test_muon_learns(self, small, pictures, tmp_path):
        plan = Plan("base", steps=20, batch=(4,), side=(64,), lr=5e-4, ema=0.5, optimiser="muon")
        run = Run(plan, started("base"), pictures, tmp_path, CPU)
        before = sum(p["loss"] for p in run.held_out())
        run.go(tmp_path / "log.jsonl", quiet=True)
        assert sum(p["loss"] for p in run.held_out()) < before

    def test_not_finite_gradients_change_nothing_but_momentum(self, small, pictures, tmp_path, monkeypatch):
        run = Run(Plan("base", steps=9, batch=(2,), side=(64,)), started("base"), pictures, tmp_path, CPU)
        monkeypatch.setattr(pictures, "sample", lambda *_: torch.full((2, 3, 64, 64), torch.nan))
        before = {n: p.detach().clone() for n, p in run.trained.items()}
        run.advance(0.5)
        assert all(torch.equal(p, before[n]) for n, p in run.trained.items())

    def test_schedule(self):
        plan = Plan("base", lr=1.0, warmup=0.1, lr_end=0.02)
        rates = [learning_rate(plan, p / 100) for p in range(101)]
        assert rates[0] == pytest.approx(0.02) and max(rates) == rates[10] == 1 and rates[-1] == pytest.approx(0.02)
        assert [at((128, 256), p) for p in (0, 0.49, 0.5, 1, 1.2)] == [128, 128, 256, 256, 256]

    def test_schedule_in_minutes(self, small, pictures, tmp_path):
        run = Run(Plan("base", minutes=0.01, batch=(2,), side=(32,)), started("base"), pictures, tmp_path, CPU)
        assert not run.go(tmp_path / "log.jsonl", quiet=True) and run.step > 0 and run.seconds > 0.6
        again = Run(run.plan, started("base"), pictures, tmp_path, CPU)
        assert again.load() == [] and again.progress() >= 1


class TestResume:
    @pytest.mark.parametrize("optimiser", ["adam", "muon"])
    def test_continues_exactly(self, small, pictures, tmp_path, optimiser):
        plan = Plan("joint", steps=6, batch=(2, 3), side=(64, 96), optimiser=optimiser)

        def steps(run: Run, count: int) -> list[float]:
            return [run.advance(run.progress())["lr"] for _ in range(count)]

        whole = Run(plan, started("joint"), pictures, tmp_path, CPU)
        rates = steps(whole, 6)
        first = Run(plan, started("joint"), pictures, tmp_path, CPU)
        assert steps(first, 2) == rates[:2]
        first.save()
        torch.rand(5)  # whatever else draws random numbers must not matter
        second = Run(plan, make_stage("joint"), pictures, tmp_path, CPU)
        assert second.load() == [] and second.step == 2
        assert steps(second, 4) == rates[2:]
        expected, found = tensors(whole), tensors(second)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
        assert second.patches == whole.patches == 15

    def test_moments_of_another_run(self, small, pictures, tmp_path):
        other = Run(Plan("joint", steps=3, batch=(2,), side=(64,)), started("joint"), pictures, tmp_path, CPU)
        for _ in range(2):
            other.advance(other.progress())
        other.save()
        run = Run(Plan("residual"), started("residual"), pictures, tmp_path, CPU)
        run.load_moments(other.checkpoint)
        assert run.step == 0
        for n, p in run.trained.items():
            theirs = other.optimiser.state[other.trained[n]]
            assert theirs.keys() == run.optimiser.state[p].keys() and float(theirs["step"]) == 2
            assert all(torch.equal(value, run.optimiser.state[p][key]) for key, value in theirs.items())
        run.advance(0.5)
        with pytest.raises(ValueError, match="no moments of what base trains"):
            Run(Plan("base"), started("base"), pictures, tmp_path, CPU).load_moments(other.checkpoint)
        with pytest.raises(ValueError, match="another optimiser, adam"):
            plan = Plan("residual", optimiser="muon")
            Run(plan, started("residual"), pictures, tmp_path, CPU).load_moments(other.checkpoint)
        with pytest.raises(ValueError, match="not a checkpoint"):
            run.load_moments(tmp_path / "none.safetensors")

    def test_residual_stage_repeats_sizes_above_lower_rates(self, small, monkeypatch):
        stage, levels = started("residual"), []
        stage.freeze()
        monkeypatch.setattr(stage, "lower", lambda x, level: levels.append(level) or x.detach() * 0.9)
        lam = torch.tensor([0.0067, 0.0483])
        for factors in ((2.0, 1.5), (1.0, 2.0)):
            stage(torch.rand(2, 3, 64, 64), lam, level_of(lam, LAMBDAS).float(), factors)
        assert torch.equal(levels[0], level_of(lam, LAMBDAS).float())
        assert ((levels[1] > 0) & (levels[1] < levels[0])).all()

    @pytest.mark.parametrize("factors", [(1.5, 1.2), (1.0, 1.2)])
    def test_half_of_the_layers_below_are_enhancement_layers(self, small, monkeypatch, factors):
        """Coded by the codec that is being trained, which gets its gradients all the same, in bfloat16 too."""
        stage, codes = started("residual"), []
        stage.freeze()
        code = stage.code
        monkeypatch.setattr(stage, "code", lambda *args: codes.append((args[0], *args[1].shape[-2:])) or code(*args))
        lam = torch.tensor([0.0067, 0.0483])
        deeper = 0
        for seed in range(12):
            torch.manual_seed(seed)
            codes.clear()
            stage.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                stage(torch.rand(2, 3, 48, 48), lam, level_of(lam, LAMBDAS).float(), factors)[0].backward()
            assert not [n for n, p in stage.named_parameters() if p.requires_grad and p.grad is None]
            below, lowest = round(48 / factors[0]), round(48 / factors[0] / 1.2)
            top = ("residual", 48, 48)
            if len(codes) == 3:
                deeper += 1
                assert codes == [("base", lowest, lowest), ("residual", below, below), top]
            else:
                assert codes == [("base", below, below), top]
        assert 2 < deeper < 10
        stage.eval()
        codes.clear()
        stage(torch.rand(2, 3, 48, 48), lam, level_of(lam, LAMBDAS).float(), factors)
        assert len(codes) == 2  # held-out losses depend on no chance

    def test_changed_settings_are_named(self, small, pictures, tmp_path):
        Run(Plan("base", lr=1e-3), started("base"), pictures, tmp_path, CPU).save()
        assert Run(Plan("base", lr=2e-3), started("base"), pictures, tmp_path, CPU).load() == ["lr"]

    def test_damaged_checkpoint(self, small, pictures, tmp_path):
        run = Run(Plan("base"), started("base"), pictures, tmp_path, CPU)
        run.checkpoint.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="not a checkpoint"):
            run.load()

    def test_sigterm_saves_a_checkpoint(self, small, folder, tmp_path):
        code = "from compass_codec.training.command import train; train()"
        options = ["base", "--data", folder, "--batch", 2, "--side", 64, "--resume", tmp_path, "--device", "cpu"]
        process = python(code, *options, "--weights", tmp_path, "--steps", 10**6)
        log = tmp_path / "base.jsonl"
        for _ in range(600):
            if process.poll() is not None or (log.exists() and log.read_text()):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "stopped at step" in output and "Traceback" not in output
        step = json.loads(log.read_text().splitlines()[-1])["step"]
        result = CliRunner().invoke(train, [str(a) for a in [*options, "--weights", tmp_path, "--steps", step + 2]])
        assert result.exit_code == 0 and f"start: step {step}" in result.output, result.output
        history = json.loads((tmp_path / "weights" / "history.json").read_text())
        assert history[-1]["steps"] == step + 2 and history[-1]["stage"] == "base"
        assert load_parts(make_stage("base"), tmp_path / "weights") == {"base"}


def work(folder: str, out: str) -> None:
    """What each of several processes does, under the environment that torchrun makes."""
    from compass_codec.training.command import choose_device

    device = choose_device("cpu")
    plan = Plan("residual", steps=4, batch=(2,), side=(64,))
    stage = started("residual")
    run = Run(plan, stage, Pictures([Path(folder)], device), Path(out), device)
    run.go(Path(out) / "residual.jsonl", quiet=True)
    save_file({k: v.contiguous() for k, v in tensors(run).items()}, Path(out) / f"{run.rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_agree(small, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = "import sys; t.work(*sys.argv[1:])"
    processes = [python(code, folder, tmp_path, RANK=r, LOCAL_RANK=r, **shared) for r in ("0", "1")]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    log = [json.loads(line) for line in (tmp_path / "residual.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and (tmp_path / "residual.state.safetensors").exists()


def test_what_is_kept_can_be_used_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert stages.stacked([torch.ones(2).half()] * 3).dtype == torch.float32


class TestExport:
    def test_codec_reads_what_training_writes(self, tmp_path):
        stage = started("base")
        for name in ("base", "liff", "residual"):
            stage.trains = (name,)
            export(stage, tmp_path, {"stage": name})
        sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
        assert len(sizes) == 3 and max(sizes) < 15e6
        assert [entry["stage"] for entry in json.loads((tmp_path / "history.json").read_text())] == [
            "base", "liff", "residual",
        ]  # fmt: skip
        other = make_stage("joint")
        assert load_parts(other, tmp_path) == {"base", "residual", "liff"}
        for name, value in other.state_dict().items():
            expected = stage.state_dict()[name]
            assert torch.equal(value, expected if ".bottleneck." in name else expected.half().float())
        codec = Codec.load("cpu", tmp_path)
        layers = [np.random.default_rng(0).integers(0, 256, (h, 2 * h, 3), dtype=np.uint8) for h in (9, 20)]
        encoded = codec.encode_layers(layers, [1, 2.2], 50)
        assert np.array_equal(np.asarray(codec.decode(encoded.data)), encoded.layers[-1])

    def test_tables(self):
        density = FactorizedDensity(5)
        table = z_table(density)
        assert table.dtype == torch.int32 and table.shape == (5, 2 * REACH + 2) and table.min() >= 1
        assert (table.sum(1, dtype=torch.int64) == 2**PRECISION).all()
        zero = density(torch.zeros(5, 1, 1)).flatten()
        assert torch.allclose(table[:, REACH] / 2**PRECISION, zero, atol=1e-6)

    def test_density_is_compressais(self):
        models = pytest.importorskip("compressai.entropy_models")
        theirs, ours = models.EntropyBottleneck(4), FactorizedDensity(4)
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.3 * torch.randn_like(p))
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
        x = torch.linspace(-6, 6, 30).expand(4, 1, -1)
        assert torch.allclose(ours(x), theirs._likelihood(x)[0], atol=1e-6)

    def test_import_of_weights_for_pictures_from_zero_to_one(self, small, tmp_path):
        stage = started("base")
        theirs = {k: v.half() for k, v in stage.base.codec.state_dict().items()}
        theirs |= {f"entropy_bottleneck.{k}": v for k, v in stage.base.bottleneck.state_dict().items()}
        save_file(theirs, tmp_path / "start.safetensors")
        ours = make_stage("base")
        import_start(ours, tmp_path / "start.safetensors")
        x, first, last = torch.rand(1, 3, 32, 32), ours.base.codec.g_a[0], ours.base.codec.g_s[6]
        with torch.no_grad():  # away from the border, where theirs is padded with black and ours with grey
            expected = torch.nn.functional.conv2d(x, theirs["g_a.0.weight"].float(), stride=2, padding=2)
            assert torch.allclose(first(x - 0.5)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)
            assert torch.allclose(last.bias, torch.full((3,), -0.5))

    def test_not_finite_weights_are_refused(self, small, tmp_path):
        stage = started("liff")
        with torch.no_grad():
            stage.liff.mlp_last.bias[0] = 1e6
        with pytest.raises(ValueError, match="not finite in float16"):
            export(stage, tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))

    def test_liff_of_another_size_starts_anew(self, small, tmp_path):
        export(started("liff"), tmp_path)
        stage = make_stage("liff")
        assert load_parts(stage, tmp_path, "paper") == set()
        assert liff_rows.dimensions(stage.liff.state_dict()) == SIZES["paper"]
        assert load_parts(stage, tmp_path) == {"liff"}
        assert liff_rows.dimensions(stage.liff.state_dict()) == SIZES["small"]

    def test_weights_of_another_shape(self, small, tmp_path):
        save_file({"first.weight": torch.zeros(3)}, tmp_path / "liff.safetensors")
        with pytest.raises(ValueError, match=r"liff\.safetensors: not weights of this architecture"):
            load_parts(make_stage("liff"), tmp_path)


class TestCommand:
    def run(self, *arguments: object) -> str:
        result = CliRunner().invoke(train, [str(a) for a in arguments])
        assert result.exit_code and isinstance(result.exception, SystemExit), result
        return result.output

    def test_bad_data_is_one_line(self, folder, tmp_path):
        for data, words in (
            (tmp_path / "none.tar", "no such tar file or folder"),
            (folder / "notes.txt", "neither a folder nor a tar file"),
            (tmp_path, "fewer than"),
        ):
            output = self.run("base", "--data", data, "--resume", tmp_path / "run", "--device", "cpu")
            assert output.startswith("Error: ") and words in output and output.count("\n") == 1

    @pytest.mark.parametrize("text", ["{", None])
    def test_a_set_that_is_not_trained_here_is_one_line(self, small, tmp_path, text):
        """Before the first step, not after the last."""
        (tmp_path / "model.json").write_text(text or (folder_of("lean") / "model.json").read_text())
        with pytest.raises(ValueError, match=r"model\.json: (not JSON|weights of the backbone lean)"):
            load_parts(make_stage("base"), tmp_path)

    def test_an_export_says_which_parts_it_has(self, small, tmp_path):
        """What its model.json says besides is that of the set it went on from."""
        spec = read_set(folder_of("mean_scale")).spec | {"profile": "mine", "purpose": "", "more": 1}
        (tmp_path / "model.json").write_text(json.dumps(spec))
        for folder in tmp_path, tmp_path / "new":
            (file,) = export(make_stage("liff"), folder)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            assert read_set(folder).spec["parts"] == {"liff": digest}
        assert read_set(tmp_path).spec | {"parts": {}} == spec | {"parts": {}}

    def test_bad_weights_are_one_line(self, small, folder, tmp_path):
        (tmp_path / "base.safetensors").write_bytes(b"damaged")
        for given in (tmp_path, tmp_path / "base.safetensors", tmp_path / "none"):
            output = self.run("base", "--data", folder, "--resume", tmp_path / "run", "--weights", given)
            assert output.startswith("Error: ") and str(given) in output and output.count("\n") == 1

    def test_bad_options(self, folder, tmp_path):
        for option in (["--side", "0"], ["--batch", "a"], ["--minutes", "0"], ["--steps", "0"], ["--lr", "-1"]):
            assert "Invalid value" in self.run("base", "--data", folder, "--resume", tmp_path, *option)
        assert "--liff does not" in self.run("lean", "--data", folder, "--resume", tmp_path, "--liff", "paper")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("target", "profile", "stages", "minutes"),
    [
        ("train", "lean", ["lean-context", "lean-layers"], 26),
        ("train-paper", "paper", ["base", "liff", "residual", "joint"], 23),
    ],
)
def test_make_train_runs_its_stages_in_turn(target, profile, stages, minutes, folder, tmp_path, monkeypatch):
    """The recipe as it is, but for how long and on how much: every stage goes on from what those before it left."""
    from compass_codec.training.tables import main as tables

    monkeypatch.chdir(ROOT)
    variables = [f"RUN={tmp_path}", f"DATA={folder}", "BIN=bin"]
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # as if not run by make
    recipe = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [shlex.split(line) for line in recipe.stdout.splitlines() if " train " in line or ".training." in line]
    assert [line[2] for line in lines[:-1]] == stages
    assert sum(int(line[line.index("--minutes") + 1]) for line in lines[:-1]) == minutes
    for line in lines[:-1]:
        if "--compile" in line:
            line.remove("--compile")
        for option, value in ("--minutes", "9"), ("--batch", "1"), ("--side", "64"):
            line[line.index(option) + 1] = value
        result = CliRunner().invoke(train, [*line[2:], "--steps", "1", "--device", "cpu"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "from weights" in result.output and "from base" not in result.output, result.output
    assert lines[-1][:3] == ["bin/python", "-m", "compass_codec.training.tables"]
    options = ["--crops", "4", "--side", "64", "--device", "cpu"]
    result = CliRunner().invoke(tables, [*lines[-1][3:], *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "weights/history.json").read_text())
    assert [entry["stage"] for entry in history[-len(lines) :]] == [*stages, "tables"]
    for part in PARTS:
        before, after = (
            load_file(f / f"{part}.safetensors") for f in (choose(model=profile).folder, tmp_path / "weights")
        )
        assert any(not torch.equal(after[name], value) for name, value in before.items()), part
    assert Codec.load("cpu", tmp_path / "weights").encode(Image.new("RGB", (64, 64)), [1, 2], 50).layers


def test_compile_is_for_steps_of_base_codecs(folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    arguments = ["--data", folder, "--resume", tmp_path, "--steps", 1, "--batch", 1, "--side", 64, "--compile"]
    result = CliRunner().invoke(train, ["base", *map(str, arguments)])
    assert result.exit_code == 0 and len(compiled) == 1, result.output
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(tmp_path / "none"))
        result = CliRunner().invoke(train, ["base", *map(str, arguments)])
    assert result.exit_code == 1 and result.output.endswith(f"there is no {tmp_path / 'none'}\n")
    result = CliRunner().invoke(train, ["residual", *map(str, arguments)])
    assert (
        result.exit_code == 1
        and result.output == "Error: residual: layers of any size cannot be compiled; --compile is for base codecs\n"
    )


def test_pictures_are_read_as_the_encoder_reads_them(tmp_path):
    """Sixteen bits, orientation and what is no picture at all."""
    grey = np.linspace(0, 65535, 300 * 280).reshape(300, 280).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (300, 280)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_bytes(b"no picture")
    deep, text, turned = map(training_data._decode, training_data.read_files(tmp_path))
    assert text is None and turned.shape == (3, 300, 280)
    assert deep.shape == (3, 300, 280) and abs(int(deep.mean()) - 127) < 2


def test_networks_of_the_paper_start_without_an_installed_set(folder, tmp_path, monkeypatch):
    """Wheels have no set of their backbone."""
    known = [found for found in weights.sets() if found.backbone == "lean"]
    monkeypatch.setattr(weights, "sets", lambda: known)
    arguments = ["--data", folder, "--resume", tmp_path, "--steps", 1, "--batch", 1, "--side", 64, "--device", "cpu"]
    result = CliRunner().invoke(train, ["base", *map(str, arguments)])
    assert result.exit_code == 0 and "start: base from the block transform, residual from base" in result.output
    found = read_set(tmp_path / "weights")
    assert (found.backbone, list(found.spec["parts"])) == ("mean_scale", ["base"])


class TestTables:
    def test_counted_tables_make_smaller_files_of_the_same_picture(self, folder, tmp_path, monkeypatch):
        """From ideal tables, counting the symbols of the very pictures that are then coded must save bytes."""
        # else the encoder would choose other symbols with other tables
        monkeypatch.setattr(mean_scale, "thresholds", lambda tables: symbols.thresholds(tables, 0))
        from compass_codec.entropy import gaussian_tables
        from compass_codec.training.tables import main

        for part in PARTS:
            shutil.copy(folder_of("mean_scale") / f"{part}.safetensors", tmp_path)
        ideal, lengths = gaussian_tables()
        for part in ("base", "residual"):
            file = tmp_path / f"{part}.safetensors"
            tensors = load_file(file) | {"tables.y": torch.from_numpy(ideal)}
            save_file(tensors, file)
        describe(tmp_path)
        image = Image.open(folder / "noise1.png").crop((0, 0, 160, 128))  # the portraits are held out
        before = Codec.load("cpu", tmp_path).encode(image, [1, 2], 80)
        args = [str(tmp_path), "--data", str(folder), "--crops", "24", "--side", "96"]
        result = CliRunner().invoke(main, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        entry = json.loads((tmp_path / "history.json").read_text())[-1]
        assert entry["stage"] == "tables" and entry["crops"] == 24 and {"device", "minutes", "date"} <= entry.keys()
        codec = Codec.load("cpu", tmp_path)
        after = codec.encode(image, [1, 2], 80)
        assert len(after.data) < len(before.data)
        assert all((a == b).all() for a, b in zip(after.layers, before.layers, strict=True))
        assert (np.asarray(codec.decode(after.data)) == after.layers[-1]).all()
        for part in ("base", "residual"):
            tensors = load_file(tmp_path / f"{part}.safetensors")
            assert (tensors["tables.z"].sum(1) == 2**PRECISION).all()
            assert all(t.sum() == 2**PRECISION and t.min() > 0 for t in tensors["tables.y"].split(lengths.tolist()))

    def test_bad_folder_is_one_line(self, tmp_path, folder):
        from compass_codec.training.tables import main

        result = CliRunner().invoke(main, [str(tmp_path), "--data", str(folder)])
        assert result.exit_code == 1 and str(tmp_path) in result.output


class TestAverage:
    def sets(self, tmp_path) -> tuple[Path, Path]:
        """Two sets of LIFF and base codec, that of "new" twice as large as that of "old" wherever it is not zero."""
        for name, times in (("old", 1), ("new", 2)):
            (tmp_path / name).mkdir()
            for part in ("liff", "base"):
                tensors = load_file(folder_of("mean_scale") / f"{part}.safetensors")
                tensors = {k: v * times for k, v in tensors.items()} | {"tables": torch.tensor([times])}
                save_file(tensors, tmp_path / name / f"{part}.safetensors")
            describe(tmp_path / name)
        return tmp_path / "old", tmp_path / "new"

    def run(self, *args) -> str:
        from compass_codec.training.average import main

        return CliRunner().invoke(main, [*map(str, args)], catch_exceptions=False).output

    def test_mean_of_the_parts_that_are_named(self, tmp_path):
        old, new = self.sets(tmp_path)
        before, other = load_file(new / "liff.safetensors"), (new / "base.safetensors").read_bytes()
        assert self.run(old, new, "--part", "liff", "--share", "0.25") == ""
        after = load_file(new / "liff.safetensors")
        assert after.keys() == before.keys()
        for name, value in after.items():
            if name == "tables":
                assert value.item() == 2
            else:
                assert value.dtype == torch.float16
                torch.testing.assert_close(value.double(), before[name].double() * 0.875, rtol=1e-3, atol=1e-7)
        assert (new / "base.safetensors").read_bytes() == other
        entry = json.loads((new / "history.json").read_text())[-1]
        assert entry["stage"] == "average" and entry["parts"] == ["liff"] and entry["share_of_old"] == 0.25

    def test_other_architectures_are_refused_and_nothing_changes(self, tmp_path):
        old, new = self.sets(tmp_path)
        shutil.copy(old / "base.safetensors", old / "liff.safetensors")
        before = {path.name: path.read_bytes() for path in new.iterdir()}
        output = self.run(old, new, "--part", "base", "--part", "liff")
        assert (
            output.startswith(f"Error: {old / 'liff.safetensors'}: not weights of the same") and output.count("\n") == 1
        )
        more = load_file(new / "liff.safetensors") | {"more": torch.ones(1)}
        save_file(more, old / "liff.safetensors")
        assert "(more differs)" in self.run(old, new, "--part", "liff")
        (old / "liff.safetensors").write_bytes(b"nothing")
        assert self.run(old, new, "--part", "liff").startswith(f"Error: {old / 'liff.safetensors'}: cannot be read")
        assert self.run(new, old, "--part", "liff").startswith(f"Error: {old / 'liff.safetensors'}: cannot be read")
        assert {path.name: path.read_bytes() for path in new.iterdir()} == before
