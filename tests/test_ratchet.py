"""The ratchet: BD-rate on curves whose answer is known, the protocol's sizes, and its verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from compass_codec.codec import Codec
from compass_codec.measure import ratchet
from compass_codec.measure.bd_rate import bd_rate
from compass_codec.measure.protocol import PUBLISHED
from compass_codec.measure.ratchet import Curve, Measurement, layers_of, main, pictures_in
from compass_codec.weights import choose

RATE = [0.12, 0.3, 0.66, 1.23]
PSNR = [27.7, 31.1, 34.9, 38.8]


class TestBDRate:
    def test_equal_curves(self):
        result = bd_rate(RATE, PSNR, RATE, PSNR)
        assert result.percent == pytest.approx(0, abs=1e-9)
        assert (result.low, result.high) == (27.7, 38.8)

    @pytest.mark.parametrize("factor", [0.9, 1.25])
    def test_a_constant_factor(self, factor):
        result = bd_rate(RATE, PSNR, [r * factor for r in RATE], PSNR)
        assert result.percent == pytest.approx(100 * (factor - 1))

    def test_order_and_unit_do_not_matter(self):
        tested = [0.1, 0.35, 0.5, 1.2]
        expected = bd_rate(RATE, PSNR, tested, PSNR).percent
        turned = bd_rate([8 * r for r in RATE], PSNR, [8 * r for r in tested[::-1]], PSNR[::-1])
        assert turned.percent == pytest.approx(expected)

    def test_only_the_common_range_counts(self):
        # log rate is a straight line, so PCHIP follows it exactly and every range gives the same answer
        psnr = np.array([30.0, 32, 34, 36])
        result = bd_rate(np.exp(0.1 * psnr), psnr, 0.8 * np.exp(0.1 * (psnr + 3)), psnr + 3)
        assert result.percent == pytest.approx(-20) and (result.low, result.high) == (33, 36)

    def test_trading_places_inverts(self):
        a = bd_rate(RATE, PSNR, [0.1, 0.2, 0.6, 1.3], PSNR).percent
        b = bd_rate([0.1, 0.2, 0.6, 1.3], PSNR, RATE, PSNR).percent
        assert (1 + a / 100) * (1 + b / 100) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("rate", "psnr", "words"),
        [
            (RATE[:3], PSNR[:3], "at least 4"),
            (RATE, [p + 20 for p in PSNR], "no PSNR in common"),
            (RATE, [30, 30, 31, 32], "differ"),
            ([0, 1, 2, 3], PSNR, "positive"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:divide by zero")
    def test_unusable_curves(self, rate, psnr, words):
        with pytest.raises(ValueError, match=words):
            bd_rate(RATE, PSNR, rate, psnr)


class TestProtocol:
    def test_sizes(self):
        picture = Image.new("RGB", (770, 511))
        assert [p.shape for p in layers_of(picture, (1.0, 2.0, 3.2))] == [(127, 192, 3), (255, 385, 3), (408, 616, 3)]
        single = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
        assert np.array_equal(layers_of(single, ratchet.SINGLE)[0], np.asarray(single))

    def test_quick_spreads_over_the_folder(self, tmp_path):
        for i in range(8):
            (tmp_path / f"{i}.png").touch()
        assert [p.name for p in pictures_in(tmp_path, 2)] == ["0.png", "4.png"]
        assert len(pictures_in(tmp_path, 0)) == 8
        with pytest.raises(ValueError, match="no PNG"):
            pictures_in(tmp_path / "none", 0)


class TestVerdict:
    @pytest.fixture
    def kodak(self, tmp_path) -> Path:
        path = tmp_path / "kodak"
        path.mkdir()
        noise = np.random.default_rng(0).normal(128, 60, (6, 8, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(path / "a.png")
        return path

    def test_the_same_weights_do_not_pass(self, kodak, tmp_path, monkeypatch):
        copy = shutil.copytree(choose().folder, tmp_path / "copy")
        cache, curves = tmp_path / "cache.json", tmp_path / "curves.json"
        curves.write_text(
            json.dumps({"curves": {PUBLISHED: {"bpp": [0.001, 0.1, 5, 50], "psnr_rgb": [5, 15, 45, 90]}}})
        )
        arguments = [choose().folder, copy, "--images", kodak, "--device", "cpu"]
        arguments += ["--cache", cache, "--curves", curves]
        monkeypatch.setattr(ratchet, "DECIDING", (ratchet.SINGLE, (1.0, 2.0, 4.0)))
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 1, result.output
        assert "| single layer: new against old | +0.00 % |" in result.output
        assert f"single layer: new against {PUBLISHED}" in result.output
        known = json.loads(cache.read_text())
        assert all(key.startswith(choose().identity) for key in known) and len(known) == 4 * 2

    @pytest.mark.parametrize(("factors", "code"), [((0.9, 0.9, 0.9), 0), ((0.9, 0.9, 1.01), 1), ((1.1, 0.5, 0.5), 1)])
    def test_all_must_be_better(self, kodak, monkeypatch, factors, code):
        made = []

        def curve(self: Measurement, scales: ratchet.Scales) -> Curve:
            made.append(self)
            factor = factors[ratchet.DECIDING.index(scales)] if self is not made[0] else 1
            return Curve([r * factor for r in RATE], PSNR)

        monkeypatch.setattr(Measurement, "curve", curve)
        monkeypatch.setattr(Codec, "load", lambda device, folder, engine: SimpleNamespace(model="none"))
        weights = str(choose().folder)
        assert CliRunner().invoke(main, [weights, weights, "--images", str(kodak)]).exit_code == code

    @pytest.mark.parametrize("quick", [0, 1])
    def test_published_curve_is_of_all_pictures(self, kodak, monkeypatch, tmp_path, quick):
        monkeypatch.setattr(Measurement, "curve", lambda self, scales: Curve(RATE, PSNR))
        monkeypatch.setattr(Codec, "load", lambda device, folder, engine: SimpleNamespace(model="none"))
        curves, weights = tmp_path / "curves.json", str(choose().folder)
        curves.write_text(json.dumps({"curves": {PUBLISHED: {"bpp": RATE, "psnr_rgb": PSNR}}}))
        arguments = [weights, weights, "--images", str(kodak), "--curves", str(curves)]
        result = CliRunner().invoke(main, [*arguments, "--quick", str(quick)])
        assert result.exit_code == 1 and "single layer: new against old | +0.00 %" in result.output
        assert (f"single layer: new against {PUBLISHED}" in result.output) == (quick == 0)

    def test_what_cannot_be_compared_is_neither(self, kodak, tmp_path):
        weights = str(choose().folder)
        for arguments in (
            [weights, str(tmp_path), "--images", str(kodak)],
            [weights, weights, "--images", str(tmp_path)],
            [weights, weights, "--images", str(kodak), "--qualities", "1,50,100"],
            [weights, weights, "--images", str(kodak), "--curves", str(kodak / "a.png")],
        ):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1
