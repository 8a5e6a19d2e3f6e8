"""Golden files: the same symbols and pictures on every path, device and later version."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compass, crop
from make_golden import GOLDEN, KINDS, measured, symbol_hashes
from PIL import Image

from compass_codec import container, weights
from compass_codec.codec import Codec, fastest, shared  # as it is before conftest.py says no to it
from compass_codec.errors import WeightsError
from compass_codec.metrics import psnr
from compass_codec.networks.arrays import to_bytes
from compass_codec.pictures import pyramid
from compass_codec.search import Search

PROFILES = [found.profile for found in weights.sets() if not isinstance(found, WeightsError)]


@pytest.fixture(params=PROFILES)
def profile(request) -> str:
    return request.param


@pytest.fixture
def codec(profile, in_float32) -> Codec:
    return shared("cpu", model=profile)


def folder(codec: Codec) -> Path:
    """Of the golden files of the codec's set, which a new version of the set takes with it."""
    return GOLDEN / (weights.profile_of(codec.model) or "")


def file_of(codec: Codec, name: str) -> bytes:
    return (folder(codec) / f"{name}.cmps").read_bytes()


def pictures(codec: Codec, name: str) -> list[np.ndarray]:
    data = file_of(codec, name)
    header = container.read_header(data)
    return [p.astype(int) for p in codec.decode_layers(data, header, len(header.layers) - 1)]


def expected(codec: Codec, name: str) -> list[np.ndarray]:
    files = [folder(codec) / f"{name}.layer{k}.png" for k in range(len(KINDS[name][1]))]
    return [np.asarray(Image.open(file)).astype(int) for file in files]


def check_pictures(codec: Codec) -> None:
    """No layer is more than 1 of 255 further from the golden one than the layer below it is, nor more than 3; more
    than 1 is one sample in ten thousand. 99.9 % are equal, and 99.5 % above a layer that has samples that are not."""
    apart: dict[bool, list[np.ndarray]] = {False: [np.zeros(1)], True: [np.zeros(1)]}
    for name in KINDS:
        below = 0
        for found, golden in zip(pictures(codec, name), expected(codec, name), strict=True):
            assert found.shape == golden.shape, name
            difference = np.abs(found - golden).ravel()
            assert difference.max() <= min(3, below + 1), name
            apart[below > 0].append(difference)
            below = difference.max()
    first, above = (np.concatenate(apart[key]) for key in (False, True))
    assert (first > 0).mean() <= 0.001 and (above > 0).mean() <= 0.005
    assert (above > 1).sum() <= 0.0001 * (len(first) + len(above))


def check_symbols(codec: Codec) -> None:
    golden = json.loads((folder(codec) / "golden.json").read_text())
    for name in KINDS:
        assert symbol_hashes(codec, file_of(codec, name)) == golden["symbols"][name], name


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def channels_first():
    """Every conversion to channels_last ignored, weights included."""
    keep = torch.channels_last
    torch.channels_last = torch.contiguous_format
    try:
        yield
    finally:
        torch.channels_last = keep


VARIANTS = {
    "as it is": contextlib.nullcontext,
    "one thread": lambda: threads(1),
    "two threads": lambda: threads(2),
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "channels first": channels_first,
}


def test_golden_files_belong_to_these_weights(codec):
    assert json.loads((folder(codec) / "golden.json").read_text())["model"] == codec.model


def excess(golden: dict[str, list[list[float]]], found: dict[str, list[list[float]]]) -> float:
    """How many more bits ``found`` takes than ``golden`` at equal PSNR, as a share, in the mean over crops."""
    shares = []
    for key, points in golden.items():
        (bits, psnr), (bits_now, psnr_now) = ((np.log(x[:, 0]), x[:, 1]) for x in map(np.array, (points, found[key])))
        slope = (bits[-1] - bits[0]) / (psnr[-1] - psnr[0])
        shares.append((bits_now - bits - slope * (psnr_now - psnr)).mean())
    return float(np.mean(shares))


def test_the_encoder_is_no_worse(codec, monkeypatch):
    """At most 0.5 % more bits at equal PSNR; which an encoder that rounds up too soon does not keep."""
    golden = json.loads((folder(codec) / "rate.json").read_text())
    assert excess(golden, measured(codec)) < 0.005
    for layer in (codec.base, codec.residual):
        monkeypatch.setattr(layer, "thresholds", torch.full_like(layer.thresholds, 0.4))
    assert excess(golden, measured(codec)) > 0.005


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_decodes_the_same(variant, profile):
    with VARIANTS[variant](), torch.inference_mode():
        codec = Codec.load("cpu", model=profile)
        check_symbols(codec)
        check_pictures(codec)


LOST = {"float16": 0.05}  # dB of PSNR at most, next to what the encoder saw


@pytest.fixture(params=LOST)
def short(request, profile) -> tuple[Codec, float]:
    """A codec of fewer digits, and what they may lose."""
    return shared("cpu", precision=request.param, model=profile), LOST[request.param]


@pytest.mark.parametrize("asked", ["auto", "float32", "float16"])
@pytest.mark.parametrize(("units", "best"), [(("fp16", "bf16"), "float16"), (("bf16",), "float32"), ((), "float32")])
def test_precision_is_that_which_is_fastest(monkeypatch, asked, units, best):
    monkeypatch.setattr("compass_codec.codec.fastest", fastest)
    here = {"avx512_fp16": True, "avx512_bf16": True} | {f"amx_{kind}": kind in units for kind in ("fp16", "bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here, raising=False)
    assert Codec.load("cpu", precision=asked).precision == (best if asked == "auto" else asked)


def test_older_pytorch_does_not_say_what_is_faster(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert [fastest(torch.device(kind)) for kind in ("cpu", "cuda")] == ["float32", "float16"]


def test_fewer_digits_decode_the_golden_files(short):
    """The same symbols, and nearly the same pictures."""
    codec, lost = short
    check_symbols(codec)
    source, golden = np.asarray(crop(*KINDS["portrait"][0])), expected(codec, "portrait")[-1]
    found = pictures(codec, "portrait")[-1]
    assert (found != golden).any()
    assert psnr(source, found) > psnr(source, golden) - lost


@pytest.mark.parametrize("quality", [10, 60, 100])
@pytest.mark.parametrize("writes", [True, False])
def test_precision_may_differ_between_encoder_and_decoder(codec, short, writes, quality):
    """Three layers: the same symbols, and every layer nearly what the encoder saw."""
    image, scales = crop(96, 72), [1, 1.7, 3]
    other, lost = short
    writer, reader = (other, codec) if writes else (codec, other)
    encoded = writer.encode(image, scales, quality)
    assert symbol_hashes(codec, encoded.data) == symbol_hashes(other, encoded.data)
    header = container.read_header(encoded.data)
    layers = pyramid(image, [(entry.width, entry.height) for entry in header.layers])
    for source, seen, found in zip(layers, encoded.layers, reader.decode_layers(encoded.data, header, 2), strict=True):
        assert psnr(source, found) > psnr(source, seen) - lost


@pytest.mark.parametrize("precision", LOST)
def test_a_search_takes_gradients_in_float32(precision):
    codec = Codec.load("cpu", precision=precision, engine="torch")
    search = Search(codec.residual)
    assert codec.residual.transforms.kind == getattr(torch, precision)
    assert {p.dtype for p in search.transforms.parameters()} == {torch.float32}
    encoded = codec.encode(crop(40, 30), [1, 2], 60, effort=2)
    assert np.array_equal(codec.decode(encoded.data), encoded.layers[-1])


def test_precision_on_the_command_line(tmp_path):
    source, file, out = (tmp_path / name for name in ("a.png", "a.cmps", "b.png"))
    crop(40, 30).save(source)
    for command in (
        ("encode", source, "--scales", "1,2", "-o", file, "--precision", "float16"),
        ("decode", file, "-o", out, "--precision", "float32"),
        ("decode", file, "-o", out, "--precision", "float16", "--force"),
    ):
        assert compass(*command).code == 0
    assert compass("decode", file, "-o", out, "--precision", "bfloat16").code == 2


def test_integers_cost_next_to_nothing_in_rate(monkeypatch):
    """Bytes with the float hyper-decoder in the encoder instead (which no other device could decode)."""
    codec = Codec.load("cpu", model="paper")
    image, total = crop(256, 192), {}
    for name in ("integer", "float"):
        if name == "float":
            for layer in (codec.base, codec.residual):

                def floating(z, size, layer=layer, exact=layer.networks.hyper):
                    scales, means = layer.networks.codec.hyper_synthesis(z.float(), size)
                    bounds = exact.get_buffer("bounds") * 2.0**-12
                    return torch.bucketize(scales.double().contiguous(), bounds), means

                monkeypatch.setattr(layer.networks, "scales_and_means", floating)
        total[name] = sum(len(codec.encode(image, [1, 2], q).data) for q in (20, 60, 95))
    assert total["integer"] < total["float"] * 1.003, total


def test_symbols_do_not_care_about_the_pixel_path(profile, monkeypatch):
    """A pixel path that is off by up to 1e-3 decodes the same symbols, and nearly the same picture."""
    codec = Codec.load("cpu", model=profile)
    generator = torch.Generator().manual_seed(1)

    def noisy(strip: torch.Tensor) -> np.ndarray:
        return to_bytes(strip + (torch.rand(strip.shape, generator=generator) * 2 - 1) * 1e-3)

    for module in ("mean_scale", "lean"):
        monkeypatch.setattr(f"compass_codec.backbones.{module}.to_bytes", noisy)
    check_symbols(codec)
    found, golden = pictures(codec, "portrait"), expected(codec, "portrait")
    assert any((p != g).any() for p, g in zip(found, golden, strict=True))
    assert all(np.abs(p - g).mean() < 0.5 for p, g in zip(found, golden, strict=True))


def test_hyper_decoder_in_a_batch():
    """Several pictures at once get the symbols' parameters that each gets alone."""
    codec = shared("cpu", model="paper")
    torch.manual_seed(1)
    z = (torch.randn(4, 128, 2, 3) * 3).round()
    index, means = codec.residual.networks.hyper(z, (7, 11))
    for i in range(4):
        one, mean = codec.residual.networks.hyper(z[i : i + 1], (7, 11))
        assert torch.equal(one[0], index[i]) and torch.equal(mean[0], means[i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_cuda_decodes_what_the_cpu_wrote_and_the_reverse(codec, profile, precision):
    cuda = Codec.load("cuda", precision=precision, model=profile)
    check_symbols(cuda)
    if precision == "float32":
        check_pictures(cuda)
    image, scales = crop(97, 61), [1, 1.6, 3.2]
    for writer, reader in ((cuda, codec), (codec, cuda)):
        encoded = writer.encode(image, scales, 55)
        assert symbol_hashes(codec, encoded.data) == symbol_hashes(cuda, encoded.data)
        seen, found = encoded.layers[-1].astype(int), np.asarray(reader.decode(encoded.data)).astype(int)
        assert psnr(np.asarray(image), found) > psnr(np.asarray(image), seen) - 0.02
        if precision == "float32":
            assert np.abs(seen - found).max() <= 1 and (seen == found).mean() >= 0.999
