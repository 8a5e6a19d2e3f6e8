"""Entropy models of the lean backbone beside the context model: the mean-scale hyperprior, the factorized prior and the
pyramid in both profiles."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from conftest import noise_pictures
from test_lean_codec import SMALL, check_garbage, check_symbols_with, known, picture, steps_of
from torch import nn

from compass_codec import entropy, web
from compass_codec.backbones import lean as lean_codec
from compass_codec.backbones.lean import LeanLayer
from compass_codec.backbones.symbols import LATENT_LIMIT
from compass_codec.engines.onnx_engine import OnnxEngine, OnnxLean
from compass_codec.engines.torch_engine import TorchEngine, TorchExact, TorchLean
from compass_codec.errors import WeightsError
from compass_codec.networks.lean import LeanCodec
from compass_codec.networks.numbers import FACTORIZED, INTEGERS, LAMBDAS, MEAN_UNIT, entropy_model
from compass_codec.networks.strips import spans
from compass_codec.training.exact import integers
from compass_codec.training.export import export, tables_of
from compass_codec.training.lean import LeanStage, RatedLean, linear_start
from compass_codec.weights import read_set

PYRAMIDS = ["pyramid", "pyramid-fast"]
MODELS = ["hyperprior", FACTORIZED, *PYRAMIDS]
CPU = torch.device("cpu")


def rated_of(model: str) -> RatedLean:
    torch.manual_seed(5)
    rated = RatedLean(**SMALL, entropy=model)
    linear_start(rated.codec, noise_pictures(4, 64))
    for parameter in rated.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return rated.requires_grad_(False).eval()


@cache
def layers_of(model: str, kind: torch.dtype = torch.float32) -> tuple[LeanLayer, LeanLayer]:
    """The same networks with PyTorch and with ONNX Runtime."""
    rated = rated_of(model)
    codec, exact = rated.codec, dict[str, torch.Tensor]()
    if model != FACTORIZED:
        x = noise_pictures(2, 64) - 0.5
        exact = integers(codec, [codec.analysis(x, torch.full((2,), float(k))) for k in range(len(LAMBDAS))])
    tables = [tables_of(rated)[f"tables.{name}"].numpy() for name in ("z", "y", "y_lengths")]
    made = entropy.Tables(*tables, skipped=0 if model == FACTORIZED else lean_codec.SKIPPED)
    twin = TorchExact(exact, codec.m, CPU, entropy_model(model).networks) if exact else None
    tensors = {name: value.numpy() for name, value in codec.state_dict().items()}
    tensors |= {f"{INTEGERS}{name}": value.numpy() for name, value in exact.items()}
    theirs, ours = TorchLean(codec, twin, kind), OnnxLean(tensors, **SMALL, entropy=model)
    return LeanLayer(theirs, theirs, made, TorchEngine(CPU)), LeanLayer(ours, ours, made, OnnxEngine())


@pytest.fixture(scope="module", params=MODELS)
def pair(request) -> tuple[LeanLayer, LeanLayer]:
    return layers_of(request.param)


def test_dimensions_name_the_model_where_it_is_another():
    assert "entropy" not in LeanCodec(**SMALL).dimensions
    assert LeanCodec(**SMALL, entropy="hyperprior").dimensions["entropy"] == "hyperprior"
    for make in (LeanCodec, lambda **more: OnnxLean({}, **more)):
        with pytest.raises(ValueError, match="entropy model 'msp'; this version has context, hyperprior, factorized"):
            make(**SMALL, entropy="msp")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (70, 90)])
@pytest.mark.parametrize("quality", [1, 45, 100])
def test_the_decoder_sees_what_the_encoder_saw(pair, size, quality):
    """With either engine, which decode each other's files to the same symbols."""
    for layer, other in (pair, pair[::-1]):
        data, reconstruct = (
            layer.encode(picture(size), known(size), quality) if layer is pair[0] else onnx(layer, size, quality)
        )
        again = layer.decode(data, size, strips(layer, size, 7), quality)
        assert np.array_equal(again, reconstruct())
        for a, b in zip(layer.parse(data, size), other.parse(data, size), strict=True):
            assert np.array_equal(a, b)


def strips(layer: LeanLayer, size: tuple[int, int], rows: int):
    found = known(size, rows)()
    return (part.numpy() for part in found) if isinstance(layer.engine, OnnxEngine) else found


def onnx(layer: LeanLayer, size: tuple[int, int], quality: float):
    return layer.encode(picture(size), lambda: strips(layer, size, 10**6), quality)


def test_symbols_do_not_depend_on_strips_threads_or_the_pixel_path(pair, monkeypatch):
    size, layer = (150, 110), pair[0]
    data, _ = layer.encode(picture(size), known(size), 80)
    z, y = layer.parse(data, size)
    assert len(np.unique(y)) > 20
    other = layers_of(layer.networks.entropy, torch.bfloat16)[0]
    for codec, cells, threads in ((layer, 14, 2), (other, 1024, 1)):
        monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
        check_symbols_with(threads, codec, data, size, z, y)


def test_garbage_gives_a_picture_or_one_error(pair):
    size, layer = (40, 56), pair[0]
    data, _ = layer.encode(picture(size), known(size), 70)
    check_garbage(data, 60, size, lambda broken: layer.decode(broken, size, known(size)(), 70))


@pytest.mark.parametrize(("model", "steps"), [("pyramid", 7), ("pyramid-fast", 3)])
def test_a_pyramid_codes_from_coarse_to_fine(model, steps):
    """Every latent once, in as many steps for every size, which begin with one place of each z."""
    order, seen = LeanCodec(**SMALL, entropy=model).order, torch.zeros(1, SMALL["m"], 11, 14)
    assert len(order) == steps and order[0].stride == 4
    for step, following in zip(order, [*order[1:], None], strict=True):
        for part in step.parts:
            seen[part.of(step.stride)] += 1
        if following is None or following.stride < step.stride:
            scale = torch.zeros_like(seen)
            scale[step.grid] = 1
            assert torch.equal(seen, scale), "all of the scale, nothing finer"


@pytest.mark.parametrize("model", PYRAMIDS)
def test_a_step_of_a_pyramid_depends_on_those_before_it_alone(model):
    layer = layers_of(model)[0]
    rng = np.random.default_rng(4)
    features = layer.exact.features(torch.from_numpy(rng.integers(-9, 10, (1, SMALL["n"], 3, 4))), (11, 14))
    y = torch.from_numpy(rng.normal(size=(1, SMALL["m"], 11, 14)).astype(np.float32) * 20)

    told = steps_of(layer, features, y.clone())
    for changed, step in enumerate(layer.exact.order):
        other = y.clone()
        for part in step.parts:
            other[part.of(step.stride)] += 9
        same = [np.array_equal(a, b) for a, b in zip(steps_of(layer, features, other), told, strict=True)]
        assert all(same[: changed + 1]) and not any(same[changed + 1 :])


@pytest.mark.parametrize("model", ["hyperprior", *PYRAMIDS])
def test_a_layer_takes_the_bits_that_training_estimates(model):
    layer, rated = layers_of(model)[0], rated_of(model)
    x, size = picture((512, 512)), (512, 512)
    data, _ = layer.encode(x, zeros(size), 60)
    pixels = torch.from_numpy(x).permute(2, 0, 1)[None] / 255
    _, bits = rated(pixels, torch.tensor([3.0]), True)
    assert 8 * len(data) == pytest.approx(float(bits), rel=0.04)


def zeros(size: tuple[int, int]):
    return lambda: (torch.zeros(1, 3, b - a, size[1]) for a, b in spans(size[0], 10**6))


@pytest.mark.parametrize("model", PYRAMIDS)
def test_extreme_symbols_come_back(model):
    """Far beyond the tables, where they are escaped."""
    layer = layers_of(model)[0]
    rng, size = np.random.default_rng(6), (9, 6)
    y = torch.from_numpy(rng.choice([-LATENT_LIMIT, -3000, -1, 0, 1, 70, LATENT_LIMIT], (1, SMALL["m"], *size)))
    y, z = y.float(), torch.from_numpy(rng.choice([-LATENT_LIMIT, -40, 0, 700], (1, SMALL["n"], 3, 2))).float()
    data = layer.write(z, y)
    again_z, again = layer.parse(data, (9 * 16, 6 * 16))
    assert np.array_equal(again_z, z[0].int().numpy())
    assert np.array_equal(again, (y[0] * MEAN_UNIT).int().numpy()) and np.abs(again).max() > 30_000 * MEAN_UNIT


@pytest.mark.parametrize("level", [0, 3, 7])
def test_a_layer_takes_the_bits_of_the_density(level):
    """The tables of a level are those of the density there, and the encoder takes them: within 2 %, with the bytes of
    level and end."""
    layer, size = layers_of(FACTORIZED)[0], (320, 320)
    rated = rated_of(FACTORIZED)
    quality = next(q for q in np.arange(1, 100.01, 0.01) if layer.lambda_of(q) >= 0.999 * LAMBDAS[level])
    data, _ = layer.encode(picture(size), known(size), quality)
    z, y = layer.parse(data, size)
    assert z.ravel().tolist() == [level]
    latent = torch.from_numpy(y / 64)[None].float()
    assert torch.equal(latent, latent.round()), "no means"
    _, bits = rated.code(latent, torch.tensor([float(level)]), True)
    assert 8 * len(data) == pytest.approx(float(bits), rel=0.02, abs=80)


def test_the_density_learns():
    """Of the latents of fixed pictures, at two rates: bits fall towards those of the best normal distributions."""
    rated = rated_of(FACTORIZED).train()
    x, levels = noise_pictures(4, 128) - 0.5, torch.tensor([0.0, 2.0, 4.0, 7.0])
    y = rated.codec.analysis(x, levels).detach() * 3  # scales are wrong at first
    learned = [rated.codec.log_scale.requires_grad_(), *rated.bottleneck.requires_grad_(True).parameters()]
    optimiser = torch.optim.Adam(learned, lr=0.02)
    found = []
    for _ in range(150):
        bits = rated.code(y, levels, True)[1].sum()
        optimiser.zero_grad()
        bits.backward()
        optimiser.step()
        found.append(float(bits.detach()))
    scales = (y.flatten(2).var(2) + 1 / 12).sqrt()
    normal = float((scales * (2 * np.pi * np.e) ** 0.5).log2().clamp(min=0).sum() * y[0, 0].numel())
    print(f"{found[0]:.0f} bits at first, {found[-1]:.0f} later, {normal:.0f} by normal distributions")
    assert found[-1] < 0.9 * found[0] and found[-1] < 1.05 * normal


def test_browsers_refuse_a_base_codec_alone(tmp_path):
    stage = LeanStage(**SMALL)
    stage.crops = noise_pictures(2, 64)
    export(stage, tmp_path)
    with pytest.raises(WeightsError, match="browsers decode enhancement layers with the transforms of the base codec"):
        web.weights_of(read_set(tmp_path))


@pytest.mark.parametrize("model", MODELS)
def test_browsers_refuse(model, tmp_path):
    stage = LeanStage(**SMALL, entropy=model)
    stage.crops = noise_pictures(2, 64)
    export(stage, tmp_path)
    with pytest.raises(WeightsError, match="browsers decode with the context model of four steps alone"):
        web.weights_of(read_set(tmp_path))
