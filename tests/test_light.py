"""The light environment: what is in requirements-light.txt and the package, and no PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import venv
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import GOLDEN, crop
from PIL import Image
from test_wheel import ENVIRONMENT, PIP, ROOT, build_wheel, run

from compass_codec import container

MB = 10**6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """The folder of the programs of such an environment."""
    if subprocess.run([*PIP, "index", "versions", "click"], capture_output=True).returncode:
        pytest.skip("pip reaches no index")
    folder = tmp_path_factory.mktemp("light")
    wheel = build_wheel(folder)
    venv.create(folder / "env", symlinks=True)
    programs = folder / "env" / "bin"
    install = (*PIP, "--python", programs / "python", "install", "--quiet")
    run(*install, "-r", ROOT / "requirements-light.txt", "-c", ROOT / "constraints.txt")
    run(*install, "--no-deps", wheel)
    return programs


@pytest.fixture(scope="module")
def work(light, tmp_path_factory) -> Path:
    """A folder with a picture, and what the light environment makes of it."""
    folder = tmp_path_factory.mktemp("work")
    crop(64, 48).save(folder / "a.png")
    print(run(light / "compass", "encode", folder / "a.png", "--scales", "1,2", "--verify"))
    return folder


def failed(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_it_is_small_and_has_no_pytorch(light):
    missing = "import importlib.util as u; print([n for n in ('torch', 'compressai', 'onnx') if u.find_spec(n)])"
    assert run(light / "python", "-c", missing) == "[]\n"
    size = sum(path.lstat().st_size for path in light.parent.rglob("*"))
    print(f"{size / MB:.0f} MB")
    assert size < 250 * MB


def test_decoding_and_other_commands(light, work, codec):
    compass, file = light / "compass", work / "a.cmps"
    for layer, size in enumerate([(32, 24), (64, 48)]):
        run(compass, "decode", file, "--layer", layer, "-o", work / f"{layer}.png")
        found = np.asarray(Image.open(work / f"{layer}.png")).astype(int)
        assert found.shape == (*size[::-1], 3)
        difference = np.abs(found - np.asarray(codec.decode(file.read_bytes(), layer)))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert len(json.loads(run(compass, "info", "--json", file))["layers"]) == 2
    run(compass, "extract", file, "--layer", 0, "-o", work / "small.cmps")
    run(compass, "decode", work / "small.cmps", "-o", work / "small.png")
    assert (work / "small.png").read_bytes() == (work / "0.png").read_bytes()
    run(compass, "view", file, "-o", work / "a.html")
    assert "lean" in run(compass, "models")
    run(compass, "encode", work / "a.png", "--scales", "1,2", "--out-dir", work / "batch", "-j", 2)
    assert run(compass, "decode", work / "batch", "--out-dir", work / "out", "--quiet") == ""
    assert [path.name for path in (work / "out").iterdir()] == ["a.layer1.png"]


def test_little_memory(light, work):
    """Of decoding a small file, in MiB."""
    code = "import sys; from compass_codec import cli; from compass_codec.measure.cost import peak_mb\n"
    code += "try: cli.main(sys.argv[1:])\nexcept SystemExit: print(peak_mb())"
    decode = ("decode", work / "a.cmps", "-o", work / "b.png", "--force", "--quiet")
    memory = float(run(light / "python", "-c", code, *decode))
    print(f"{memory:.0f} MiB")
    assert memory < 238


def test_the_pillow_plugin(light, work):
    code = "import sys, compass_codec.pillow\nfrom PIL import Image\nimage = Image.open(sys.argv[1])\n"
    code += "image.save(sys.argv[2])\nimage.seek(0)\nimage.convert('RGB').save(sys.argv[3], scales=[1, 2])\n"
    code += "assert 'torch' not in sys.modules"
    run(light / "python", "-c", code, work / "a.cmps", work / "top.png", work / "again.cmps")
    assert Image.open(work / "top.png").size[0] == 64 and (work / "again.cmps").stat().st_size > 50


def test_serving(light, work):
    command = [light / "compass", "serve", work, "--port", "0"]
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            (address,) = re.findall(r"http://\S+/", server.stdout.readline())
            with urlopen(f"{address}a.png?w=64") as answer:
                assert Image.open(answer).size == (64, 48)
        finally:
            server.terminate()


def test_the_networks_of_the_paper(light, work, monkeypatch):
    """Which a wheel does not have."""
    small = GOLDEN.parent / "paper" / "small.cmps"
    identity = container.read_header(small.read_bytes()).model
    assert f"weights {identity} are not here" in failed(light / "compass", "decode", small, "-o", work / "x.png")
    monkeypatch.setitem(ENVIRONMENT, "COMPASS_MODELS", str(ROOT / "models" / "paper"))
    for name in ("portrait", "small"):
        golden = GOLDEN.parent / "paper" / f"{name}.cmps"
        run(light / "compass", "decode", golden, "--layer", 1, "-o", work / f"paper.{name}.png")
        seen, found = (
            np.asarray(Image.open(path)).astype(int)
            for path in (golden.with_name(f"{name}.layer1.png"), work / f"paper.{name}.png")
        )
        difference = np.abs(found - seen)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    encode = ("encode", work / "a.png", "--scales", "1,2", "--model", "paper", "--verify")
    run(light / "compass", *encode, "-o", work / "paper.cmps")


def test_what_needs_pytorch_says_so(light, work):
    encode = (light / "compass", "encode", work / "a.png", "--scales", "1,2", "--force")
    assert "effort 1 needs PyTorch" in failed(*encode, "--effort", "1")
    assert "--engine torch needs PyTorch" in failed(*encode, "--engine", "torch")
    assert "--precision float16 needs PyTorch" in failed(*encode, "--precision", "float16")
    train = (light / "compass", "train", "lean", "--data", work, "--resume", work / "run", "--minutes", "1")
    assert "torch, which is not installed" in failed(*train)
