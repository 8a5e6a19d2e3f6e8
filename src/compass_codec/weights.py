"""Sets of weights on disk: their description, the look-up, and the identity that ties a .cmps file to one.

A set is a folder with model.json and its parts, a safetensors file each. model.json names profile, backbone and parts
with their SHA-256, so the SHA-256 of model.json alone identifies the set. Parts are read and checked when it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compass_codec import backbones
from compass_codec.container import MODEL_BYTES
from compass_codec.errors import OptionError, WeightsError
from compass_codec.files import write_file

if TYPE_CHECKING:
    from compass_codec.backbones import Backbone, LayerCodec
    from compass_codec.engines import Engine, Predictor

DEFAULT = "lean"  # the profile that encodes when none is named
TUNES = {"psnr": "lean", "visual": "visual"}  # what encoders aim at, and the profile trained for it
PATH = "COMPASS_MODELS"  # environment variable: folders of sets, or sets, separated as in PATH
CARD = "model.json"
FORMAT = 2  # of model.json
NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
IDENTITY = re.compile(rf"[0-9a-f]{{{2 * MODEL_BYTES}}}")
SHA_256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Weights:
    """Everything a file is decoded with. ``identity`` and ``folder`` are those of the set, ``precision`` that of
    ``load``."""

    base: LayerCodec
    residual: LayerCodec
    predictor: Predictor
    identity: str
    precision: str
    folder: Path


@dataclass(frozen=True)
class ModelSet:
    """A set of weights on disk that has not been loaded. ``spec`` is all of its model.json, ``identity`` the start of
    the SHA-256 of that file, in hex."""

    folder: Path
    spec: dict[str, Any]
    identity: str

    @property
    def profile(self) -> str:
        return str(self.spec["profile"])

    @property
    def backbone(self) -> str:
        return str(self.spec["backbone"])

    @property
    def purpose(self) -> str:
        return str(self.spec["purpose"])

    @property
    def parts(self) -> dict[Path, str]:
        """The file of each part and its SHA-256 in hex."""
        return {part_of(self.folder, name): digest for name, digest in self.spec["parts"].items()}

    @property
    def size(self) -> int:
        """Bytes of all files. Raises WeightsError."""
        return sum(_size(path) for path in (self.folder / CARD, *self.parts))


def part_of(folder: Path, name: str) -> Path:
    """The file of a part."""
    return folder / f"{name}.safetensors"


def _unreadable(path: Path, e: OSError) -> WeightsError:
    return WeightsError(f"{path}: cannot read the weights ({e.strerror})")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as e:
        raise _unreadable(path, e) from e


def write_card(folder: Path, spec: dict[str, Any]) -> None:
    """Write ``folder``/model.json: ``spec``, of whose parts those that are there, as they are now."""
    found = [name for name in spec["parts"] if part_of(folder, name).exists()]
    parts = {name: hashlib.sha256(_read(part_of(folder, name))).hexdigest() for name in found}
    write_file(folder / CARD, (json.dumps(spec | {"format": FORMAT, "parts": parts}, indent=1) + "\n").encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e) from e


def read_set(folder: Path) -> ModelSet:
    """The set in ``folder``, of which only model.json is read. Raises WeightsError naming what is wrong with that."""
    card = folder / CARD
    data = _read(card)
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{card}: not JSON ({' '.join(str(e).split())})") from e
    if not isinstance(spec, dict):
        raise WeightsError(f"{card}: not a JSON object")
    if spec.get("format") != FORMAT:
        raise WeightsError(f"{card}: format {spec.get('format')!r}; this version of compass_codec reads {FORMAT}")
    parts = spec.get("parts")
    for key, good in (
        # a name that reads as an identity would be taken for one
        ("profile", _name(spec.get("profile")) and not IDENTITY.fullmatch(spec["profile"])),
        ("backbone", _name(spec.get("backbone"))),
        ("purpose", isinstance(spec.get("purpose"), str) and spec["purpose"].isprintable()),
        ("parts", isinstance(parts, dict) and parts and all(map(_name, parts)) and all(map(_digest, parts.values()))),
    ):
        if not good:
            raise WeightsError(f"{card}: {key} {spec[key]!r} cannot be used" if key in spec else f"{card}: no {key}")
    return ModelSet(folder, spec, hashlib.sha256(data).digest()[:MODEL_BYTES].hex())


def _name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _digest(value: object) -> bool:
    return isinstance(value, str) and SHA_256.fullmatch(value) is not None


def places() -> list[Path]:
    """Where sets are looked for: the package, then the folders that COMPASS_MODELS names."""
    named = os.environ.get(PATH, "").split(os.pathsep)
    installed = importlib.import_module("compass_codec.models").__path__[0]
    return [Path(installed), *(Path(name) for name in named if name)]


def sets() -> Iterator[ModelSet | WeightsError]:
    """All sets that are installed or found, each once; in place of a broken one, its error."""
    seen = set()
    for place in places():
        if (place / CARD).exists():
            folders = [place]
        elif place.is_dir():
            folders = sorted(card.parent for card in place.glob(f"*/{CARD}"))
        else:
            yield WeightsError(f"{place}: no such folder")
            continue
        for folder in folders:
            if (real := folder.resolve()) not in seen:
                seen.add(real)
                try:
                    yield read_set(folder)
                except WeightsError as e:
                    yield e


def choose(folder: Path | None = None, model: str | None = None) -> ModelSet:
    """The one look-up of sets, by ``model``, a profile's name or an identity. The set in ``folder``, if one is given,
    comes first, then those installed, then those of COMPASS_MODELS. Without ``model`` it is the set in ``folder``, or
    the installed set of the default profile.
    Raises WeightsError if it is not there, or if ``folder`` holds no set."""
    given = read_set(folder) if folder is not None else None
    if model is None:
        if given is not None:
            return given
        model = DEFAULT
    if not isinstance(model, str):
        raise WeightsError(f"weights are named by text, not by {type(model).__name__}")
    by_identity = IDENTITY.fullmatch(model) is not None
    candidates = [*([given] if given else []), *sets()]
    for each in candidates:
        if isinstance(each, ModelSet) and model == (each.identity if by_identity else each.profile):
            return each
    wanted = f"weights {model} are not here" if by_identity else f"no set of weights is named {model!r}"
    looked = ", ".join(map(_described, candidates))
    where = f"the project's page has sets, and the environment variable {PATH} names folders to look in"
    raise WeightsError(f"{wanted}; looked at: {looked or 'none'}; {where}")


def tuned(tune: str | None, model: str | None) -> str | None:
    """What ``choose`` takes as ``model`` for a tune, a key of TUNES, or for a model; None for neither. Raises
    OptionError for both or for another tune."""
    if tune is None:
        return model
    if model is not None:
        raise OptionError("a tune and a model exclude each other")
    if tune not in TUNES:
        raise OptionError(f"tune {tune!r}; there are {' and '.join(TUNES)}")
    return TUNES[tune]


def _described(found: ModelSet | WeightsError) -> str:
    return str(found) if isinstance(found, WeightsError) else f"{found.profile} {found.identity} in {found.folder}"


def profile_of(identity: str) -> str | None:
    """The profile of a set that is here, by its identity; None if there is none."""
    try:
        return choose(model=identity).profile
    except WeightsError:
        return None


def folder_of(backbone: str) -> Path | None:
    """The first set that there is of a backbone; None if there is none."""
    folders = (found.folder for found in sets() if isinstance(found, ModelSet) and found.backbone == backbone)
    return next(folders, None)


def identity(folder: Path | None = None, model: str | None = None) -> str:
    """The identity of the set that ``choose`` takes, without loading it."""
    return choose(folder, model).identity


def load(found: ModelSet, engine: Engine, precision: str = "float32") -> Weights:
    """Load a set with an engine. ``precision``, "float32" or "float16", is that of what computes the pixels
    of enhancement layers. The base layer stays in float32: it is small, and its errors would be the largest.
    Raises WeightsError if a part is missing, corrupt or does not fit, or this version has no such backbone."""
    if found.backbone not in backbones.NAMES:
        known = ", ".join(backbones.NAMES)
        raise WeightsError(f"{found.folder / CARD}: backbone {found.backbone}; this version has {known}")
    tensors = tensors_of(found, engine.parse)
    try:
        with engine.computing():
            backbone: Backbone = importlib.import_module(backbones.NAMES[found.backbone])
            base, residual, predictor = backbone.build(found.spec, tensors, engine, precision)
    except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as e:
        raise WeightsError(f"{found.folder}: these weights cannot be used ({_line(e)})") from e
    return Weights(base, residual, predictor, found.identity, precision, found.folder)


def tensors_of(found: ModelSet, parse: Callable[[bytes], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tensors of each part. ``parse`` is ``load`` of a module of safetensors. Raises WeightsError if a part is
    missing or corrupt."""
    tensors = {}
    for path, digest in found.parts.items():
        data = _read(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise WeightsError(f"{path}: not the file that {CARD} names (its SHA-256 differs)")
        try:
            tensors[path.stem] = parse(data)
        except MemoryError:
            raise
        except Exception as e:  # that of safetensors is one of its own
            raise WeightsError(f"{path}: these weights cannot be used ({_line(e)})") from e
    return tensors


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
