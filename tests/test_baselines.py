"""Systems of the papers on the lean backbone: each trains, resumes, and its files decode to what the encoder saw."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import crop, noise_pictures
from PIL import Image

from compass_codec import container, web
from compass_codec.codec import Codec
from compass_codec.errors import WeightsError
from compass_codec.measure import paper
from compass_codec.measure.protocol import OURS, other_set
from compass_codec.measure.tables import TESTED, Published, Results, layered_column
from compass_codec.measure.task import Original, Task
from compass_codec.training import baselines, tables
from compass_codec.training.ablations import SecondStage
from compass_codec.training.baselines import SYSTEMS, main
from compass_codec.training.tensors import read_tensors
from compass_codec.training.trainer import Run
from compass_codec.weights import choose, read_set

LEAN = [
    name for name, system in SYSTEMS.items() if system.layers.backbone in ("lean", "padded")
]  # test_papers.py: others
SMALL = {"c8": 16, "c16": 24, "n8": 1, "n16": 1, "m": 16, "n": 8, "h": 16, "g": 16}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(noise_pictures(7, 256)):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def train(run: Path, photos: Path, *more: str, steps: int = 2) -> Result:
    options = ["--data", photos, "--steps", steps, "--batch", 2, "--side", 64, "--device", "cpu", *more]
    return CliRunner().invoke(main, [str(run), *map(str, options)])


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos) -> Path:
    """Those of lean, after a stop in the middle of the third."""
    folder, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setattr(baselines, "DIMENSIONS", SMALL)
    advance = Run.advance

    def stopped(self, progress):
        if self.plan.stage == "factorized":
            signal.raise_signal(signal.SIGTERM)
        return advance(self, progress)

    patch.setattr(Run, "advance", stopped)
    systems = [f"--only={name}" for name in LEAN]
    result = train(folder, photos, *systems)
    assert result.exit_code == 143 and "stopped at step 1" in result.output, result.output
    assert sorted(f.name for f in (folder / "weights").iterdir()) == ["context", "hyperprior"]
    patch.setattr(Run, "advance", advance)
    result = train(folder, photos, *systems)
    assert result.exit_code == 0, result.output
    assert "factorized: 1 pictures; start: step 1" in result.output and "hyperprior" not in result.output
    patch.undo()
    torch.set_num_threads(threads)
    return folder


def test_a_finished_run_stays(run, photos):
    before = (run / "weights" / "noisy" / "model.json").stat().st_mtime_ns
    assert train(run, photos, *(f"--only={name}" for name in LEAN)).output == ""
    assert (run / "weights" / "noisy" / "model.json").stat().st_mtime_ns == before
    result = train(run, photos, "--only", "noisy", steps=3)
    expected = f"Error: {run / 'base-context' / 'weights'}: trained for 2 steps, not 3; take another folder\n"
    assert (result.exit_code, result.output) == (1, expected)


def test_base_codecs_start_from_a_trained_set(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "DIMENSIONS", SMALL)
    known = run / "weights" / "context"
    result = train(tmp_path / "a", photos, "--only", "factorized", "--weights", known, steps=1)
    assert result.exit_code == 0 and "of base from a file" in result.output, result.output
    theirs, ours = (
        read_tensors(folder / "base.safetensors") for folder in (known, tmp_path / "a" / "base-factorized" / "weights")
    )
    assert (theirs["to_y.weight"] - ours["to_y.weight"]).abs().max() < 2e-3  # a step at the lowest rate
    gains = theirs["log_gain"][-1] - theirs["log_gain"][0]
    assert (ours["log_scale"][-1] - ours["log_scale"][0] - gains).abs().max() < 0.1  # those of its latents
    result = train(tmp_path / "b", photos, "--weights", photos, steps=1)
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "base.safetensors" in result.output


def test_tables_of_a_factorized_prior_are_not_counted(run, photos):
    folder = run / "weights" / "factorized"
    result = CliRunner().invoke(tables.main, [str(folder), "--data", str(photos)])
    assert (result.exit_code, result.output) == (
        1,
        f"Error: {folder}: a factorized prior keeps the tables of its density\n",
    )


@pytest.mark.parametrize(
    ("name", "engine"), [(n, e) for n in LEAN for e in ("torch", "onnx") if n != "padded" or e == "torch"]
)
def test_files_of_every_system_decode(run, name, engine, monkeypatch):
    monkeypatch.setenv("COMPASS_MODELS", str(run / "weights"))
    layers = [np.array(crop(*size)) for size in ((35, 25), (70, 50), (112, 80))]
    encoded = Codec.load("cpu", model=name, engine=engine).encode_layers(layers, [1, 2, 3.2], 60)
    header = container.read_header(encoded.data)
    assert header.model == choose(model=name).identity
    fresh = Codec.load("cpu", model=name, engine=engine)
    for found, seen in zip(fresh.decode_layers(encoded.data, header, 2), encoded.layers, strict=True):
        assert np.array_equal(found, seen)
    assert choose().profile == "lean", "never chosen by default"


def test_padding_is_in_the_file_and_not_in_the_picture(run, monkeypatch):
    """The set's files hold what lean's codecs make of pictures that were padded before."""
    monkeypatch.setenv("COMPASS_MODELS", str(run / "weights"))
    codec, picture = Codec.load("cpu", model="padded"), np.array(crop(70, 50))
    data, reconstruct = codec.encode_layer(picture, None, 60)
    whole = np.pad(picture, ((0, 14), (0, 58), (0, 0)), "edge")
    inner, theirs = codec.base.layer.encode(whole, lambda: codec.predict(None, (64, 128)), 60)
    assert data == inner and np.array_equal(reconstruct(), theirs()[:50, :70])
    z, y = codec.base.parse(data, (50, 70))
    assert z.shape[1:] == (1, 2) and y.shape[1:] == (4, 8)


def test_a_second_layer_is_trained_above_the_first_codec(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "DIMENSIONS", SMALL)
    result = train(tmp_path, photos, "--only", "second", steps=1)
    assert result.exit_code == 1 and str(tmp_path / "weights" / "first" / "model.json") in result.output
    assert result.output.count("Error") == 1
    stage = SecondStage(run / "weights" / "first", **SMALL)
    stage.freeze()
    assert {name.split(".")[0] for name, p in stage.named_parameters() if p.requires_grad} == {"residual", "liff"}
    kept = read_tensors(run / "weights" / "first" / "residual.safetensors")["to_y.weight"]
    assert torch.equal(stage.first.residual.codec.to_y.weight, kept.float())
    x, level = torch.rand(2, 3, 40, 56), torch.full((2,), 3.0)
    stage.eval()
    assert torch.equal(stage.lower(x, level), stage.lower(x, level)), "the same step each time"
    found = stage.lower(x, level)
    with torch.no_grad():
        stage.first.residual.codec.to_y.weight.neg_()
    assert found.shape == x.shape and not torch.equal(stage.lower(x, level), found)


def test_sets_are_what_they_say(run):
    sets = {name: read_set(run / "weights" / name) for name in LEAN}
    tensors = {
        name: {part: read_tensors(each.folder / f"{part}.safetensors") for part in each.spec["parts"]}
        for name, each in sets.items()
    }
    for name in LEAN:
        system = SYSTEMS[name]
        spec = sets[name].spec
        assert (spec["profile"], spec["backbone"], spec["purpose"], list(spec["parts"])) == (
            name,
            system.layers.backbone,
            system.purpose,
            ["base", "residual", "liff"],
        )
        for part in ("base", "residual"):
            assert spec[part].get("entropy", "context") == system.entropy and spec[part]["m"] == SMALL["m"]
        assert spec["residual"].get("transforms") == ("base" if name == "latent" else None)
        history = json.loads((sets[name].folder / "history.json").read_text())
        assert [(entry["stage"], entry["steps"]) for entry in history] == [(f"base-{system.entropy}", 2), (name, 2)]
        assert all(entry["minutes"] >= 0 for entry in history)
        assert tensors[name]["liff"]["out.weight"].any() == (name != "bicubic")
    shared = [name for name in LEAN if SYSTEMS[name].entropy == "context"]
    bases = [tensors[name]["base"] for name in shared]
    assert len(shared) > 2
    weights = [name for name in bases[0] if not name.startswith("exact.")]  # integers are made anew of them
    assert all(torch.equal(base[name], bases[0][name]) for base in bases for name in weights)
    residuals = [tensors[name]["residual"]["h_p.weight"] for name in shared]
    assert not any(torch.equal(a, b) for i, a in enumerate(residuals) for b in residuals[:i])


def test_every_set_has_its_rows_in_a_column(tmp_path):
    """Layered, simulcast and a single layer, and the paper's row beside the one that it is about."""
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    source, qualities, scales = Original.of(tmp_path / "a.png"), (1, 30, 60, 100), (1.0, 2.0)
    models = ["context", "factorized", "mei", "mei-original"]
    records = {
        Task(source, method, layers, q): {
            "layers": [{"bytes": round(100 * s * 1.03**q), "psnr": 28 + q / 10} for s in layers]
        }
        for method in (OURS, *map(other_set, models))
        for layers in (scales, scales[:1], scales[1:])
        for q in qualities
    }
    column = layered_column(Results([source], qualities, records), scales, [], Published(), models, models)
    theirs = [paper.SIMULCAST, paper.SINGLE]
    for model in models:
        theirs += [f"COMPASS with {model}", f"simulcast, base codec of {model}", f"single layer, base codec of {model}"]
    assert list(column.rows) == [TESTED, *theirs] and list(column.against) == theirs and not column.gaps
    assert column.against["COMPASS with context"].bd_rate == pytest.approx(0)
    assert column.against["simulcast, base codec of factorized"].bd_rate < -30
    assert {ours for rows in (paper.TWO, paper.THREE) for ours, *_ in rows if ours} <= {paper.SHVC, *theirs}


def test_transforms_that_a_set_cannot_have_are_one_line(run, tmp_path):
    with pytest.raises(WeightsError, match="browsers decode enhancement layers with the transforms of the base codec"):
        web.weights_of(read_set(run / "weights" / "context"))
    assert web.weights_of(read_set(run / "weights" / "latent"))
    for value, says in (("liff", "residual: transforms of 'liff'"), (None, "cannot be used")):
        folder = shutil.copytree(run / "weights" / "latent", tmp_path / f"{value}")
        spec = json.loads((folder / "model.json").read_text())
        spec["residual"] = {"transforms": value} | SMALL if value is None else spec["residual"] | {"transforms": value}
        (folder / "model.json").write_text(json.dumps(spec))
        for engine in ("torch", "onnx"):
            with pytest.raises(WeightsError, match=says) as found:
                Codec.load("cpu", weights=folder, engine=engine)
            assert "\n" not in str(found.value)
