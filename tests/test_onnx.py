"""ONNX Runtime as an engine: it computes what PyTorch does, and its files are the same."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import compass, crop
from make_golden import symbol_hashes
from PIL import Image
from test_conformance import PROFILES, check_pictures, check_symbols
from test_lean_codec import SMALL, known, made, picture, steps_of

from compass_codec import container, engines, entropy, weights
from compass_codec.backbones import lean as lean_codec
from compass_codec.backbones.lean import LeanLayer
from compass_codec.codec import Codec, shared
from compass_codec.engines.onnx_engine import OnnxEngine, OnnxLean, OnnxLeanLIFF
from compass_codec.engines.torch_engine import TorchEngine
from compass_codec.errors import OptionError
from compass_codec.networks import lean_rows, liff_rows
from compass_codec.networks.lean_liff import LeanLIFF
from compass_codec.networks.liff import LIFF
from compass_codec.networks.mean_scale import ImageCodec
from compass_codec.networks.mean_scale_numbers import hyper_size, latent_size
from compass_codec.networks.numbers import INTEGERS


@pytest.fixture(scope="module", params=PROFILES)
def both(request, in_float32) -> tuple[Codec, Codec]:
    """A profile with PyTorch and with ONNX Runtime."""
    return shared("cpu", model=request.param), shared("cpu", model=request.param, engine="onnx")


@pytest.fixture(scope="module", params=[False, True], ids=["pixels", "latents"])
def pair(request) -> tuple[LeanLayer, LeanLayer]:
    """The same small random networks with PyTorch and with ONNX Runtime."""
    layer = made(request.param)
    exact = layer.networks.exact
    tensors = {name: value.numpy() for name, value in layer.networks.codec.state_dict().items()}
    tensors |= {f"{INTEGERS}{name}": value.numpy() for name, value in exact.tensors.items()}
    networks = OnnxLean(tensors, **SMALL)
    return layer, type(layer)(networks, networks, layer.tables, OnnxEngine())


def near(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    assert ours.shape == tuple(theirs.shape)
    return bool(np.abs(ours - theirs.numpy()).max() <= 1e-4 * (1 + theirs.abs().max()))


@pytest.mark.parametrize("lam", [0.0018, 0.02, 0.18])
def test_transforms_are_those_of_pytorch(pair, lam):
    torch.manual_seed(1)
    theirs, ours = (layer.networks.at(lam) for layer in pair)
    pixels = torch.randn(1, 3, 21, 35)
    assert near(ours.embed(pixels.numpy()), theirs.embed(pixels))
    for group, channels in (("a8", 16), ("s8", 16), ("a16", 24), ("s16", 24)):
        f = torch.randn(1, channels, 5, 7)
        for a, b in zip(getattr(ours, group), getattr(theirs, group), strict=True):
            assert near(a(f.numpy()), b(f))
    f8, f16, y = torch.randn(1, 16, 6, 8), torch.randn(1, 24, 3, 4), torch.randn(1, 16, 3, 4)
    for name, f in (("down", f8), ("to_y", f16), ("from_y", y), ("up", f16), ("out", f8)):
        assert near(getattr(ours, name)(f.numpy()), getattr(theirs, name)(f)), name
    theirs, ours = (layer.networks.hyper for layer in pair)
    h, y = torch.randn(1, 16, 6, 8), torch.randn(1, 16, 5, 7)
    assert near(ours.first(y.numpy()), theirs.first(y))
    for a, b in zip([*ours.blocks, *ours.down], [*theirs.blocks, *theirs.down], strict=True):
        assert near(a(h.numpy()), b(h))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (9, 12)])
@pytest.mark.parametrize("cells", [8, 1024])
def test_integers_are_those_of_pytorch(pair, size, cells, monkeypatch):
    """Features, and scale indices and means of all four steps: every one."""
    monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
    rng = np.random.default_rng(2)
    z = rng.integers(-700, 700, (1, SMALL["n"], *(-(-side // 4) for side in size)))
    y = (rng.normal(size=(1, SMALL["m"], *size)) * 20).astype(np.float32)
    found: list[list[np.ndarray]] = []
    for layer in pair:
        features = layer.exact.features(layer.engine.array(z), size)
        found.append([np.asarray(features), *steps_of(layer, features, layer.engine.array(y.copy()))])
    for theirs, ours in zip(*found, strict=True):
        assert theirs.dtype == ours.dtype and np.array_equal(theirs, ours)
    assert len(np.unique(found[0][1])) > 1


@pytest.mark.parametrize("size", [(1, 1), (33, 1), (17, 31), (70, 90)])
def test_either_decodes_what_the_other_wrote(pair, size):
    torch_known = known(size)
    numpy_known = lambda: (strip.numpy() for strip in torch_known())  # noqa: E731
    for (writer, before), (reader, after) in (
        (two := list(zip(pair, (torch_known, numpy_known), strict=True))),
        two[::-1],
    ):
        data, reconstruct = writer.encode(picture(size), before, 70)
        seen, found = reconstruct(), reader.decode(data, size, after(), 70)
        difference = np.abs(found.astype(int) - seen)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
        for a, b in zip(writer.parse(data, size), reader.parse(data, size), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("factor", [1, 1.5, 2, 2.7])
@pytest.mark.parametrize("low", [(1, 1), (3, 50), (22, 17)])
def test_liff_is_that_of_pytorch(low, factor, monkeypatch):
    torch.manual_seed(3)
    theirs = LeanLIFF(channels=16, hidden=8).requires_grad_(False)
    for parameter in theirs.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    ours = OnnxLeanLIFF({name: value.numpy() for name, value in theirs.state_dict().items()}, channels=16, hidden=8)
    pixels = np.random.default_rng(4).integers(0, 256, (1, 3, *low), np.uint8)
    size = tuple(max(1, round(side * factor)) for side in low)
    whole = theirs.rows(torch.from_numpy(pixels), size, (0, size[0]))
    assert near(ours.rows(pixels, size, (0, size[0])), whole)
    monkeypatch.setitem(lean_rows.PLACES, "cpu", 40)
    cut = size[0] // 2
    parts = [ours.rows(pixels, size, rows) for rows in ((0, cut), (cut, size[0])) if rows[0] < rows[1]]
    assert near(np.concatenate(parts, 2), whole)


@pytest.fixture(scope="module")
def mean_scale_pair():
    """The same small random networks of mean_scale with PyTorch and with ONNX Runtime."""
    torch.manual_seed(6)
    codec = ImageCodec(n=8, m=12)
    for name, parameter in codec.named_parameters():
        if "gain" in name or name.endswith(("beta", "gamma")):
            parameter.data += 0.2 * torch.rand_like(parameter)
        if name == "h_s.4.weight":
            parameter.data *= 20  # so that scales are of many indices
    tensors = {name: value.half().numpy() for name, value in codec.state_dict().items()}
    theirs = {name: torch.from_numpy(value) for name, value in tensors.items()}
    cpu = torch.device("cpu")
    return TorchEngine(cpu).mean_scale(theirs, "float32"), OnnxEngine().mean_scale(tensors, "float32")


@pytest.mark.parametrize("lam", [0.0018, 0.02, 0.0483])
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (33, 64), (66, 49)])
def test_mean_scale_is_that_of_pytorch(mean_scale_pair, size, lam):
    theirs, ours = mean_scale_pair
    x, y = torch.rand(1, 3, *size) - 0.5, torch.randn(1, 12, *latent_size(size))
    assert near(ours.analysis(x.numpy(), lam), theirs.analysis(x, lam))
    assert near(ours.synthesis(y.numpy(), lam, size), theirs.synthesis(y, lam, size))
    assert near(ours.hyper_analysis(y.numpy()), theirs.hyper_analysis(y))


@pytest.mark.parametrize("size", [(1, 1), (70, 200), (513, 130)])
@pytest.mark.parametrize("largest", [3, 300, 2**20])
def test_integers_of_mean_scale_are_those_of_pytorch(mean_scale_pair, size, largest):
    z = np.random.default_rng(7).integers(-largest, largest + 1, (1, 8, *hyper_size(size)), np.int32)
    (index, means), (own, same) = (
        layer.scales_and_means(each, latent_size(size))
        for layer, each in zip(mean_scale_pair, (torch.from_numpy(z), z), strict=True)
    )
    assert same.dtype == np.float32 and np.array_equal(own, index) and np.array_equal(same, means)
    assert len(np.unique(own)) > 1


@pytest.mark.parametrize("factor", [1, 1.5, 2.7])
@pytest.mark.parametrize("low", [(1, 1), (3, 50), (22, 17)])
def test_liff_of_the_paper_is_that_of_pytorch(low, factor, monkeypatch):
    torch.manual_seed(3)
    theirs = LIFF(channels=8, hidden=12, depth=3, growth=4, blocks=2, convs=2).requires_grad_(False)
    for parameter in (theirs.mlp_last.weight, theirs.mlp_last.bias):
        torch.nn.init.normal_(parameter, std=0.3)
    ours = OnnxEngine().liff({name: value.numpy() for name, value in theirs.state_dict().items()}, "float32")
    pixels = np.random.default_rng(4).integers(0, 256, (1, 3, *low), np.uint8)
    size = tuple(max(1, round(side * factor)) for side in low)
    whole = theirs.rows(torch.from_numpy(pixels), size, (0, size[0]))
    assert near(ours.rows(pixels, size, (0, size[0])), whole)
    monkeypatch.setitem(liff_rows.TILE, "cpu", 11)
    monkeypatch.setitem(liff_rows.STRIP_PIXELS, "cpu", 40)
    cut = size[0] // 2
    parts = [ours.rows(pixels, size, rows) for rows in ((0, cut), (cut, size[0])) if rows[0] < rows[1]]
    assert near(np.concatenate(parts, 2), whole)


def test_golden_files(both):
    check_symbols(both[1])
    check_pictures(both[1])


@pytest.mark.parametrize("quality", [10, 95])
def test_whole_files_both_ways(both, quality):
    image, scales = crop(97, 61), [1, 1.6, 3.2]
    for writer, reader in (both, both[::-1]):
        encoded = writer.encode(image, scales, quality)
        assert symbol_hashes(writer, encoded.data) == symbol_hashes(reader, encoded.data)
        header = container.read_header(encoded.data)
        found = reader.decode_layers(encoded.data, header, 2)
        # one sample that differs moves up to some twenty around it in the layer above
        for seen, shown, share in zip(encoded.layers, found, (0.001, 0.005, 0.005), strict=True):
            difference = np.abs(seen.astype(int) - shown)
            assert difference.max() <= 1 and (difference > 0).mean() <= share


@pytest.mark.parametrize("kind", ["float16", "float32", "int8", "int16", "int32", "int64", "uint8"])
def test_files_are_read_as_safetensors_reads_them(kind):
    rng = np.random.default_rng(5)
    tensors = {f"{n}": rng.integers(-9, 100, size).astype(kind) for n, size in enumerate([(3,), (), (2, 5, 1), (0, 4)])}
    data = safetensors.numpy.save(tensors, {"a": "b"})
    found, expected = OnnxEngine().parse(data), safetensors.numpy.load(data)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    for broken in (b"", data[:20], data[:-1], data[:8] + b"[" + data[9:], data.replace(b'"dtype"', b'"dtypo"')):
        with pytest.raises((ValueError, KeyError, AttributeError)):
            OnnxEngine().parse(broken)


@pytest.mark.parametrize("name", ["to_y.weight", "a8.0.norm", "h_a.1.weight", f"{INTEGERS}first.weight"])
def test_weights_that_do_not_fit_are_refused(pair, name):
    good = {**pair[1].networks.layers.tensors}
    shape = good[name].shape
    OnnxLean(good, **SMALL)
    with pytest.raises(ValueError, match=name.removeprefix(INTEGERS).split(".")[0]):
        OnnxLean(good | {name: good[name][: shape[0] // 2]}, **SMALL)
    with pytest.raises(KeyError):
        OnnxLean({key: value for key, value in good.items() if key != name}, **SMALL)


@pytest.mark.parametrize(
    ("part", "name"), [("base", "g_s.0.weight"), ("base", "h_s.4.bias"), ("liff", "mlp_last.bias")]
)
def test_weights_of_mean_scale_that_do_not_fit_are_refused(part, name):
    folder = weights.choose(model="paper").folder
    good = OnnxEngine().parse((folder / f"{part}.safetensors").read_bytes())
    make = OnnxEngine().liff if part == "liff" else OnnxEngine().mean_scale
    with pytest.raises(ValueError, match=name):
        make(good | {name: good[name][:-1]}, "float32")
    with pytest.raises(KeyError):
        make({key: value for key, value in good.items() if key != name}, "float32")


CHOICES = {
    ("auto", "lean", "cpu", "auto"): "onnx",
    ("auto", "lean", "auto", "float32"): "onnx",
    ("auto", "lean", "cuda", "auto"): "torch",
    ("auto", "lean", "cpu", "float16"): "torch",
    ("auto", "mean_scale", "cpu", "auto"): "onnx",
    ("auto", "mei", "cpu", "auto"): "torch",
    ("torch", "lean", "cpu", "auto"): "torch",
    ("onnx", "lean", "auto", "auto"): "onnx",
    ("onnx", "mei", "auto", "auto"): "no backbone mei; --engine torch has",
    ("onnx", "lean", "cuda", "auto"): "no --device cuda",
    ("onnx", "lean", "cpu", "float16"): "no --precision float16",
    ("tvm", "lean", "cpu", "auto"): "there are auto, torch, onnx",
}
choose = engines.choose  # as it is before conftest.py asks for PyTorch


@pytest.mark.parametrize("asked", CHOICES)
def test_which_engine(asked, monkeypatch):
    monkeypatch.setattr(engines, "GPU_DRIVERS", ())
    monkeypatch.setattr("sys.platform", "linux")
    if (expected := CHOICES[asked]) in engines.LIBRARIES:
        assert choose(*asked) == expected
    else:
        with pytest.raises(OptionError, match=expected):
            choose(*asked)


@pytest.mark.parametrize(
    ("here", "asked", "expected"),
    [
        (("torch",), ("auto", "lean"), "torch"),
        (("onnx",), ("auto", "lean"), "onnx"),
        (("onnx",), ("auto", "mei"), "the backbone mei needs PyTorch: pip install torch"),
        (("onnx",), ("auto", "lean", "cpu", "float16"), "--precision float16 needs PyTorch"),
        (("onnx",), ("torch", "lean"), "--engine torch needs PyTorch"),
        (("torch",), ("onnx", "lean"), "--engine onnx needs ONNX Runtime: pip install onnxruntime"),
        ((), ("auto", "lean"), "nothing to compute with is installed"),
    ],
)
def test_what_is_installed_decides(here, asked, expected, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda name: name in here)
    monkeypatch.setattr(engines, "may_have_gpu", lambda: False)
    if expected in engines.LIBRARIES:
        assert choose(*asked) == expected
    else:
        with pytest.raises(OptionError, match=expected):
            choose(*asked)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_command_line_never_imports_pytorch(tmp_path, profile):
    """With ``--engine auto``, as conftest.py is not there to ask for PyTorch."""
    crop(24, 16).save(tmp_path / "a.png")
    code = "import sys\nfrom compass_codec import cli\ntry: cli.main(sys.argv[1:])\n"
    code += "except SystemExit as e: sys.exit(e.code or 3 * ('torch' in sys.modules))"
    for command in (
        ("encode", tmp_path / "a.png", "--scales", "1,2", "--device", "cpu", "--verify", "--model", profile),
        ("decode", tmp_path / "a.cmps", "--all", "--device", "cpu"),
        ("view", tmp_path / "a.cmps", "--device", "cpu"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.layer1.png").size == (24, 16)


def test_the_option(tmp_path):
    crop(24, 16).save(tmp_path / "a.png")
    file = tmp_path / "a.cmps"
    for engine in ("onnx", "torch", "auto"):
        assert compass("encode", tmp_path / "a.png", "--scales", "1,2", "--engine", engine, "--force").code == 0
        result = compass("decode", file, "-o", tmp_path / "b.png", "--engine", engine, "--force")
        assert result.code == 0, result.err
    refused = compass("encode", tmp_path / "a.png", "--scales", "1", "--engine", "onnx", "--force", "--effort", 1)
    assert refused.code == 1 and "effort 1 needs PyTorch" in refused.err
    refused = compass(
        "encode", tmp_path / "a.png", "--scales", "1", "--engine", "onnx", "--model", "paper", "--force", "--effort", 1
    )
    assert refused.code == 1 and "there is no search" in refused.err and "PyTorch" not in refused.err


def test_a_file_of_another_backbone_takes_the_same_engine(monkeypatch):
    monkeypatch.setattr(engines, "choose", choose)
    monkeypatch.setattr(engines, "may_have_gpu", lambda: False)
    codec, other = shared(), shared(model="paper")
    assert codec.engine.name == other.engine.name == "onnx"
    assert codec.decode(other.encode(crop(24, 16), [1], 50).data).size == (24, 16)


def test_memory_grows_by_little_with_height(monkeypatch):
    """A pixel more takes 3 bytes of the layer, 4 of the latent and little else; see notes/engines.md."""
    monkeypatch.setitem(lean_codec.CELLS, "cpu", 64)
    monkeypatch.setattr(entropy, "PIECE", 4096)
    codec, peaks = Codec.load("cpu", engine="onnx"), []
    for height in (1024, 2048, 8192):  # the first makes what is kept
        layer, size = np.array(crop(64, 64)).repeat(height // 64, 0), (height, 64)
        tracemalloc.start()
        data = codec.base.encode(layer, lambda size=size: codec.predict(None, size), 60)[0]
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        codec.base.decode(data, size, codec.predict(None, size), 60)
        peaks.append((encoding, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    for first, last in zip(*peaks[1:], strict=True):
        assert (last - first) / (64 * (8192 - 2048)) < 9.5
