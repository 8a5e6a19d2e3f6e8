"""The table of the quality scale."""

from __future__ import annotations

import os
import sys

import pytest
from click.testing import CliRunner
from conftest import crop

from compass_codec.measure import quality

CURVE = [(10, 4.0), (30, 2.0), (80, 0.5)]


@pytest.mark.parametrize(
    ("distance", "number"), [(4, "10"), (2, "30"), (1, "55"), (0.5, "80"), (4.1, "< 10"), (0.4, "> 80")]
)
def test_the_number_of_an_equal_distance(distance, number):
    assert quality.number_of(distance, CURVE) == number


def test_a_curve_that_stands_still_or_goes_back_has_a_number_all_the_same():
    assert quality.number_of(2, [(10, 4), (20, 2), (30, 2), (40, 1)]) == "20"
    assert quality.number_of(2.05, [(10, 4), (20, 2), (30, 2.1), (40, 1)]) == "20"


def test_words_follow_the_largest_distance():
    words = [quality.in_words(distance) for distance in (0, 1, 2, 4, 7, 99)]
    assert words[0] == words[1] and len(set(words)) == 5


def test_a_page_of_one_picture(tmp_path, monkeypatch):
    """The program is a stub whose distances are a tenth and a twentieth of the mean difference."""
    script = f"""#!{sys.executable}
import sys
a, b = (open(f, "rb").read()[-96 * 64 * 3:] for f in sys.argv[1:])
d = sum(abs(x - y) for x, y in zip(a, b)) / len(a)
print(d / 10); print("3-norm:", d / 20)
"""
    (tmp_path / "butteraugli_main").write_text(script)
    (tmp_path / "butteraugli_main").chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    (tmp_path / "in").mkdir()
    crop(96, 64).save(tmp_path / "in" / "a.png")
    monkeypatch.setattr(quality, "PEERS", {"webp": (10, 50, 90)})
    args = ["--images", tmp_path / "in", "--out", tmp_path / "out", "--qualities", "20,60", "-j", "1"]
    done = CliRunner().invoke(quality.main, list(map(str, args)))
    assert done.exit_code == 0, done.output
    result = done.stdout
    lines = [line.split(" | ") for line in result.splitlines() if line.startswith("| ")]
    assert lines[0][-1] == "WebP |" and [line[0] for line in lines[2:]] == ["| 20", "| 60"]
    bits, distances = ([float(line[k]) for line in lines[2:]] for k in (2, 5))
    assert bits == sorted(bits) and distances == sorted(distances, reverse=True)
    assert "on 1 picture (a.png)" in result and "`lean`" in result
