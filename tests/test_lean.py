"""The lean backbone: geometry, the walk over its context model, its start, and training."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import compass, noise_pictures
from PIL import Image
from safetensors.torch import save

from compass_codec.engines.torch_engine import TorchEngine
from compass_codec.errors import CompassError
from compass_codec.networks import lean_liff, lean_rows
from compass_codec.networks.lean import EPSILON, LAMBDAS, STEPS, EntropyModel, LeanCodec, RMSNorm
from compass_codec.networks.lean_liff import LeanLIFF
from compass_codec.networks.liff import bicubic, nearest
from compass_codec.networks.rates import level_of
from compass_codec.training import average
from compass_codec.training.export import export
from compass_codec.training.lean import (
    PARTS,
    LeanContextStage,
    LeanLayersStage,
    LeanResidualStage,
    LeanStage,
    RatedLean,
    linear_start,
    start,
)
from compass_codec.training.tensors import read_tensors
from compass_codec.training.trainer import Plan, Run, make_stage
from compass_codec.weights import choose, load

SMALL = {"c8": 24, "c16": 32, "n8": 1, "n16": 1, "m": 16, "n": 8, "h": 16, "g": 16}
ENTROPY = {key: SMALL[key] for key in ("m", "n", "h", "g")}


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return LeanCodec(**SMALL).eval()


def disturbed(codec):
    """A network whose parts that start at zero do something."""
    with torch.no_grad():
        for parameter in codec.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return codec


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (17, 40), (65, 130)])
@torch.no_grad()
def test_every_size_is_coded(codec, size):
    level = torch.tensor([2.5])
    y = codec.analysis(torch.rand(1, 3, *size) - 0.5, level)
    assert y.shape == (1, 16, -(-size[0] // 16), -(-size[1] // 16))
    z = codec.hyper_analysis(y)
    assert z.shape == (1, 8, -(-size[0] // 64), -(-size[1] // 64))
    features = codec.hyper_synthesis(z, y.shape[-2:])
    assert features.shape == (1, 16, *y.shape[-2:])
    assert codec.synthesis(y, level, size).shape == (1, 3, *size)


def test_steps_code_every_latent_once(codec):
    seen = torch.zeros(1, 16, 5, 7)
    assert len(codec.order) == STEPS
    for step in codec.order:
        squares = torch.zeros(1, 16, 5, 7)
        for part in step.parts:
            seen[part.of()] += 1
            squares[part.of()] += 1
        # a quarter of the channels at every place
        assert (squares.sum(1) == 4).all()
    assert (seen == 1).all()


@torch.no_grad()
def test_a_step_depends_on_the_steps_before_it_alone(codec):
    disturbed(codec)
    y, features = torch.randn(1, 16, 6, 6), torch.rand(1, 16, 6, 6)

    def walk(latent: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        found: dict[tuple[int, int], torch.Tensor] = {}

        def code(step, log_scales, means, part):
            found[step, part[1].start] = torch.cat([log_scales, means])
            return latent[part]

        assert torch.equal(codec.walk(features, code), latent)
        return found

    told = walk(y)
    for changed in range(STEPS):
        other = y.clone()
        for part in codec.order[changed].parts:
            other[part.of()] += 1
        for (step, group), parameters in walk(other).items():
            assert torch.equal(parameters, told[step, group]) == (step <= changed), (changed, step)


@torch.no_grad()
def test_the_start_is_a_block_transform_and_its_rate_follows_lambda():
    torch.manual_seed(0)
    rated = RatedLean().eval()
    x = noise_pictures(4, 64)
    linear_start(rated.codec, x)
    psnr, bits = [], []
    for lam in LAMBDAS[::3]:
        level = level_of(torch.full((4,), lam), LAMBDAS).float()
        rec, rate = rated(x - 0.5, level, with_context=True)
        psnr.append(-10 * float((rec + 0.5 - x).square().mean().log10()))
        bits.append(float(rate.sum()))
        without = rated(x - 0.5, level, with_context=False)
        assert torch.allclose(without[1], rate), "the context model says nothing yet"
    assert psnr == sorted(psnr) and bits == sorted(bits) and psnr[-1] > psnr[0] + 3


def test_the_norm_has_the_gradient_that_autograd_finds():
    x, grad = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randn(2, 5, 3, 4)
    plain = x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt()
    found = RMSNorm.apply(x)
    assert torch.allclose(found, plain, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(y, x, grad)[0] for y in (found, plain)), atol=1e-5)


def test_a_block_more_changes_nothing(codec):
    deeper = LeanCodec(**SMALL | {"n8": 2})
    missing = deeper.load_state_dict(codec.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith(("a8.1.", "s8.1.")) for name in missing)
    x, level = torch.rand(1, 3, 32, 48), torch.tensor([1.0])
    with torch.no_grad():
        assert torch.equal(deeper.analysis(x, level), codec.analysis(x, level))


def test_training_goes_on_and_its_set_says_what_it_is(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(noise_pictures(7, 256)):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    common = ("--data", tmp_path / "photos", "--steps", 2, "--batch", 2, "--side", 64, "--quiet")
    common += ("--resume", tmp_path / "run")
    for more in (("lean",), ("lean-context", "--weights", tmp_path / "run" / "weights")):
        result = compass("train", *more, *common)
        assert result.code == 0, result.err
    folder = tmp_path / "run" / "weights"
    spec = json.loads((folder / "model.json").read_text())
    assert spec["backbone"] == "lean" and [*spec["parts"]] == ["base"] and spec["base"]["m"] == 256
    tensors = read_tensors(folder / "base.safetensors")
    assert tensors["context.out.0.weight"].any(), "the context model has learned"
    assert {"tables.z", "bottleneck.quantiles"} <= set(tensors)
    stages = [entry["stage"] for entry in json.loads((folder / "history.json").read_text())]
    assert stages == ["lean", "lean-context"]
    with pytest.raises(CompassError, match=r"no part residual"):
        load(choose(folder), TorchEngine(torch.device("cpu")))
    shutil.copytree(folder, tmp_path / "old")
    moved = tensors | {"h_p.bias": tensors["h_p.bias"] + 2}
    (tmp_path / "old" / "base.safetensors").write_bytes(save(moved))
    arguments = [str(tmp_path / "old"), str(folder), "--part", "base"]
    assert CliRunner().invoke(average.main, arguments).exit_code == 1, "no pictures to measure activations on"
    result = CliRunner().invoke(average.main, [*arguments, "--data", str(tmp_path / "photos")])
    assert result.exit_code == 0, result.output
    mean = read_tensors(folder / "base.safetensors")
    torch.testing.assert_close(mean["h_p.bias"], tensors["h_p.bias"] + 1, rtol=0, atol=3e-3)
    assert not torch.equal(mean["exact.first.bias"], tensors["exact.first.bias"]), "the integers are those of the mean"
    assert json.loads((folder / "history.json").read_text())[-1]["stage"] == "average"


FACTORS = (1, 1.2, 1.5, 2, 2.8, 4)


def liff() -> LeanLIFF:
    torch.manual_seed(0)
    return disturbed(LeanLIFF(channels=8, blocks=2, taps=9, hidden=8)).eval()


def taller(low: torch.Tensor, factor: float) -> tuple[int, int]:
    return round(low.shape[-2] * factor), round(low.shape[-1] * factor)


@pytest.mark.parametrize("factor", FACTORS)
@torch.no_grad()
def test_lean_liff_is_the_sum_over_taps_that_it_says(factor):
    network, low = liff(), torch.rand(2, 3, 9, 14)
    size = taller(low, factor)
    assert torch.equal(LeanLIFF()(low, size), bicubic(low, size)), "before it has learned"
    (row, dy), (column, dx) = (nearest(a, b, (0, b)) for a, b in zip(low.shape[-2:], size, strict=True))
    features = network.features(low - 0.5)[:, row][:, :, column].unflatten(3, (3, 9))
    a, b = network.phi((9, 14), size, dy, dx)
    added = torch.einsum("nyxck,yk,xk->ncyx", features, a, b)
    assert added.abs().mean() > 0.01
    assert torch.allclose(network(low, size), bicubic(low, size) + added, atol=1e-5)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("low", [(1, 1), (3, 50), (6, 10), (22, 17)])
@torch.no_grad()
def test_rows_of_lean_liff_are_those_of_all_at_once(factor, low, monkeypatch):
    for table, value in ((lean_rows.PLACES, 50), (lean_liff.MIXED_PLACES, 30), (lean_rows.CUBIC_ROWS_WIDENED, 5)):
        monkeypatch.setitem(table, "cpu", value)
    monkeypatch.setattr(lean_rows, "CUBIC_COLUMNS", 16)
    monkeypatch.setattr(lean_rows, "CUBIC_ROWS", 2)
    network, pixels = liff(), torch.randint(256, (1, 3, *low), dtype=torch.uint8)
    height, width = taller(pixels, factor)
    whole = network(pixels.float() / 255, (height, width))
    for cut in (1, 7, height):
        cuts = [(i, min(i + cut, height)) for i in range(0, height, cut)]
        found = torch.cat([network.rows(pixels, (height, width), each) for each in cuts], 2)
        assert torch.allclose(found, whole, atol=1e-5)


def test_cosines_tell_the_places_in_a_pixel_apart():
    """With as many places as cosines or fewer, the functions can give every place what they want."""
    network = LeanLIFF()
    for factor in (1, 2, 3):
        _, offset = nearest(1, factor, (0, factor))
        a, b = network.phi((1, 1), (factor, factor), offset, offset)
        together = (a[:, None] * b[None]).flatten(0, 1)
        assert torch.linalg.matrix_rank(together) == factor**2


def test_lean_liff_leaves_a_flat_layer_flat_and_adds_in_proportion_to_contrast():
    network, low, size = liff(), torch.rand(1, 3, 9, 14), (17, 31)
    flat = torch.tensor([0.9, 0.2, 0.4]).view(1, 3, 1, 1)
    assert torch.allclose(network(flat.expand(1, 3, 9, 14), size), flat.expand(1, 3, *size), atol=1e-6)
    added, half = (network(x, size) - bicubic(x, size) for x in (low, 0.3 + 0.5 * low))
    assert added.abs().max() > 0.01
    assert torch.allclose(half, 0.5 * added, atol=1e-5)


def layers_above(base, stage):
    """``stage`` as it starts above the set or the run ``base``."""
    stage.base = RatedLean(**SMALL)
    return stage, start(stage, base, SimpleNamespace(sample=lambda *_: noise_pictures(2, 64)), 1)


@pytest.mark.parametrize(("entropy", "taken"), [("context", True), ("pyramid", False), ("hyperprior", False)])
def test_a_context_model_is_taken_from_a_file_as_a_whole_or_not_at_all(entropy, taken, tmp_path):
    """Networks of another context model may have the same names and sizes, and would begin with noise."""
    torch.manual_seed(0)
    known = RatedLean(**SMALL).codec
    for parameter in known.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "base.safetensors").write_bytes(save(known.state_dict()))
    stage = LeanStage(**SMALL, entropy=entropy)
    words = start(stage, tmp_path / "base.safetensors", SimpleNamespace(sample=lambda *_: noise_pictures(4, 64)), 1)
    codec = stage.base.codec
    assert torch.equal(codec.h_p.weight, known.h_p.weight) and torch.equal(codec.log_gain, known.log_gain)
    shared = [name for name in known.state_dict() if taken or not name.startswith("context.")]
    assert words.startswith(f"{len(shared)} of ")
    if codec.context is not None:
        assert torch.equal(codec.context.out[0].weight, known.context.out[0].weight) == taken
        assert bool(codec.context.out[0].weight.any()) == taken


def same_weights(a, b) -> bool:
    """Whether two files hold the same weights; integers are made anew of them."""
    first, second = read_tensors(a), read_tensors(b)
    names = {name for name in first if not name.startswith("exact.")}
    return names <= second.keys() == first.keys() and all(torch.equal(first[name], second[name]) for name in names)


@pytest.fixture
def small_base(tmp_path):
    """A set that has a base codec alone."""
    torch.manual_seed(0)
    stage = LeanStage()
    stage.base = RatedLean(**SMALL)
    stage.crops = noise_pictures(2, 64)
    linear_start(stage.base.codec, stage.crops)
    export(stage, tmp_path / "base")
    assert [*json.loads((tmp_path / "base" / "model.json").read_text())["parts"]] == ["base"]
    return tmp_path / "base"


def run_of(stage, name, folder) -> Run:
    folder.mkdir(exist_ok=True)
    x = noise_pictures(2, 32)
    return Run(Plan(name, batch=(2,), side=(32,)), stage, SimpleNamespace(sample=lambda *_: x), folder, x.device)


def test_layers_train_above_a_base_that_stays_and_are_exported_with_it(small_base, tmp_path):
    stage, words = layers_above(small_base, make_stage("lean-layers"))
    assert words == "base from weights, residual from base, liff from bicubic"
    for name, value in stage.base.state_dict().items():
        transform = (
            name.startswith("codec.") and name.removeprefix("codec.") not in EntropyModel(**ENTROPY).state_dict()
        )
        assert transform or torch.equal(stage.residual.state_dict()[name], value)
    run = run_of(stage, "lean-layers", tmp_path / "run")
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    run.advance(0.1)
    changed = {name for name, value in stage.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"residual", "liff"}
    assert {"residual.codec.h_p.weight", "residual.codec.context.out.0.weight", "liff.out.weight"} <= changed

    out = tmp_path / "out"
    export(stage, out)
    spec = json.loads((out / "model.json").read_text())
    assert (spec["backbone"], [*spec["parts"]]) == ("lean", list(PARTS))
    assert spec["base"] == SMALL and spec["residual"] == {"transforms": "base"} | ENTROPY
    assert not any("to_y" in name for name in read_tensors(out / "residual.safetensors"))
    assert same_weights(out / "base.safetensors", small_base / "base.safetensors")
    again, words = layers_above(out, make_stage("lean-layers"))
    assert words == "base from weights, residual from weights, liff from weights"
    for file in export(again, tmp_path / "again"):
        assert same_weights(file, out / file.name)

    plain, _ = layers_above(small_base, LeanResidualStage())
    run_of(plain, "lean-residual", tmp_path / "run").advance(0.1)
    export(plain, tmp_path / "plain")
    own = read_tensors(tmp_path / "plain" / "residual.safetensors")
    assert not torch.equal(own["to_y.bias"], read_tensors(tmp_path / "plain" / "base.safetensors")["to_y.bias"])
    again, words = layers_above(tmp_path / "plain", LeanResidualStage())
    assert words == "base from weights, residual from weights, liff from weights"


def test_layers_start_above_the_base_of_a_run(small_base, tmp_path):
    stage, _ = layers_above(small_base, LeanStage())
    run = run_of(stage, "lean", tmp_path / "run")
    run.advance(0.5)
    run.save()
    above, _ = layers_above(run.checkpoint, LeanLayersStage())
    for name, value in run.ema.items():
        assert torch.equal(above.get_parameter(name), value), name
    with pytest.raises(ValueError, match="name its weights"):
        layers_above(None, LeanLayersStage())


def test_steps_between_layers():
    generator = torch.Generator().manual_seed(0)
    drawn = [LeanLayersStage.draw_factors(generator) for _ in range(600)]
    assert all(1 <= factor <= most for factors in drawn for factor, most in zip(factors, (4, 2), strict=False))
    assert 0.4 < sum(len(factors) == 1 for factors in drawn) / 600 < 0.6
    assert 0.1 < sum(factors[0] == 1 for factors in drawn) / 600 < 0.25
    assert 0.4 < sum(1.1 <= factors[0] <= 1.5 for factors in drawn) / 600 < 0.6


def test_a_latent_of_one_place_has_gradients():
    """Three of the four phases of a layer of 16 pixels or fewer are empty."""
    torch.manual_seed(0)
    stage = LeanContextStage()
    x, lam = torch.rand(1, 3, 16, 12), torch.tensor([0.013])
    loss, _ = stage(x, lam, torch.tensor([3.0]), ())
    loss.backward()
    assert loss.isfinite()


def test_some_crops_are_drawn_and_some_get_grain():
    torch.manual_seed(0)
    x, lam = torch.full((400, 3, 16, 24), 0.5), torch.tensor([0.01, 0.1] * 200)
    varied = LeanStage().varied(x, lam)
    assert varied.shape == x.shape and varied.min() >= 0 and varied.max() <= 1
    changed = (varied != x).flatten(1).any(1)
    flat = torch.tensor([len(crop.flatten(1).unique(dim=1).T) <= 6 for crop in varied])
    drawn = changed & flat
    assert 0.03 < drawn.float().mean() < 0.1 and changed[1::2].all() and (changed == drawn)[::2].all()
    colours = varied[drawn].permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)
    corners = ((colours == 0) | (colours == 1)).all(1)
    assert 2 < corners.sum() < len(colours)  # white, red, ... and others
    assert torch.equal(x, torch.full_like(x, 0.5)), "what was given stays"
