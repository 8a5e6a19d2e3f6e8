"""Measures of two pictures: by their definitions where those can be worked out, and the programs that measure."""

from __future__ import annotations

import math
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import crop
from scipy.ndimage import correlate1d

from compass_codec import metrics
from compass_codec.errors import MeasureError
from compass_codec.metrics import METRICS

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales, by Wang et al.


def program(folder, monkeypatch, name: str, script: str) -> None:
    """A program ``name`` of the shell, the only one on the PATH."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(folder))


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """MS-SSIM as published, of one channel, with windows that lie inside of the picture."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    a, b, product = a.astype(float), b.astype(float), 1.0

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, window, 0), window, 1)[5:-5, 5:-5]

    for k, weight in enumerate(WEIGHTS):
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        both = mean(a * b) - mean(a) * mean(b)
        contrast = (2 * both + c2) / (mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2 + c2)
        if k == len(WEIGHTS) - 1:
            contrast = contrast * (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
        product *= contrast.mean() ** weight
        a, b = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3)) for x in (a, b))
    return product


class TestMsSsim:
    def test_by_its_definition(self):
        picture = np.asarray(crop(192, 192))
        noise = np.random.default_rng(0).normal(0, 25, picture.shape)
        noisy = (picture + noise).clip(0, 255).astype(np.uint8)
        expected = np.mean([by_definition(picture[..., c], noisy[..., c]) for c in range(3)])
        assert 0.5 < expected < 0.99 and metrics.ms_ssim(picture, noisy) == pytest.approx(expected, abs=2e-5)

    def test_of_flat_pictures_only_their_light_differs(self):
        a, b = (np.full((176, 176, 3), value, np.uint8) for value in (100, 140))
        light = (2 * 100 * 140 + 2.55**2) / (100**2 + 140**2 + 2.55**2)
        assert metrics.ms_ssim(a, b) == pytest.approx(light ** WEIGHTS[-1], abs=1e-4)
        assert metrics.ms_ssim(a, a) == pytest.approx(1)

    def test_of_a_small_picture_there_is_none(self):
        picture = np.asarray(crop(200, 160))
        assert metrics.ms_ssim(picture, picture) is None

    def test_without_its_package_a_line_says_so(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
        picture = np.asarray(crop(176, 176))
        with pytest.raises(MeasureError, match="pip install"):
            metrics.ms_ssim(picture, picture)


class TestPrograms:
    def test_the_program_gets_both_pictures_and_its_distances_are_read(self, tmp_path, monkeypatch):
        script = (
            'read head < "$1"; [ "$head" = P6 ] || exit 1\n[ "$1" = "$2" ] && exit 1\necho 2.5; echo "3-norm: 0.75"'
        )
        program(tmp_path, monkeypatch, "butteraugli_main", script)
        picture = np.asarray(crop(16, 16))
        assert metrics.butteraugli(picture, picture) == (2.5, 0.75)
        assert METRICS["butteraugli"].measure(picture, picture) == 0.75
        assert METRICS["butteraugli-max"].measure(picture, picture) == 2.5
        program(tmp_path, monkeypatch, "ssimulacra2", "echo 81.25")
        assert METRICS["ssimulacra2"].measure(picture, picture) == 81.25

    @pytest.mark.parametrize("script", ["echo no distances", "echo broken >&2; exit 3", "echo 1.5"])
    def test_what_fails_is_one_line(self, tmp_path, monkeypatch, script):
        program(tmp_path, monkeypatch, "butteraugli_main", script)
        picture = np.asarray(crop(16, 16))
        with pytest.raises(MeasureError, match=r"^butteraugli_main: .*(broken|said)"):
            metrics.butteraugli(picture, picture)

    def test_a_program_that_is_not_there_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", os.fspath(tmp_path))
        for name in ("butteraugli", "ssimulacra2"):
            with pytest.raises(MeasureError, match=f"no {METRICS[name].program} on the PATH"):
                METRICS[name].identity()

    def test_another_program_is_another_identity(self, tmp_path, monkeypatch):
        program(tmp_path, monkeypatch, "ssimulacra2", "echo 1")
        first = METRICS["ssimulacra2"].identity()
        (tmp_path / "new").mkdir()
        program(tmp_path / "new", monkeypatch, "ssimulacra2", "echo 2")
        assert METRICS["ssimulacra2"].identity() != first

    @pytest.mark.skipif(shutil.which("butteraugli_main") is None, reason="libjxl's butteraugli_main is not here")
    def test_the_reference_butteraugli(self):
        picture = np.asarray(crop(64, 64))
        near, far = (np.clip(picture.astype(int) + by, 0, 255).astype(np.uint8) for by in (2, 20))
        assert metrics.butteraugli(picture, picture) == (0, 0)
        assert 0 < metrics.butteraugli(picture, near)[1] < metrics.butteraugli(picture, far)[1]


@pytest.mark.parametrize("name", METRICS)
def test_the_axis_rises_with_quality_and_leads_back(name):
    metric = METRICS[name]
    values = {"psnr": [25, 40], "ms-ssim": [0.9, 0.99], "ssimulacra2": [30, 90]}.get(name, [4, 0.5])
    worse, better = map(metric.axis, values)
    assert worse < better and [metric.value(worse), metric.value(better)] == pytest.approx(values)
    best = {"psnr": math.inf, "ms-ssim": 1.0, "ssimulacra2": 100.0}.get(name, 0.0)
    assert metric.axis(best) > better
