"""The wheel, installed alone: with nothing beside it but what its base requires."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from conftest import crop
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


# without what would lead to the package in the source tree
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def required(lines: list[str], extras: set[str], found: dict[str, metadata.Distribution]) -> None:
    """Add to ``found`` what these lines of Requires-Dist need here, and what that needs in turn."""
    for line in lines:
        need = Requirement(line)
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = canonicalize_name(need.name)
        if name not in found or need.extras:
            found[name] = metadata.distribution(name)
            required(found[name].requires or [], need.extras, found)


def build_wheel(folder: Path) -> Path:
    """The wheel of this tree, made in ``folder``."""
    tree = folder / "tree"
    for name in ("src", "models"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment of its own, in which the wheel is installed. The libraries that its base requires
    are links to those here: nothing is downloaded, and what an extra brings is not there."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    venv.create(folder / "fresh", symlinks=True)
    python = folder / "fresh" / "bin" / "python"
    run(*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "fresh")}))
    (installed,) = metadata.distributions(path=[str(site)])
    found: dict[str, metadata.Distribution] = {}
    required(installed.requires or [], set(), found)
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


@pytest.mark.slow
def test_it_encodes_and_decodes(python, tmp_path):
    crop(24, 16).save(tmp_path / "a.png")
    missing = "import importlib.util as u; print([n for n in ('compressai', 'scipy', 'ray') if u.find_spec(n)])"
    assert run(python, "-c", missing) == "[]\n"
    where = run(python, "-c", "import compass_codec; print(compass_codec.__file__)")
    assert Path(where.strip()).is_relative_to(python.parents[1])
    compass = python.with_name("compass")
    run(compass, "encode", tmp_path / "a.png", "--scales", "1,2", "--device", "cpu", "--verify")
    run(compass, "decode", tmp_path / "a.cmps", "--layer", 0, "-o", tmp_path / "small.png", "--device", "cpu")
    assert Image.open(tmp_path / "small.png").size == (12, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["encode", "decode", "info", "bench", "extract", "models", "view", "serve", "train"]
)
def test_every_command_explains_itself(python, command):
    """What an extra brings is not imported before it is used."""
    assert "Usage" in run(python.with_name("compass"), command, "--help")
