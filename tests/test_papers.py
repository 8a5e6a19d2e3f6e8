"""The backbones "mei" and "rpn": latents of enhancement layers that are predicted from the layer below."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_baselines
import torch
from click.testing import CliRunner
from conftest import crop, noise_pictures
from test_lean_codec import SMALL, check_garbage, check_symbols_with, picture
from torch import nn

from compass_codec import engines, entropy, web
from compass_codec.backbones import lean as lean_codec
from compass_codec.backbones.predicted import PredictedLayer
from compass_codec.codec import Codec
from compass_codec.container import read_header
from compass_codec.engines.torch_engine import TorchEngine, TorchExact, TorchLean
from compass_codec.errors import DamagedError, OptionError, WeightsError
from compass_codec.networks import strips
from compass_codec.networks.numbers import FACTORIZED, LAMBDAS
from compass_codec.networks.predicted import Half, halved
from compass_codec.networks.rates import level_of
from compass_codec.training import average, baselines
from compass_codec.training.exact import integers
from compass_codec.training.export import tables_of
from compass_codec.training.lean import RatedLean, linear_start
from compass_codec.training.predicted import (
    PredictedStage,
    RatedMei,
    RatedRpn,
    RpnStage,
    UncertainRpnStage,
    estimated,
    weighted,
)
from compass_codec.weights import read_set

CPU = torch.device("cpu")
SYSTEMS = [name for name, system in baselines.SYSTEMS.items() if issubclass(system.layers, PredictedStage)]
SIZES = ((25, 35), (37, 53), (75, 105))  # factors 1, 1.5 and 3
photos = test_baselines.photos


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    folder, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setattr(baselines, "DIMENSIONS", test_baselines.SMALL)
    result = test_baselines.train(folder, photos, *(f"--only={name}" for name in SYSTEMS), steps=3)
    assert result.exit_code == 0, result.output
    patch.undo()
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("name", SYSTEMS)
def test_files_decode_to_what_the_encoder_saw(run, name, monkeypatch):
    """All layers, and those that a cut file still has."""
    monkeypatch.setenv("COMPASS_MODELS", str(run / "weights"))
    layers = [np.array(crop(w, h)) for h, w in SIZES]
    encoded = Codec.load("cpu", model=name).encode_layers(layers, [1, 1.5, 3], 60)
    header, fresh = read_header(encoded.data), Codec.load("cpu", model=name)
    for found, seen in zip(fresh.decode_layers(encoded.data, header, 2), encoded.layers, strict=True):
        assert np.array_equal(found, seen)
    for k, entry in enumerate(header.layers):
        assert np.array_equal(np.array(fresh.decode(encoded.data[: entry.end])), encoded.layers[k])
    broken = bytearray(encoded.data)
    broken[header.layers[2].start + header.layers[2].length // 2] ^= 1
    with pytest.raises(DamagedError, match="layer 2 is damaged"):
        fresh.decode(bytes(broken))


@pytest.mark.parametrize("name", SYSTEMS)
def test_sets_say_what_they_are(run, name):
    system, spec = baselines.SYSTEMS[name], read_set(run / "weights" / name).spec
    assert (spec["profile"], spec["backbone"], list(spec["parts"])) == (
        name,
        system.layers.backbone,
        ["base", "residual"],
    )
    assert spec["residual"]["entropy"] == spec["base"]["entropy"] == system.entropy
    history = json.loads((run / "weights" / name / "history.json").read_text())
    assert [(entry["stage"], entry["steps"]) for entry in history] == [(f"base-{system.entropy}", 3), (name, 3)]


def test_what_cannot_be_done_is_one_line(run, monkeypatch):
    monkeypatch.setenv("COMPASS_MODELS", str(run / "weights"))
    with pytest.raises(OptionError, match=r"^--engine onnx has no backbone mei; --engine torch has$"):
        engines.choose("onnx", "mei")
    with pytest.raises(OptionError, match=r"there is no search for weights .*, only effort 0$"):
        Codec.load("cpu", model="rpn").encode(crop(16, 16), [1], effort=1)
    with pytest.raises(WeightsError, match="browsers"):
        web.weights_of(read_set(run / "weights" / "rpn"))
    folder = str(run / "weights" / "mei")
    result = CliRunner().invoke(average.main, [folder, folder, "--part", "base"])
    assert (result.exit_code, result.output) == (1, f"Error: {folder}: sets of the backbone mei are not averaged\n")


def rated_of(kind: type[RatedLean], model: str = "hyperprior") -> RatedLean:
    """One whose networks all do something."""
    torch.manual_seed(5)
    rated = kind(**SMALL, entropy=model)
    linear_start(rated.codec, noise_pictures(4, 64))
    for parameter in rated.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return rated


def layer_of(kind: type[RatedLean], model: str = "hyperprior", precision: torch.dtype = torch.float32):
    rated = rated_of(kind, model).requires_grad_(False).eval()
    x, codec, twin = noise_pictures(2, 64), rated.codec, None
    if model != FACTORIZED:
        levels = [torch.full((2,), float(k)) for k in range(len(LAMBDAS))]
        latents = [codec.analysis(x - 0.5, level) - codec.predict(halved(0.5 * x - 0.5), level)[0] for level in levels]
        twin = TorchExact(integers(codec, latents), codec.m, CPU, False)
    tables = (tables_of(rated)[f"tables.{name}"].numpy() for name in ("z", "y", "y_lengths"))
    made = entropy.Tables(*tables, skipped=0 if twin is None else lean_codec.SKIPPED)
    return PredictedLayer(TorchLean(codec, twin, precision), made, TorchEngine(CPU))


def below(size: tuple[int, int], rows: int = 10**6):
    """Half of what lies below a layer of ``size``, in strips."""
    low = torch.from_numpy(picture((max(1, size[0] * 2 // 3), max(1, size[1] * 2 // 3)))).permute(2, 0, 1)[None]
    return lambda: (Half().rows(low, size, span) for span in strips.spans(size[0], rows))


@pytest.fixture(scope="module", params=[RatedMei, RatedRpn])
def layer(request) -> PredictedLayer:
    return layer_of(request.param)


@pytest.mark.parametrize("kind", [RatedMei, RatedRpn])
def test_gradients_reach_every_network(kind):
    stage, x, level = RpnStage(**SMALL, entropy="hyperprior"), noise_pictures(3, 80)[:2], torch.tensor([2.0, 5.0])
    stage.residual = rated = rated_of(kind)
    y, layer_of = stage.difference(x, Half()(x[..., ::2, ::2], (80, 80)), level)
    y_hat, bits = rated.code(y, level, True)
    ((layer_of(y_hat) - x).square().sum() + bits.sum()).backward()
    idle = [name for name, value in rated.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


@pytest.mark.parametrize("kind", [RatedMei, RatedRpn])
def test_the_start_predicts(kind):
    """The codec starts as the base codec but for a fitted prediction, which takes most of the latent's energy away."""
    stage = RpnStage(**SMALL, entropy="hyperprior")
    stage.crops = noise_pictures(8, 64)
    linear_start(stage.base.codec, stage.crops)
    residual = kind(**SMALL, entropy="hyperprior")
    residual.load_state_dict(stage.base.state_dict(), strict=False)
    stage.begin(residual)
    x, level = noise_pictures(10, 64)[8:], torch.full((2,), 4.0)
    prediction = Half()(stage.lower(nn.functional.avg_pool2d(x, 2), level), (64, 64))
    stage.residual = residual
    with torch.no_grad():
        whole, rest = residual.codec.analysis(x - 0.5, level), stage.difference(x, prediction, level)[0]
    assert rest.square().sum() < 0.3 * whole.square().sum()


def test_uncertainty_is_learnt_first_and_then_guides_layers_below_others():
    torch.manual_seed(3)
    stage, plain = (kind(**SMALL, entropy="hyperprior") for kind in (UncertainRpnStage, RpnStage))
    linear_start(stage.base.codec, noise_pictures(4, 64))
    stage.residual = rated_of(RatedRpn)
    nn.init.normal_(stage.uncertainty[-1].weight)
    plain.base, plain.residual = stage.base, stage.residual
    stage.freeze()
    x, lam = noise_pictures(2, 96), torch.tensor([0.01, 0.05])

    def gradients(stage: RpnStage, progress: float, *factors: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        stage.progress = progress
        stage.zero_grad()
        stage(x, lam, level_of(lam, LAMBDAS).float(), factors)[0].backward()
        return {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}

    for progress, factors, differ in ((0.3, (2.0, 1.5), False), (0.7, (2.0,), False), (0.7, (2.0, 1.5), True)):
        found, expected = gradients(stage, progress, *factors), gradients(plain, progress, *factors)
        assert (found.keys() - expected.keys() != set()) == (progress < 0.5)
        assert differ == any((found[n] - g).norm() > 1e-3 * g.norm() for n, g in expected.items())


def test_uncertain_pixels_count_more_and_all_together_as_much():
    log_variance = torch.full((1, 1, 2, 2), -7.0)
    log_variance[..., 0] = -4.0
    x = torch.zeros(1, 3, 48, 48)
    assert weighted(log_variance)(x, x + 0.1).item() == pytest.approx(0.01)
    left, right = x.clone(), x.clone()
    left[..., :8], right[..., -8:] = 0.1, 0.1
    assert weighted(log_variance)(x, left) > 20 * weighted(log_variance)(x, right) > 0
    assert weighted(log_variance * 0)(x, left).item() == pytest.approx(0.01 / 6)


def test_the_likeliest_variance_is_that_of_the_errors():
    x, rec = torch.zeros(1, 3, 20, 31), torch.zeros(1, 3, 20, 31)
    rec[..., :16], rec[..., 16:] = 0.1, 0.02
    logs = torch.tensor([0.01, 0.01, 0.0004, 0.0004]).log().expand(1, 1, 3, 4)
    best = estimated(logs)(x, rec)
    for other in (logs - 0.2, logs + 0.2, logs.flip(-1)):
        assert estimated(other)(x, rec) > best


@pytest.mark.parametrize(
    ("low", "size"), [((1, 1), (1, 3)), ((9, 14), (9, 14)), ((20, 13), (37, 31)), ((5, 7), (40, 56))]
)
def test_rows_of_half_are_those_of_the_whole(low, size):
    x = torch.from_numpy(picture(low)).permute(2, 0, 1)[None]
    whole = Half()(x / 255, size)
    assert whole.shape == (1, 3, *size) and halved(whole).shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    for rows in (3, 8, 100):
        found = torch.cat([Half().rows(x, size, span) for span in strips.spans(size[0], rows)], 2)
        assert (found - whole).abs().max() < 1e-5


def test_at_factor_two_half_is_the_lower_layer():
    x = torch.from_numpy(picture((19, 30))).permute(2, 0, 1)[None] / 255
    assert (halved(Half()(x, (37, 60))) - x).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (70, 91)])
@pytest.mark.parametrize("quality", [1, 100])
def test_the_decoder_sees_what_the_encoder_saw(layer, size, quality):
    data, reconstruct = layer.encode(picture(size), below(size), quality)
    assert np.array_equal(layer.decode(data, size, below(size, 7)(), quality), reconstruct())


@pytest.mark.parametrize("cells", [4, 1024])
def test_strips_are_what_was_trained(layer, cells, monkeypatch):
    monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
    size, codec, networks = (75, 52), layer.networks.codec, layer.at(50)
    level = level_of(layer.lambda_of(50), LAMBDAS)[None].float()
    predicted, added = codec.predict(halved(torch.cat(list(below(size)()), 2) - 0.5), level)
    x = torch.from_numpy(picture(size)).permute(2, 0, 1)[None] / 255
    y = layer.analysis(networks, picture(size), layer.given(networks, below(size, 9)(), size))
    expected = codec.analysis(x - 0.5, level) - predicted
    assert y.shape == expected.shape and (y - expected).abs().max() < 1e-3 * expected.abs().max()
    shown = layer.reconstruct(networks, expected.round(), layer.given(networks, below(size, 9)(), size), size)
    whole = codec.synthesis(expected.round() + added, level, size) + 0.5
    wanted = (whole.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(shown - wanted).max() <= 1 and shown.std() > 10


@pytest.mark.parametrize("kind", [RatedMei, RatedRpn])
def test_symbols_do_not_depend_on_strips_threads_or_the_pixel_path(kind, monkeypatch):
    size, layer, other = (110, 90), layer_of(kind), layer_of(kind, precision=torch.bfloat16)
    data, _ = layer.encode(picture(size), below(size), 80)
    z, y = layer.parse(data, size)
    assert len(np.unique(y)) > 20
    for codec, cells, threads in ((layer, 14, 2), (other, 1024, 1)):
        monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
        check_symbols_with(threads, codec, data, size, z, y)


@pytest.mark.parametrize(
    ("kind", "model"), [(RatedMei, "hyperprior"), (RatedMei, FACTORIZED), (RatedRpn, "hyperprior")]
)
def test_garbage_gives_a_picture_or_one_error(kind, model):
    size, layer = (40, 56), layer_of(kind, model)
    data, _ = layer.encode(picture(size), below(size), 70)
    with pytest.raises(DamagedError):  # more escapes than symbols
        layer.decode(b"\xfe\xff\xff\x7f" + data, size, below(size)(), 70)
    check_garbage(data, 12, size, lambda broken: layer.decode(broken, size, below(size)(), 70))
