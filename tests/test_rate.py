"""Search for a target: few encodes, never on the wrong side, as near as steps of 0.01 allow."""

import dataclasses
import json
import math
import os
import random
import sys

import numpy as np
import pytest
from conftest import compass, crop
from PIL import Image

from compass_codec import container, metrics
from compass_codec.codec import Codec
from compass_codec.jobs.targets import Target, search

PIXELS = 100_000


class Curve:
    """A codec's bytes and PSNR over the quality, with bends, an overhead and bytes in steps."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.start, self.slope, self.bend = rng.uniform(6, 14), rng.uniform(0.008, 0.03), rng.uniform(0, 4e-5)
        self.overhead, self.step = rng.choice([30, 80, 2000]), rng.choice([1, 4])
        self.psnr, self.gain = rng.uniform(20, 35), rng.uniform(0.03, 0.12)
        self.share = rng.random()

    def __call__(self, quality: float) -> tuple[int, float]:
        assert 1 <= quality <= 100 and quality == round(quality, 2)
        size = self.overhead + math.exp(self.start + self.slope * quality - self.bend * quality**2)
        return int(size // self.step * self.step), self.psnr + self.gain * quality - 1e-4 * quality**2


def between(curve: Curve, kind: str) -> Target:
    """A target that the curve reaches."""
    (least, worst), (most, best) = curve(1), curve(100)
    if kind == "psnr":
        return Target("psnr", worst + curve.share * (best - worst))
    return Target(kind, (least + curve.share * (most - least)) * (8 / PIXELS if kind == "bpp" else 1))


def test_a_metric_that_falls_with_quality():
    """The distance is never above the target, and at most 3.5 % below it."""
    for seed in range(100):
        rng = random.Random(seed)
        most, halving = rng.uniform(2, 8), rng.uniform(20, 60)

        def curve(quality: float, most: float = most, halving: float = halving) -> tuple[int, float]:
            return 1000, most * 2 ** (-quality / halving)

        target = rng.uniform(curve(100)[1], curve(1)[1])
        found = search(Target("butteraugli", target), PIXELS, curve, lambda made: made)
        assert found.reached and target * 2**-0.05 <= found.value <= target and found.encodes <= 6


@pytest.mark.parametrize("kind", ["size", "bpp", "psnr"])
def test_few_encodes_and_never_on_the_wrong_side(kind):
    counts = []
    for seed in range(300):
        curve = Curve(seed)
        target = between(curve, kind)
        found = search(target, PIXELS, curve, lambda made: made)
        assert found.reached and (found.bytes, found.value) == curve(found.quality)
        if kind == "psnr":
            assert target.value <= found.value <= target.value + 0.1
        else:
            most = target.most_bytes(PIXELS)
            assert found.bytes <= most
            next_step = curve(round(min(100, found.quality + 0.01), 2))[0]
            assert found.bytes >= 0.98 * most or next_step > most
        counts.append(found.encodes)
    assert sum(counts) / len(counts) < 4 and max(counts) <= 8


def test_a_curve_in_large_steps_gives_the_step_below():
    found = search(Target("size", 1500), PIXELS, lambda q: (1000 if q < 61.37 else 2000, q), lambda made: made)
    assert (found.quality, found.bytes, found.reached, found.near) == (61.36, 1000, True, False)
    assert search(Target("size", 1010), PIXELS, lambda q: (1000 if q < 61.37 else 2000, q), lambda made: made).near


@pytest.mark.parametrize(
    ("kind", "value", "quality"), [("size", 10, 1), ("size", 10**9, 100), ("psnr", 1, 1), ("psnr", 99, 100)]
)
def test_out_of_reach_gives_the_end_of_the_scale(kind, value, quality):
    found = search(Target(kind, value), PIXELS, Curve(1), lambda made: made)
    assert (found.quality, found.reached) == (quality, False) and found.encodes <= 3


def test_equal_pictures_have_infinite_psnr():
    found = search(Target("psnr", 40), PIXELS, lambda q: (100, 20 + q / 4 if q < 40 else math.inf), lambda made: made)
    assert (found.quality, found.value) == (40, math.inf)


@pytest.mark.parametrize(
    ("option", "value"), [("--target-bpp", "1.5"), ("--target-size", "1.2kB"), ("--target-psnr", "31")]
)
def test_the_codec_meets_its_target(tmp_path, option, value):
    crop(96, 64).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "--scales", "1,2", option, value, "--device", "cpu")
    assert result.code == 0, result.err
    *_, top, summary = result.out.splitlines()
    size = (tmp_path / "in.cmps").stat().st_size
    if option == "--target-psnr":
        assert 31 <= float(top.split()[-1]) <= 31.105
    else:
        most = 1200 if option == "--target-size" else 1.5 * 96 * 64 / 8
        assert 0.98 * most <= size <= most
    assert int(summary.split(", ")[-1].removesuffix(" encodes")) <= 7
    assert len({e.quality for e in container.read_header((tmp_path / "in.cmps").read_bytes()).layers}) == 1


def test_a_note_says_that_a_target_is_out_of_reach(tmp_path):
    crop(20, 16).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "--scales", "1", "--target-size", "5B")
    assert result.code == 0 and result.err.startswith("note: ")
    assert "5 bytes is beyond the quality scale; quality 1 gives" in result.err and len(result.err.splitlines()) == 1


def test_a_target_of_psnr_is_met_by_what_shows(tmp_path, codec):
    """The middle alone shows; around it is what costs little or much."""
    picture, alpha = crop(64, 48), Image.new("L", (64, 48))
    alpha.paste(255, (24, 16, 44, 32))
    picture.putalpha(alpha)
    picture.save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "-s", "1,2", "--target-psnr", "33", "--json", "--device", "cpu")
    assert result.code == 0, result.err
    shown, decoded = (
        np.asarray(i)[16:32, 24:44, :3] for i in (picture, codec.decode((tmp_path / "in.cmps").read_bytes()))
    )
    found = metrics.psnr(shown, decoded)
    report = json.loads(result.out)
    assert report["layers"][-1]["psnr"] == pytest.approx(found, abs=1e-3)
    assert 33 <= found <= 33.1 or "lies between two steps" in report["notes"][-1]


def test_a_target_of_a_program_is_met(tmp_path, monkeypatch):
    """A stub tells a quarter of the mean difference."""
    script = f"""#!{sys.executable}
import sys
a, b = (open(f, "rb").read()[-96 * 64 * 3:] for f in sys.argv[1:])
print(9); print("3-norm:", sum(abs(x - y) for x, y in zip(a, b)) / len(a) / 4)
"""
    (tmp_path / "butteraugli_main").write_text(script)
    (tmp_path / "butteraugli_main").chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    crop(96, 64).save(tmp_path / "in.png")
    args = ["encode", tmp_path / "in.png", "-s", "1,2", "--target-butteraugli", "0.9", "--device", "cpu"]
    result = compass(*args)
    assert result.code == 0 and not result.err, result.err
    decoded = Codec.load("cpu").decode((tmp_path / "in.cmps").read_bytes())
    distance = np.abs(np.asarray(crop(96, 64)).astype(int) - np.asarray(decoded)).mean() / 4
    assert 0.9 * 2**-0.05 <= distance <= 0.9
    result = compass(*args[:-4], "--target-butteraugli", "0.0001", "--force")
    assert "Butteraugli 3-norm 0.0001 is beyond the quality scale; quality 100 gives" in result.err
    assert result.err.rstrip().split(", ")[-1].startswith("Butteraugli 3-norm 0.")


@pytest.mark.parametrize(
    ("option", "words"), [("--target-butteraugli", "no butteraugli_main"), ("--target-ssimulacra2", "no ssimulacra2")]
)
def test_a_program_that_is_not_here_is_named_before_the_work(tmp_path, monkeypatch, option, words):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    crop(20, 16).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "-s", "1", option, "2")
    assert result.code == 1 and f"in.png: there is {words} on the PATH" in result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "in.cmps").exists()


def test_ms_ssim_of_a_small_picture_is_refused(tmp_path):
    crop(20, 16).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "-s", "1", "--target-ms-ssim", "0.9")
    assert result.code == 1 and "20 x 16 pixels are too few for MS-SSIM" in result.err


def test_what_does_not_show_does_not_count():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 170, 170, 3), np.uint8)
    alpha = np.zeros((170, 170), np.uint8)
    assert metrics.METRICS["ms-ssim"].of(a, b, alpha) == pytest.approx(1)
    assert metrics.METRICS["ms-ssim"].of(a, b, alpha + 255) == metrics.METRICS["ms-ssim"].of(a, b) < 0.5


def test_a_note_says_that_a_target_lies_between_two_steps(tmp_path, monkeypatch):
    found = dataclasses.replace(search(Target("psnr", 1), 1, lambda q: q, lambda q: (1, 2.0)), reached=True, near=False)
    crop(20, 16).save(tmp_path / "in.png")

    def stub(target, pixels, encode, measure):
        return dataclasses.replace(found, result=encode(found.quality))

    monkeypatch.setattr("compass_codec.jobs.single.search", stub)
    result = compass("encode", tmp_path / "in.png", "-s", "1", "--target-psnr", "1")
    assert result.code == 0 and "1 dB lies between two steps of quality; quality" in result.err


@pytest.mark.parametrize(
    "args",
    [
        ["--target-bpp", "0"],
        ["--target-bpp", "nan"],
        ["--target-psnr", "1,2"],
        ["--target-ms-ssim", "1"],
        ["--target-psnr", "30", "--target-butteraugli", "1"],
        ["--target-size", "20 parsecs"],
        ["--target-size", "0.5"],
        ["--target-size", "9kB", "-q", "50"],
        ["--target-size", "9kB", "--target-bpp", "1"],
        ["-q", "50,60,70"],
        ["-q", "50,"],
    ],
)
def test_wrong_usage(tmp_path, args):
    crop(20, 16).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "--scales", "1,2", *args)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and not (tmp_path / "in.cmps").exists()


def test_a_quality_for_each_layer(tmp_path):
    crop(40, 32).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "--scales", "1,2,4", "-q", "30,60.5,80")
    assert "qualities 30,60.5,80" in result.out
    header = container.read_header((tmp_path / "in.cmps").read_bytes())
    assert [e.quality for e in header.layers] == [30, 60.5, 80]
