"""Where modules may import from: imports of every kind, of types and inside of functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import compass_codec

ROOT = Path(compass_codec.__file__).parent
# A room imports from those before it and from itself. Rooms are packages, or modules beside them.
ROOMS = (
    "errors",
    "files",
    "metrics",
    "distortions",
    "colour",
    "container",
    "entropy",
    "networks",
    "engines",
    "backbones",
    "weights",
    "search",
    "pictures",
    "codec",
    "compass_codec",  # the package itself, whose functions load the codec when they are called
    "remote",
    "pillow",
    "page",
    "web",
    "jobs",
    "server",
    "commands",
    "training",
    "measure",
    "cli",
    "__main__",
)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, in dotted names below the package; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "compass_codec":
                while rest and not (ROOT.joinpath(*rest).is_dir() or ROOT.joinpath(*rest).with_suffix(".py").is_file()):
                    rest.pop()  # a name in a module
                found.add(".".join(rest))
    return found


def modules() -> dict[str, Path]:
    files = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
        for path, parts in files.items()
        if parts[0] != "models"
    }


GRAPH = {name: imports(path) - {name} for name, path in modules().items()}


def room(module: str) -> str:
    return module.split(".")[0] or "compass_codec"


def test_rooms_are_those_there_are():
    assert {room(name) for name in GRAPH} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_down(module):
    own = ROOMS.index(room(module))
    climbing = {name for name in GRAPH[module] if ROOMS.index(room(name)) > own}
    # what every module may know: the version
    assert not climbing - {""}, f"{module} imports from rooms above it"


def test_nothing_imports_training_or_measure():
    """The command line finds them by name, when they are asked for."""
    for module in GRAPH:
        assert not {room(name) for name in GRAPH[module]} & {"training", "measure"} - {room(module)}, module


def test_no_import_goes_round():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name and name not in done:  # the package itself is imported before its modules
            for other in sorted(GRAPH[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


def test_a_climbing_import_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    from compass_codec.codec import Codec\n    from compass_codec import __version__, entropy\n"
    )
    assert imports(path) == {"codec", "", "entropy"}
