"""What several qualities of one size cost: the command, and the curves behind it."""

import math
import re

import pytest
from click.testing import CliRunner
from conftest import crop, psnr
from PIL import Image

from compass_codec.measure import layers


def test_each_size_once():
    assert layers.once([1, 2, 2, 2], 3) == [0, 3]
    assert layers.once([1, 1, 2, 2, 4], 4) == [1, 3, 4]
    assert layers.once([1, 1], 0) == [0] and layers.once([1, 1], 1) == [1]


def test_bytes_at_a_psnr():
    points = [(1000.0, 30.0), (4000.0, 40.0), (2000.0, 35.0), (1001.0, 30.0)]
    assert layers.at(points, 30) == pytest.approx(1000)
    assert layers.at(points, 35) == pytest.approx(2000)
    assert layers.at(points, 37.5) == pytest.approx(2000 * 2**0.5)
    assert math.isnan(layers.at(points, 29)) and math.isnan(layers.at(points, 41))
    assert layers.compared(110, 100) == "+10.0 %" and layers.compared(110, math.nan) == "-"


def test_the_command(codec, tmp_path):
    crop(48, 40).save(tmp_path / "a.png")
    arguments = ["--images", str(tmp_path), "--side", "40", "--scales", "1,2,2", "-q", "40,40,70"]
    result = CliRunner().invoke(layers.main, arguments)
    assert result.exit_code == 0, result.output
    table = [line.split("|")[1:-1] for line in result.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[0].strip() for row in table] == ["0", "1", "2"]
    image = crop(48, 40).crop((4, 0, 44, 40))
    encoded = codec.encode(image, [1, 2, 2], [40, 40, 70])
    assert int(table[2][3]) == len(encoded.data)
    alone = [codec.encode(image, [1], q) for q in layers.QUALITIES]
    points = [(len(e.data), psnr(Image.fromarray(e.layers[0]), image)) for e in alone]
    reached = psnr(Image.fromarray(encoded.layers[2]), image)
    assert table[2][5].strip() == layers.compared(len(encoded.data), layers.at(points, reached))
    assert CliRunner().invoke(layers.main, [*arguments[:-1], "40,40"]).exit_code == 2


def test_bad_input_is_one_line(tmp_path):
    result = CliRunner().invoke(layers.main, ["--images", str(tmp_path)])
    assert result.exit_code == 1 and result.output == f"Error: {tmp_path}: no PNG pictures\n"
    result = CliRunner().invoke(layers.main, ["--images", str(tmp_path), "--weights", str(tmp_path)])
    assert result.exit_code == 1 and str(tmp_path) in result.output and result.output.count("\n") == 1
