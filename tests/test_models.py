"""Sets of weights: which are found, which one a file is decoded with, and what is said of a broken one."""

import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import compass, crop
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from test_serve import Running

import compass_codec
import compass_codec.pillow
from compass_codec import backbones, container, server, weights
from compass_codec.backbones import mean_scale
from compass_codec.codec import Codec, _loaded, shared
from compass_codec.errors import OptionError, WeightsError
from compass_codec.networks.arrays import to_bytes
from compass_codec.training.export import export
from compass_codec.training.stages import Stage
from compass_codec.training.trainer import Plan, Run
from compass_codec.weights import ModelSet

INSTALLED = [each.profile for each in weights.sets() if isinstance(each, ModelSet)]
SPEC = {"profile": "idle", "backbone": "idle", "purpose": "a test", "parts": {"nothing": 64 * "0"}, "format": 2}


def build(spec, tensors, device, precision):
    """The backbone "idle", which has networks of its own: those installed, but a grey base."""
    assert spec["profile"] == "idle" and list(tensors) == ["nothing"]
    folder = weights.choose(model="paper").folder
    networks = {part: load_file(folder / f"{part}.safetensors") for part in mean_scale.PARTS}
    networks["base"]["g_s.6.weight"].zero_()
    return mean_scale.build(spec, networks, device, precision)


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """The folder of a set of the backbone "idle", in a folder that COMPASS_MODELS names."""
    folder = tmp_path / "sets" / "idle"
    folder.mkdir(parents=True)
    save_file({"x": np.zeros(1, np.float32)}, folder / "nothing.safetensors")
    weights.write_card(folder, SPEC)
    monkeypatch.setitem(backbones.NAMES, "idle", __name__)
    monkeypatch.setenv("COMPASS_MODELS", str(tmp_path / "sets"))
    return folder


def decoded(path) -> dict[str, np.ndarray]:
    """Layer 0 of the file a.cmps, 8 pixels wide, by every way there is."""
    png, data = path.with_suffix(".png"), path.read_bytes()
    result = compass("decode", path, "--layer", 0, "-o", png, "--force", "--device", "cpu")
    assert result.code == 0, result.err
    served = Running(server.make_app(path.parent, shared("cpu")))
    answer = served.get("/a.png?w=8")
    served.stop()
    with Image.open(path) as image:
        image.seek(0)
        return {
            "command": np.asarray(Image.open(png)),
            "Python": np.asarray(compass_codec.decode(data, 0, "cpu")),
            "a codec of the default set": np.asarray(shared("cpu").decode(data, 0)),
            "Pillow": np.asarray(image),
            "server": np.asarray(answer.image),
        }


@pytest.mark.parametrize("name", [*INSTALLED, "idle"])
def test_files_of_every_set_decode_unnamed(idle, tmp_path, name):
    """Two sets in one process, and each file with its own."""
    source, path = tmp_path / "a.png", tmp_path / "a.cmps"
    crop(16, 12).save(source)
    for model in (name, weights.identity(None, name)):
        args = ("encode", source, "-s", "1,2", "-o", path, "--force", "--device", "cpu", "--verify", "--model", model)
        result = compass(*args)
        assert result.code == 0, result.err
        assert container.read_header(path.read_bytes()).model == weights.identity(None, name)
    seen = shared("cpu", model=name).encode(Image.open(source), [1, 2]).layers[0]
    for way, picture in decoded(path).items():
        assert np.array_equal(picture, seen), way
    assert np.ptp(seen) > 20 or name == "idle"
    assert f"({name})" in compass("info", path).out
    assert json.loads(compass("info", path, "--json").out)["profile"] == name


def test_a_set_is_loaded_once(idle, monkeypatch):
    _loaded.cache_clear()
    loads = []
    load, name = mean_scale.build, "paper"
    monkeypatch.setattr(mean_scale, "build", lambda *args: loads.append(args[0]["profile"]) or load(*args))
    folder, first = weights.choose(model=name).folder, shared("cpu", model=name)
    found = [first, shared("cpu", model=name), shared("cpu", folder), shared("cpu", model=first.model)]
    assert {*found, first.of(first.model)} == {first} and loads == [name]
    assert _loaded.cache_info().maxsize <= 4


class Deflated:
    """A backbone.LayerCodec without networks: what the prediction, in 8 bits, lacks, and all of it."""

    searchable = False

    def lambda_of(self, quality):
        return quality

    def encode(self, picture, prediction, quality, keep=False):
        return zlib.compress((picture - to_bytes(torch.cat(list(prediction()), 2))).tobytes()), lambda: picture

    def decode(self, data, size, prediction, quality):
        missing = np.frombuffer(zlib.decompress(data), np.uint8).reshape(*size, 3)
        return to_bytes(torch.cat(list(prediction), 2)) + missing


class Nearest:
    """A backbone.Predictor."""

    def rows(self, low, size, rows):
        return torch.nn.functional.interpolate(low.float() / 255, size)[:, :, slice(*rows)]


def test_a_backbone_of_another_kind(idle, monkeypatch):
    """It codes files of layers with nothing that mean_scale has; there is no search for it."""
    parts = Deflated(), Deflated(), Nearest()
    monkeypatch.setitem(sys.modules, "deflated", SimpleNamespace(build=lambda *_: parts))
    monkeypatch.setitem(backbones.NAMES, "idle", "deflated")
    codec = Codec.load("cpu", idle)
    layers = [np.array(crop(*size)) for size in ((9, 7), (20, 70), (30, 90))]
    encoded = codec.encode_layers(layers, [1, 2, 3], 60)
    header = container.read_header(encoded.data)
    assert header.model == codec.model == weights.identity(idle)
    for found, layer in zip(codec.decode_layers(encoded.data, header, 2), layers, strict=True):
        assert np.array_equal(found, layer)
    with pytest.raises(OptionError, match=f"^effort 1; there is no search for weights {codec.model}, only effort 0$"):
        codec.encode_layers(layers, [1, 2, 3], 60, effort=1)


class DoNothing(Stage):
    """A backbone in one class: its module, its stage, its layer codec and its predictor. A layer is its prediction."""

    backbone, trains, layered, searchable = "idle", ("base",), False, False

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.base = torch.nn.Linear(1, 1)

    def freeze(self):
        pass

    def forward(self, x, lam, level, factors):
        """To learn the mean of the samples."""
        loss = (x.mean((1, 2, 3)) - self.base(lam[:, None])[:, 0]).square().mean()
        return loss, {"bpp": torch.zeros(()), "psnr": torch.zeros(())}

    @classmethod
    def build(cls, spec, tensors, device, precision):
        found = cls()
        found.base.load_state_dict({name: value.float() for name, value in tensors["base"].items()})
        return found, found, found

    def lambda_of(self, quality):
        return quality

    def encode(self, picture, prediction, quality, keep=False):
        return b"\0", lambda: self.decode(b"\0", picture.shape[:2], prediction(), quality)

    def decode(self, data, size, prediction, quality):
        return to_bytes(torch.cat(list(prediction), 2))

    rows = Nearest.rows


def test_a_backbone_that_does_nothing_trains_exports_encodes_and_decodes(tmp_path, monkeypatch):
    """One class and one registration."""
    monkeypatch.setitem(sys.modules, "nothing", DoNothing)
    monkeypatch.setitem(backbones.NAMES, "idle", "nothing")
    x, plan = torch.rand(2, 3, 32, 32), Plan("nothing", batch=(2,), side=(32,), lr=0.1)
    run = Run(plan, DoNothing(), SimpleNamespace(sample=lambda *_: x), tmp_path, x.device)
    first, *_, last = (float(run.advance(k / 30)["loss"]) for k in range(30))
    assert last < first
    export(run.stage, tmp_path / "set")
    codec = Codec.load("cpu", tmp_path / "set")
    assert torch.equal(codec.base.base.weight, run.stage.base.weight.half().float())
    encoded = codec.encode(crop(16, 12), [1, 2])
    header = container.read_header(encoded.data)
    assert header.model == weights.identity(tmp_path / "set") and [entry.length for entry in header.layers] == [1, 1]
    for found, seen in zip(codec.decode_layers(encoded.data, header, 1), encoded.layers, strict=True):
        assert np.array_equal(found, seen)


def test_a_batch_knows_which_set_made_a_file(idle, tmp_path):
    crop(8, 8).save(tmp_path / "a.png")
    args = ("encode", tmp_path / "a.png", "-s", "1", "--out-dir", tmp_path / "out", "--device", "cpu", "-j", 1)
    assert compass(*args, "--model", "idle").code == 0
    assert "up to date" in compass(*args, "--model", "idle").out
    result = compass(*args)
    assert result.code == 1 and "differs from what these options make" in result.err


def test_weights_given_as_a_folder(idle, tmp_path, monkeypatch):
    """It encodes, and is a candidate to decode with, beside those installed."""
    monkeypatch.delenv("COMPASS_MODELS")
    crop(8, 8).save(tmp_path / "a.png")
    ours, theirs = tmp_path / "ours.cmps", tmp_path / "theirs.cmps"
    for path, more in ((ours, ()), (theirs, ("--weights", idle))):
        assert compass("encode", tmp_path / "a.png", "-s", "1", "-o", path, "--device", "cpu", *more).code == 0
    for path in ours, theirs:
        args = ("decode", path, "-o", tmp_path / "b.png", "--force", "--device", "cpu", "--weights", idle)
        assert compass(*args).code == 0
    result = compass("decode", theirs, "-o", tmp_path / "c.png", "--device", "cpu")
    model = weights.identity(idle)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert f"weights {model} are not here; looked at: " in result.err and "COMPASS_MODELS" in result.err
    assert all(f"{name} {weights.identity(None, name)}" in result.err for name in INSTALLED)
    assert not (tmp_path / "c.png").exists()


def test_names_that_no_set_has(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPASS_MODELS", str(tmp_path / "none"))
    with pytest.raises(
        WeightsError, match=r"no set of weights is named 'other'; looked at: .*paper .*none: no such fo"
    ):
        Codec.load("cpu", model="other")


def test_the_identity_is_that_of_the_card(idle):
    """It follows what model.json says, its parts' SHA-256 too, and reads no part."""
    first = weights.identity(idle)
    assert first == hashlib.sha256((idle / "model.json").read_bytes()).hexdigest()[:12]
    weights.write_card(idle, SPEC | {"purpose": "another"})
    second = weights.identity(idle)
    save_file({"x": np.zeros(2, np.float32)}, idle / "nothing.safetensors")
    assert weights.identity(idle) == second
    weights.write_card(idle, SPEC | {"purpose": "another"})
    assert len({first, second, weights.identity(idle)}) == 3
    assert weights.load(weights.read_set(idle), shared("cpu").engine).identity == weights.identity(idle)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        (SPEC | {"format": 1}, "format 1; this version of compass_codec reads 2"),
        (SPEC | {"profile": "0123456789ab"}, "profile '0123456789ab'"),
        (SPEC | {"profile": "abcdefabcdef"}, "profile 'abcdefabcdef'"),
        (SPEC | {"profile": 1}, "profile 1"),
        (SPEC | {"backbone": "none"}, "backbone none; this version has mean_scale"),
        (SPEC | {"purpose": "two\nlines"}, "purpose"),
        (SPEC | {"parts": ["nothing"]}, "parts"),
        (SPEC | {"parts": {}}, "parts"),
        (SPEC | {"parts": {"../nothing": 64 * "0"}}, "parts"),
        (SPEC | {"parts": {"nothing": 63 * "0"}}, "parts"),
        (SPEC | {"parts": {"nothing": 0}}, "parts"),
        ({k: v for k, v in SPEC.items() if k != "parts"}, "no parts"),
    ],
)
def test_a_broken_card_is_one_line(idle, text, reason):
    text = text if isinstance(text, str) else json.dumps(text)
    (idle / "model.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsError) as caught:
        weights.load(weights.read_set(idle), shared("cpu").engine)
    assert str(caught.value).startswith(f"{idle / 'model.json'}: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_part_is_one_line(idle):
    """One that is not what model.json names, though it could be used; one that cannot; and none."""
    part = idle / "nothing.safetensors"

    def reason() -> str:
        with pytest.raises(WeightsError, match=r"^[^\n]*nothing\.safetensors: [^\n]*$") as caught:
            Codec.load("cpu", idle)
        return str(caught.value)

    data = part.read_bytes()
    part.write_bytes(data[:-1] + b"\1")
    assert "not the file that model.json names" in reason()
    part.write_bytes(b"damaged")
    weights.write_card(idle, SPEC)
    assert "these weights cannot be used" in reason()
    part.unlink()
    assert "cannot read the weights" in reason()


def test_a_broken_set_does_not_hide_the_others(idle, tmp_path, small_file):
    shutil.copytree(idle, tmp_path / "sets" / "also")
    (idle / "model.json").write_text("{")
    assert compass_codec.decode(small_file, 0, "cpu").size == (20, 15)
    result = compass("models")
    assert result.code == 0 and [line.split()[0] for line in result.out.splitlines()] == ["profile", *INSTALLED, "idle"]
    assert result.err.startswith(f"note: {idle / 'model.json'}: not JSON") and result.err.count("\n") == 1


def test_models_as_json(idle):
    *_, last = json.loads(compass("models", "--json").out)
    assert last["profile"] == last["backbone"] == "idle" and last["identity"] == weights.identity(idle)
    assert last["bytes"] == sum(path.stat().st_size for path in idle.iterdir()) and last["folder"] == str(idle)
    assert [each["profile"] for each in json.loads(compass("models", "--json").out)] == [*INSTALLED, "idle"]


def test_what_only_lists_is_light(tmp_path, small_file):
    path = tmp_path / "a.cmps"
    path.write_bytes(small_file)
    for args in (["info", str(path)], ["models"], ["--version"]):
        code = f"""
import sys
from compass_codec import cli
try:
    cli.main({args!r})
except SystemExit as e:
    assert not e.code
print(*{{"torch", "compressai"}} & sys.modules.keys(), file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout and not done.stderr.strip(), (args, done.stderr)
