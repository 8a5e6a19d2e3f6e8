"""The distortion for people: what it weighs, and that training with it makes a set of its own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import compass, crop, noise_pictures
from PIL import Image

import compass_codec
import compass_codec.pillow  # registers the format
from compass_codec import codec, container, distortions, metrics, weights
from compass_codec.backbones.lean import quality_to_lambda


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return torch.from_numpy(np.array(crop(192, 192))).permute(2, 0, 1)[None].float() / 255


def noisy(x: torch.Tensor, amount: float = 0.05) -> torch.Tensor:
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def test_similar_is_ms_ssim(photograph):
    rec = (noisy(photograph) * 255).round() / 255
    a, b = ((255 * x[0]).round().byte().permute(1, 2, 0).numpy() for x in (photograph, rec))
    assert float(distortions.similar(photograph, rec)) == pytest.approx(metrics.ms_ssim(a, b), abs=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (24, 33), (96, 192)])
def test_pictures_of_every_size_have_a_gradient(size):
    x = torch.rand(2, 3, *size)
    assert torch.equal(distortions.visual(x, x), torch.zeros(2)) or distortions.visual(x, x).abs().max() < 1e-7
    rec = (1 - x).requires_grad_()
    found = distortions.visual(x, rec)
    found.sum().backward()
    assert found.shape == (2,) and (found > 0).all() and rec.grad.isfinite().all() and rec.grad.any()


def test_grey_has_no_opponent_colours_and_red_has():
    grey, red = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0.9, 0.2, 0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert distortions.xyb(grey)[:, 0].abs().max() < 1e-6 and distortions.xyb(red)[:, 0].min() > 0.02
    for light in (0, 1):
        luma = distortions.xyb(torch.full((1, 3, 1, 1), float(light)))[0, 1, 0, 0]
        assert luma == pytest.approx((light + distortions.DARK) ** (1 / 3), rel=1e-4)


def test_what_shows_more_counts_more(photograph):
    """Errors of one mean square: in smooth places more than in busy ones, of low frequencies more than of high."""
    flat, busy = torch.full_like(photograph, 0.5), noisy(torch.full_like(photograph, 0.5), 0.2)
    noise = 0.02 * torch.randn(1, 1, 192, 192, generator=torch.Generator().manual_seed(1))
    slow = torch.nn.functional.interpolate(noise[..., ::4, ::4], scale_factor=4.0)
    slow = slow * (noise.square().mean() / slow.square().mean()).sqrt()
    seen = [float(distortions.seen(x, x + error)) for x, error in ((busy, slow), (flat, slow), (flat, noise))]
    assert seen[0] < 0.9 * seen[1] and seen[2] < 0.5 * seen[1]


def test_it_stands_for_the_squared_error(photograph):
    """A picture as a codec gives it, here JPEG's, has about the distortion that it has without."""
    from io import BytesIO

    for quality in (10, 50, 90):
        file = BytesIO()
        crop(192, 192).save(file, "JPEG", quality=quality, subsampling=0)
        rec = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
        mse = float((photograph - rec).square().mean())
        assert 0.4 < float(distortions.visual(photograph, rec)) / mse < 2.5


def test_training_for_people_makes_a_set_that_says_so(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(noise_pictures(7, 256)):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    common = ["--data", tmp_path / "photos", "--steps", 1, "--batch", 1, "--side", 64, "--quiet"]
    done = compass("train", "lean", *common, "--resume", tmp_path / "plain", "--tune", "psnr")
    assert done.code == 0, done.err
    weights = tmp_path / "plain" / "weights"
    assert json.loads((weights / "model.json").read_text())["profile"] == "new"
    for tune in ("psnr", "visual"):
        done = compass("train", "lean", *common, "--resume", tmp_path / tune, "--tune", tune, "--weights", weights)
        assert done.code == 0, done.err
    card, history = (
        json.loads((tmp_path / "visual" / "weights" / name).read_text()) for name in ("model.json", "history.json")
    )
    assert card["profile"] == "visual" and history[-1]["settings"]["tune"] == "visual"
    first, second = (
        json.loads((tmp_path / tune / "lean.jsonl").read_text().split("\n")[0])["loss"] for tune in ("psnr", "visual")
    )
    assert first != second
    again = compass("train", "lean", *common, "--resume", tmp_path / "visual", "--tune", "psnr", "--weights", weights)
    assert "not as in the checkpoint: tune" in again.err


def test_compiled_steps_leave_it_as_it_is(photograph):
    compiled: list[object] = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    rec = noisy(photograph)
    both = torch.compile(lambda: (distortions.visual(photograph, 2 * rec), 2 * rec), backend=backend)()
    assert torch.equal(both[0], distortions.visual(photograph, 2 * rec))
    assert not any("avg_pool2d" in str(graph.graph) for graph in compiled)


def test_other_backbones_have_one_distortion(tmp_path):
    result = compass("train", "base", "--data", tmp_path, "--resume", tmp_path / "run", "--tune", "visual")
    assert result.code == 2 and "--tune goes with lean" in result.err and not (tmp_path / "run").exists()


def test_a_tune_is_a_set_of_weights(tmp_path, monkeypatch):
    """In the command line, in Python and in Pillow."""
    shutil.copytree(weights.choose(model="lean").folder, tmp_path / "visual")
    spec = weights.read_set(tmp_path / "visual").spec
    weights.write_card(tmp_path / "visual", spec | {"profile": "visual", "tune": "visual"})
    places = [tmp_path, *weights.places()]  # before an installed one
    monkeypatch.setattr(weights, "places", lambda: places)
    identity, plain = (weights.identity(model=profile) for profile in ("visual", "lean"))
    image = crop(40, 24)
    image.save(tmp_path / "x.png")
    made = [compass_codec.encode(image, [1, 2], tune="visual")]
    for name, arguments in (("a", ["--tune", "visual"]), ("b", ["--tune", "psnr"]), ("c", [])):
        done = compass("encode", tmp_path / "x.png", "-s", "1,2", "-o", tmp_path / f"{name}.cmps", *arguments)
        assert done.code == 0, done.err
        made.append((tmp_path / f"{name}.cmps").read_bytes())
    image.save(tmp_path / "d.cmps", scales=[1, 2], tune="visual")
    made.append((tmp_path / "d.cmps").read_bytes())
    assert [container.read_header(data).model for data in made] == [identity, identity, plain, plain, identity]
    for arguments in (["--model", "lean"], ["--weights", str(tmp_path / "visual")]):
        done = compass("encode", tmp_path / "x.png", "-s", "1,2", "--tune", "visual", *arguments)
        assert done.code == 2 and "--tune excludes --model and --weights" in done.err
    with pytest.raises(compass_codec.CompassError, match=r"^tune 'film'; there are psnr and visual$"):
        compass_codec.encode(image, [1, 2], tune="film")
    with pytest.raises(compass_codec.CompassError, match=r"^a tune and a model exclude each other$"):
        compass_codec.encode(image, [1, 2], tune="psnr", model="lean")


def test_a_search_lowers_the_distortion_of_the_tune(tmp_path):
    """And not the squared error, for which the same networks find other symbols."""
    plain = weights.choose(model="lean").folder
    shutil.copytree(plain, tmp_path / "visual")
    weights.write_card(tmp_path / "visual", weights.read_set(plain).spec | {"profile": "visual", "tune": "visual"})
    picture = np.asarray(crop(192, 160))
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255

    def price(encoded) -> float:
        rec = torch.from_numpy(encoded.layers[0]).permute(2, 0, 1)[None].float() / 255
        bits, error = 8 * len(encoded.data), float(distortions.visual(x, rec))
        return bits + quality_to_lambda(60) * 255**2 * error * picture.shape[0] * picture.shape[1]

    own, other = (codec.shared("cpu", folder=folder) for folder in (tmp_path / "visual", plain))
    found, squared = (each.encode(picture, [1], 60, effort=2) for each in (own, other))
    assert price(found) < min(price(squared), 0.98 * price(own.encode(picture, [1], 60)))
