"""The lean backbone: geometry, the walk over its context model, its start, and training."""

import json

import pytest
import torch
from conftest import compass
from PIL import Image

from compass_codec.errors import CompassError
from compass_codec.lean import LAMBDAS, PHASES, STEPS, LeanCodec
from compass_codec.networks import level_of
from compass_codec.training.export import read_tensors
from compass_codec.training.lean import RatedLean, linear_start
from compass_codec.training.start import noise_pictures
from compass_codec.weights import choose, load

SMALL = {"c8": 24, "c16": 32, "n8": 1, "n16": 1, "m": 16, "n": 8, "h": 16, "g": 16}


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return LeanCodec(**SMALL).eval()


def disturbed(codec: LeanCodec) -> LeanCodec:
    """A codec whose parts that start at zero do something."""
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
    for step in range(STEPS):
        squares = torch.zeros(1, 16, 5, 7)
        for _, part in codec.parts(step):
            seen[part] += 1
            squares[part] += 1
        # a quarter of the channels at every place
        assert (squares.sum(1) == 4).all()
    assert (seen == 1).all()
    assert len(PHASES) == STEPS


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
        for _, part in codec.parts(changed):
            other[part] += 1
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
    assert spec["backbone"] == "lean" and spec["parts"] == ["base"] and spec["base"]["m"] == 256
    tensors = read_tensors(folder / "base.safetensors")
    assert tensors["context.out.0.weight"].any(), "the context model has learned"
    assert {"tables.z", "bottleneck.quantiles"} <= set(tensors)
    stages = [entry["stage"] for entry in json.loads((folder / "history.json").read_text())]
    assert stages == ["lean", "lean-context"]
    with pytest.raises(CompassError, match=r"backbone lean; this version has mean_scale"):
        load(choose(folder), torch.device("cpu"))
