"""The command line, as a person types it."""

import importlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import compass, crop, psnr
from PIL import Image

from compass_codec import cli, colour, container
from compass_codec.codec import layer_sizes

SCALES = {1: "1", 2: "1,2.0", 3: "1,2.0,3.2", 5: "1,1.37,2,2.9,7.7"}


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    crop(48, 32).save(path)
    return path


@pytest.fixture
def coded(photo, small_file) -> Path:
    path = photo.with_suffix(".cmps")
    path.write_bytes(small_file)
    return path


@pytest.mark.parametrize("count", SCALES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 31), (64, 64), (517, 389), (768, 512)])
def test_round_trip(tmp_path, size, count):
    source, file = tmp_path / "in.png", tmp_path / "in.cmps"
    crop(*size).save(source)
    before = source.read_bytes()
    result = compass("encode", source, "--scales", SCALES[count], "--verify", "--device", "cpu")
    assert result.code == 0, result.err
    assert "verified" in result.out and len(result.out.splitlines()) == count + 2
    assert result.out.splitlines()[0].endswith("PSNR")
    silent = compass("encode", source, "--scales", SCALES[count], "--force", "--device", "cpu")
    assert silent.code == 0 and "PSNR" not in silent.out
    assert compass("decode", file, "--all", "--device", "cpu").code == 0
    scales = [float(s) for s in SCALES[count].split(",")]
    for k, expected in enumerate(layer_sizes(size, scales)):
        assert Image.open(tmp_path / f"in.layer{k}.png").size == expected
    assert source.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_one_layer_and_the_highest(coded, tmp_path):
    assert compass("decode", coded, "--layer", 1, "-o", tmp_path / "one.png").code == 0
    assert compass("decode", coded).code == 0
    assert Image.open(tmp_path / "one.png").size == (40, 30)
    assert Image.open(tmp_path / "photo.layer2.png").size == (80, 60)


def test_default_layer_of_a_cut_file_is_the_highest_complete(coded, tmp_path):
    end = container.read_header(coded.read_bytes()).layers[1].end
    coded.write_bytes(coded.read_bytes()[: end + 5])
    result = compass("decode", coded)
    assert result.code == 0 and "layer 1 of 0 to 2 is the highest that is there whole" in result.err
    assert Image.open(tmp_path / "photo.layer1.png").size == (40, 30)
    assert compass("decode", coded, "--layer", 1, "-o", tmp_path / "asked.png").err == ""
    result = compass("decode", coded, "--layer", 2, "-o", tmp_path / "x.png")
    assert result.code == 1 and "layer 2 ends at" in result.err and not (tmp_path / "x.png").exists()
    assert "cut off" in compass("info", coded).out


def test_info(coded):
    facts = json.loads(compass("info", coded, "--json").out)
    data = coded.read_bytes()
    assert facts["size"] == len(data) == facts["layers"][-1]["end"]
    assert [(e["width"], e["height"]) for e in facts["layers"]] == [(20, 15), (40, 30), (80, 60)]
    assert [e["scale"] for e in facts["layers"]] == [1, 2, 4]
    assert all(e["quality"] == 50 and e["state"] == "ok" for e in facts["layers"])
    text = compass("info", coded).out
    assert str(facts["layers"][1]["end"]) in text and facts["model"] in text


def test_first_bytes_give_the_layer(coded, tmp_path):
    """What `info` says of byte ranges is true."""
    end = json.loads(compass("info", coded, "--json").out)["layers"][1]["end"]
    (tmp_path / "part.cmps").write_bytes(coded.read_bytes()[:end])
    assert compass("decode", tmp_path / "part.cmps").code == 0
    assert compass("decode", coded, "--layer", 1).code == 0
    assert (tmp_path / "part.layer1.png").read_bytes() == (tmp_path / "photo.layer1.png").read_bytes()


def test_existing_output_needs_force(photo, coded):
    before = coded.read_bytes()
    result = compass("encode", photo, "--scales", "1")
    assert result.code == 1 and "exists" in result.err and coded.read_bytes() == before
    assert compass("encode", photo, "--scales", "1", "--force", "--quiet").code == 0
    assert coded.read_bytes() != before


def test_quiet_prints_nothing(photo):
    result = compass("encode", photo, "--scales", "1", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 48 x 32 is to be shown as 32 x 48
    crop(48, 32).save(tmp_path / "turned.jpg", exif=exif)
    assert compass("encode", tmp_path / "turned.jpg", "--scales", "1").code == 0
    entry = container.read_header((tmp_path / "turned.cmps").read_bytes()).layers[0]
    assert (entry.width, entry.height) == (32, 48)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "I;16", "LA"])
def test_other_modes(tmp_path, mode):
    base = crop(20, 16)
    image = (
        Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else base.convert(mode, dither=Image.Dither.NONE)
    )
    path = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    image.save(path)
    assert compass("encode", path, "--scales", "1,2", "-q", 90).code == 0
    assert compass("decode", tmp_path / "in.cmps", "-o", tmp_path / "out.png").code == 0
    shown = np.asarray(Image.open(tmp_path / "out.png").convert("L")).astype(float)
    grey = base.convert("1" if mode == "1" else "L", dither=Image.Dither.NONE).convert("L")
    assert np.abs(shown - np.asarray(grey)).mean() < (25 if mode == "1" else 8)


def lines(result) -> list[str]:
    assert result.out == ""
    return result.err.splitlines()


@pytest.mark.parametrize(
    "scales", ["2,1", "0,1", "-1,1", "nan", "inf,inf", "1,two", "", "1,,2", "1e9", ",".join(["1"] * 17)]
)
def test_bad_scales(photo, scales):
    result = compass("encode", photo, "--scales", scales)
    assert result.code == 2 and len(lines(result)) == 1 and "--scales" in result.err
    assert not photo.with_suffix(".cmps").exists()


@pytest.mark.parametrize("args", [["-q", "0"], ["-q", "101"], ["-q", "good"], ["--device", "tpu"], ["--no-such"]])
def test_bad_options(photo, args):
    result = compass("encode", photo, "--scales", "1", *args)
    assert result.code == 2 and len(lines(result)) == 1


def bad_inputs(tmp_path: Path, coded: bytes) -> dict[str, tuple[str, bytes | None]]:
    whole = (tmp_path / "photo.png").read_bytes()
    return {
        "encode": {
            "missing.png": None,
            "empty.png": b"",
            "text.png": b"this is no picture\n",
            "cut.png": whole[: len(whole) // 2],
            "damaged.png": whole[:60] + bytes(20) + whole[80:],
        },
        "decode": {
            "missing.cmps": None,
            "empty.cmps": b"",
            "text.cmps": b"this is no layered file\n",
            "magic.cmps": b"CMPS",
            "cut.cmps": coded[:50],
            "base-cut.cmps": coded[: container.read_header(coded).layers[0].end - 1],
            "picture.cmps": whole,
            "flipped.cmps": coded[:-3] + bytes([coded[-3] ^ 8]) + coded[-2:],
            "version.cmps": coded[:4] + b"\x09" + coded[5:],
        },
    }  # fmt: skip


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_bad_input_is_one_line_and_leaves_nothing(photo, small_file, tmp_path, command):
    for name, content in bad_inputs(tmp_path, small_file)[command].items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        before = sorted(tmp_path.iterdir())
        result = compass(command, path, *(["--scales", "1,2"] if command == "encode" else []))
        assert result.code == 1, name
        assert len(lines(result)) == 1 and name in result.err, (name, result.err)
        assert sorted(tmp_path.iterdir()) == before, name
        if content is not None:
            assert path.read_bytes() == content


def test_a_directory_is_no_picture(tmp_path, photo, coded):
    for args in (
        ["encode", tmp_path, "--scales", "1", "-o", tmp_path / "x.cmps"],
        ["decode", tmp_path],
        ["info", tmp_path],
    ):
        result = compass(*args)
        assert result.code == 1 and len(lines(result)) == 1 and str(tmp_path) in result.err
    for args in (["encode", photo, "--scales", "1"], ["decode", coded]):
        result = compass(*args, "-o", tmp_path)
        assert result.code == 1 and len(lines(result)) == 1
        assert f"{tmp_path}: is a directory" in result.err, "the output, not the source"


def test_layer_that_is_not_there(coded):
    result = compass("decode", coded, "--layer", 3)
    assert result.code == 1 and "layers 0 to 2" in result.err and len(lines(result)) == 1


def test_bad_outputs(photo, coded, tmp_path):
    for args in (
        ["encode", photo, "--scales", "1", "-o", tmp_path / "no" / "such.cmps"],
        ["encode", photo, "--scales", "1", "-o", photo, "--force"],
        ["decode", coded, "-o", tmp_path / "out.xyz"],
        ["decode", coded, "-o", tmp_path / "out"],
        ["decode", coded, "-o", coded, "--force"],
    ):
        before = photo.read_bytes(), coded.read_bytes()
        result = compass(*args)
        assert result.code == 1 and len(lines(result)) == 1, args
        assert (photo.read_bytes(), coded.read_bytes()) == before


def run(*args: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "compass_codec", *map(str, args)], capture_output=True, **options)


def test_pipes(photo, tmp_path):
    data = run("encode", "-", "--scales", "1,2", input=photo.read_bytes()).stdout
    assert container.read_header(data).layers[1].end == len(data)
    png = run("decode", "-", "-o", "-", "--layer", 0, input=data).stdout
    (tmp_path / "out.png").write_bytes(png)
    assert Image.open(tmp_path / "out.png").size == (24, 16)


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "setresuid"), reason="root writes anywhere")
def test_unwritable_directory(photo, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    target = "/proc/photo.cmps" if os.geteuid() == 0 else locked / "photo.cmps"
    result = compass("encode", photo, "--scales", "1", "-o", target)
    assert result.code == 1 and len(lines(result)) == 1 and "photo.cmps" in result.err


def test_light_commands_load_nothing_heavy(coded):
    """`compass info` and `compass --version` in a fresh process import neither torch nor compressai."""
    code = (
        "import sys; from compass_codec.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'compressai', 'numpy', 'PIL', 'constriction'} & set(sys.modules)))"
    )
    for args in (["info", str(coded)], ["--version"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_decoding_does_not_load_what_it_does_not_need(coded, tmp_path):
    code = (
        "import sys; from compass_codec.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'compressai', 'torch._dynamo', 'sympy', 'scipy'} & set(sys.modules)))"
    )
    args = ["decode", str(coded), "--layer", "0", "-o", str(tmp_path / "o.png"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]"], done.stderr


def test_what_is_stripped_of_a_wide_profile_looks_the_same(tmp_path, codec):
    """Without its profile a picture is taken for sRGB, so it is brought there first; at both ends."""
    icc = colour.matrix_profile(colour.PRIMARIES[12], None)
    crop(24, 16).save(tmp_path / "in.png", icc_profile=icc)
    encode = ["encode", tmp_path / "in.png", "-s", "1", "-q", "100", "--device", "cpu"]
    assert compass(*encode, "--strip", "-o", tmp_path / "bare.cmps").err.endswith("--strip keeps no ICC profile\n")
    assert compass(*encode, "-o", tmp_path / "whole.cmps").err == ""
    result = compass("decode", tmp_path / "whole.cmps", "--strip", "-o", tmp_path / "out.png")
    assert result.err.endswith("--strip keeps no ICC profile\n")
    shown = colour.apply_profile(crop(24, 16), icc)
    bare = codec.decode((tmp_path / "bare.cmps").read_bytes())
    assert psnr(bare, shown) > psnr(bare, crop(24, 16)) + 3
    assert psnr(Image.open(tmp_path / "out.png"), shown) > psnr(Image.open(tmp_path / "out.png"), crop(24, 16)) + 3


def test_paths_that_are_pipes(coded, photo, tmp_path):
    for index, args in enumerate(
        (["decode", "PIPE", "-o", tmp_path / "o.png"], ["extract", "PIPE", "-l", "0", "-o", tmp_path / "o.cmps"])
    ):
        reading, writing = os.pipe()
        os.write(writing, coded.read_bytes())
        os.close(writing)
        line = [f"/dev/fd/{reading}" if arg == "PIPE" else arg for arg in args]
        done = run(*line, pass_fds=[reading])
        os.close(reading)
        assert done.returncode == 0, (index, done.stderr)
    done = run("encode", photo, "--scales", "1,2", "-o", "/dev/stdout", "--quiet")
    assert container.read_header(done.stdout).end == len(done.stdout)


@pytest.fixture
def fifo(tmp_path):
    """Makes named pipes: what is written to one, once somebody opens it."""
    started = []

    def make(name: str, content: bytes) -> Path:
        os.mkfifo(tmp_path / name)
        writer = subprocess.Popen(["dd", "status=none", f"of={tmp_path / name}"], stdin=subprocess.PIPE)
        writer.stdin.write(content)
        writer.stdin.close()
        started.append(writer)
        return tmp_path / name

    yield make
    for writer in started:
        writer.kill()
        writer.wait()


def test_named_pipes_are_opened_once(coded, fifo, tmp_path):
    """Also where the beginning of a picture is looked at before it is read, as for what a PNG says of its colours."""
    image = tmp_path / "wide.png"
    crop(24, 16).save(image, gamma=1.0)
    data = image.read_bytes()
    at = data.index(b"IDAT") - 4
    cicp = struct.pack(">I", 4) + b"cICP" + bytes([12, 13, 0, 1])
    wide = data[:at] + cicp + struct.pack(">I", zlib.crc32(cicp[4:])) + data[at:]
    code = (
        "import sys, pathlib; from compass_codec import pictures; print(pictures.read(pathlib.Path(sys.argv[1])).notes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, fifo("a.png", wide)], capture_output=True, text=True, timeout=300
    )
    assert "colour by code points is kept" in done.stdout, done.stderr
    page = tmp_path / "o.html"
    result = compass("view", fifo("a.cmps", coded.read_bytes()), "--source", fifo("b.png", data), "-o", page)
    assert result.code == 1 and "24 x 16; the picture in" in result.err
    assert compass("view", fifo("b.cmps", coded.read_bytes()), "-o", page).out == f"{page}: 3 layers\n"


@pytest.mark.parametrize(
    "line",
    [
        "encode PIPE -s 1",
        "decode PIPE",
        "decode PIPE --all",
        "extract PIPE -l 0",
        "view PIPE",
        "encode PIPE PHOTO -s 1",
    ],
)
def test_a_pipe_names_no_output(photo, tmp_path, line):
    """Nothing is read from it either: with nobody at its other end, that would never end."""
    os.mkfifo(tmp_path / "pipe.x")
    names = {"PIPE": tmp_path / "pipe.x", "PHOTO": photo}
    before = {*tmp_path.iterdir()}
    result = compass(*(names.get(word, word) for word in line.split()))
    assert result.code == 1 and result.err == (
        f"compass: {tmp_path / 'pipe.x'}: is a pipe or device; name its output with -o\n"
    )
    assert {*tmp_path.iterdir()} - before == ({photo.with_suffix(".cmps")} if "PHOTO" in line else set())


def test_one_pipe_takes_one_picture(coded, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = compass("decode", coded, "--all", "-o", tmp_path / "pipe")
    assert result.code == 2 and len(lines(result)) == 1 and "--all" in result.err


@pytest.mark.parametrize(
    "line",
    [
        "bench --images {0} --out {1}/no",
        "bench --images {0} --out {0}/out --curves {1}",
        "train base --data {0} --resume {1}/no",
    ],
)
def test_what_the_system_says_is_told_without_its_number(photo, tmp_path, line):
    (tmp_path / "file").touch()
    result = compass(*line.format(tmp_path, tmp_path / "file").split())
    assert result.code == 1 and len(lines(result)) == 1
    assert result.err.startswith(f"compass: {tmp_path / 'file'}") and "Errno" not in result.err


def test_a_name_with_a_new_line_is_told_in_one(tmp_path):
    crop(24, 16).convert("L").save(tmp_path / "a\nb.png")
    result = compass("encode", tmp_path / "a\nb.png", "-s", "1")
    assert result.code == 0 and len(result.err.splitlines()) == 1 and "a b.png: greyscale" in result.err


def test_streams_paths_and_addresses_that_do_not_work_are_one_line(coded, photo, tmp_path):
    (tmp_path / "loop.cmps").symlink_to("loop.cmps")
    command = f"{sys.executable} -m compass_codec"
    for line in (
        f"encode {photo} -s 1 -o {tmp_path}/loop.cmps",
        f"info {coded} > /dev/full",
        "--help > /dev/full",
        f"encode - -s 1 -o {tmp_path}/x.cmps <&-",
        f"encode {photo} -s 1 -o - >&-",
        "decode 'http://[::1/x.cmps'",
        "encode http://example.org/a.png -s 1",
    ):
        done = subprocess.run(["sh", "-c", f"{command} {line}"], capture_output=True, text=True)
        assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1, (line, done.stderr)


def test_names_as_long_as_the_file_system_takes(tmp_path, small_file):
    from compass_codec.files import write_file

    write_file(tmp_path / ("ä" * 125 + ".cmps"), small_file)
    assert len(list(tmp_path.iterdir())) == 1


MODULES = ["measure.speed", "measure.effort", "measure.layers", "measure.ratchet", "training.tables"]


@pytest.mark.parametrize("name", [*cli.COMMANDS, *MODULES, "training.average"])
def test_every_option_has_help(name):
    """Of the subcommands, and of the modules that are run with ``python -m``."""
    known = name in cli.COMMANDS
    command = cli.cli.get_command(None, name) if known else importlib.import_module(f"compass_codec.{name}").main
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and parameter.help.endswith("."), parameter.name


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["info", "no file"], 1), (["--no such"], 2)])
def test_the_process_ends_whole(arguments, code):
    """What was printed arrives, what was registered for the end runs, and the exit code is that of the command."""
    program = "import atexit, sys\nfrom compass_codec import cli\n"
    program += "print('begin')\natexit.register(print, 'end')\nsys.argv[0] = 'compass'\ncli.run()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], done.returncode) == ("begin", "end", code)
    assert (len(lines) == 3) == (code == 0) and done.stderr.count("\n") == (code != 0)
