"""The lean backbone as a codec: integer twins, strips, and layers to bytes and back. Small networks of random weights
are enough for that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from compass_codec import entropy
from compass_codec.backbones import lean as lean_codec
from compass_codec.backbones.lean import LatentLayer, LeanLayer, quality_to_lambda
from compass_codec.engines.torch_engine import TorchEngine, TorchExact, TorchLean
from compass_codec.errors import DamagedError
from compass_codec.networks import exact, strips
from compass_codec.networks.lean import LAMBDAS, LeanCodec, PlainBlock
from compass_codec.networks.numbers import MEAN_UNIT
from compass_codec.networks.rates import level_of
from compass_codec.training.density import FactorizedDensity
from compass_codec.training.exact import SCALE_STEP, integers
from compass_codec.training.export import z_table

SMALL = {"c8": 16, "c16": 24, "n8": 3, "n16": 2, "m": 16, "n": 8, "h": 16, "g": 16}


def check_symbols_with(threads: int, codec: LeanLayer, data: bytes, size: tuple[int, int], z, y) -> None:
    """Another codec with so many threads reads these symbols."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    again = codec.parse(data, size)
    torch.set_num_threads(before)
    assert np.array_equal(again[0], z) and np.array_equal(again[1], y)


def check_garbage(data: bytes, count: int, size: tuple[int, int], decode: Callable[[bytes], np.ndarray]) -> None:
    """Layers that are cut off, with a byte that is wrong, give a picture or one error."""
    rng = np.random.default_rng(3)
    for _ in range(count):
        broken = bytearray(data)
        broken[rng.integers(len(broken))] ^= int(rng.integers(1, 256))
        try:
            found = decode(bytes(broken[: rng.integers(1, len(data) + 1)]))
        except DamagedError:
            continue
        assert found.shape == (*size, 3)


@pytest.fixture(scope="module", params=[False, True], ids=["pixels", "latents"])
def layer(request) -> LeanLayer:
    return made(request.param)


def made(of_latents: bool, kind: torch.dtype = torch.float32) -> LeanLayer:
    torch.manual_seed(5)
    codec = LeanCodec(**SMALL)
    for name, parameter in codec.named_parameters():
        if not parameter.any():  # what starts at zero adds something here
            nn.init.normal_(parameter, std=0.1)
        if name in ("to_y.weight", "h_p.weight"):
            parameter.data.mul_(6)
    codec.requires_grad_(False).eval()
    latents = [codec.analysis(*inputs((64, 64), level)) for level in range(len(LAMBDAS))]
    y, lengths = entropy.gaussian_tables()
    tables = entropy.Tables(z_table(FactorizedDensity(codec.n)).numpy(), y, lengths, skipped=lean_codec.SKIPPED)
    engine = TorchEngine(torch.device("cpu"))
    exact = TorchExact(integers(codec, latents), codec.m, engine.device)
    networks = TorchLean(codec, exact, kind)
    return (LatentLayer if of_latents else LeanLayer)(networks, networks, tables, engine)


def inputs(size: tuple[int, int], level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred pictures and their level."""
    generator = torch.Generator().manual_seed(round(level))
    return torch.rand(2, 3, *size, generator=generator) - 0.5, torch.full((2,), float(level))


def picture(size: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(1)
    walk = rng.normal(size=(*size, 3)).cumsum(0) + rng.normal(size=(*size, 3)).cumsum(1)
    return (128 + 8 * walk).clip(0, 255).astype(np.uint8)


def known(size: tuple[int, int], rows: int = 10**6):
    """A prediction in strips."""
    plane = torch.from_numpy(picture(size)).permute(2, 0, 1)[None] / 510 + 0.25
    return lambda: (plane[:, :, a:b] for a, b in strips.spans(size[0], rows))


def test_sums_are_exact_in_any_order():
    torch.manual_seed(2)
    packed = exact.pack(torch.randn(5, 384, 1, 1), torch.randn(5), torch.rand(384) + 0.1, 0.3)
    conv = exact.Conv({f"a.{key}": value for key, value in packed.items()}, "a")
    x = torch.randint(-exact.ACTIVATION, exact.ACTIVATION + 1, (1, 384, 4, 4))
    sums = torch.einsum("oi,bihw->bohw", packed["weight"][..., 0, 0].long(), x) + packed["bias"].long()[:, None, None]
    assert sums.abs().max() < exact.EXACT
    assert torch.equal(conv(x.float()), (sums.float() * packed["scale"][:, None, None]).floor())
    assert torch.equal(conv(x.float(), slice(2, 4)), conv(x.float())[:, 2:4])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_packed_weights_are_near_the_real_ones_and_never_overflow(size):
    torch.manual_seed(3)
    weight, bias = size * torch.randn(8, 300, 1, 1), size * torch.randn(8)
    weight[0], weight[1, 0] = 0, 1000 * size  # an output that nothing leads to, and one that a single input leads
    unit_out = torch.full((8,), 0.05 * size)
    packed = exact.pack(weight, bias, 0.01, unit_out)
    conv = exact.Conv({f"a.{key}": value for key, value in packed.items()}, "a")
    x = torch.randint(-511, 512, (1, 300, 6, 6)).float()
    real = nn.functional.conv2d(x.double() * 0.01, weight.double(), bias.double())
    error = (conv(x) * 0.05 * size - real).abs().amax((0, 2, 3)) / real.abs().amax((0, 2, 3)).clamp(min=size)
    assert error.max() < 0.06


def test_weights_that_are_not_exact_are_refused():
    tensors = {"a.weight": torch.full((1, 300, 1, 1), 127, dtype=torch.int8)}
    tensors |= {"a.bias": torch.zeros(1, dtype=torch.int32), "a.scale": torch.ones(1)}
    with pytest.raises(ValueError, match="a: weights that are not exact"):
        exact.Conv(tensors, "a")


def steps_of(layer, features, y) -> list[np.ndarray]:
    """Scale indices and means [2, places] of each step, where the latents are ``y``, which changes."""
    steps: list[list[np.ndarray]] = [[]]

    def choose(index, means, own):
        steps[-1].append(np.stack([np.asarray(each, np.float32).ravel() for each in (index, means)]))
        return own - means

    layer.exact.walk(features, y, choose, lambda index, symbols: steps.append([]))
    return [np.concatenate(parts, 1) for parts in steps[:-1]]


def test_the_integer_twin_is_near_the_networks(layer):
    """Indices and means of all four steps, from the same z and the same known latents."""
    codec, found = layer.networks.codec, []
    y = codec.analysis(*inputs((128, 128), 4))[:1]
    z = codec.hyper_analysis(y).round()

    def symbols(step, log_scales, means, part):
        index = (log_scales - np.log(entropy.SCALE_RANGE[0])) / SCALE_STEP
        found.append((index.clamp(0, entropy.LEVELS - 1).flatten(), means.flatten()))
        return y[part]

    codec.walk(codec.hyper_synthesis(z, (8, 8)), symbols)
    twin = torch.from_numpy(np.concatenate(steps_of(layer, layer.exact.features(z, (8, 8)), y.clone()), 1))
    for parts, ours in zip(zip(*found, strict=True), twin, strict=True):
        real = torch.cat(parts)
        difference, spread = (real - ours).abs(), real.std()
        assert difference.mean() < 0.05 * spread + 0.3  # an index is a whole number


def test_strips_are_the_whole(layer, monkeypatch):
    """What is computed strip by strip is what the codec computes at once, up to float rounding."""
    size, codec, networks = (8 * 21 + 3, 52), layer.networks.codec, layer.at(60)
    level = level_of(layer.lambda_of(60), LAMBDAS)[None].float()
    x = torch.from_numpy(picture(size)).permute(2, 0, 1)[None] / 255
    below = torch.cat(list(known(size)()), 2)
    predicted = codec.analysis(below - 0.5, level)
    if isinstance(layer, LatentLayer):
        whole = codec.analysis(x - 0.5, level) - predicted
        expected = codec.synthesis(whole + predicted, level, size) + 0.5
    else:
        whole = codec.analysis(x - below, level)
        expected = codec.synthesis(whole, level, size) + below
    wanted = (expected.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    for cells in (4, 16, 1024):
        monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
        y = layer.analysis(networks, picture(size), layer.given(networks, known(size, 7)(), size))
        assert (y - whole).abs().max() < 1e-3 * predicted.abs().max()
        assert (layer.exact.z(whole, 0.02) - codec.hyper_analysis(whole)).abs().max() < 0.501
        shown = layer.reconstruct(networks, whole, layer.given(networks, known(size, 7)(), size), size)
        assert np.abs(shown - wanted).max() <= 1 and shown.std() > 10


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (16, 16), (17, 31), (70, 90)])
@pytest.mark.parametrize("quality", [1, 60, 100])
def test_the_decoder_sees_what_the_encoder_saw(layer, size, quality):
    data, reconstruct = layer.encode(picture(size), known(size), quality)
    kept, again = layer.encode(picture(size), known(size), quality, keep=True)
    seen = reconstruct()
    assert np.array_equal(layer.decode(data, size, known(size, 7)(), quality), seen)
    assert kept == data and np.array_equal(again(), seen)


def test_more_escapes_of_y_than_z_has_symbols(layer):
    """Pictures of noise can have them, where the networks expect smooth ones."""
    networks, size = layer.at(60), (33, 40)
    y = layer.analysis(networks, picture(size), layer.given(networks, known(size)(), size))
    with torch.inference_mode():
        y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * 20000
        data = layer.write(torch.zeros(1, *layer.exact.z_shape(*y.shape[2:])), y)
    assert len(data) > 2 * y.numel()
    assert np.array_equal(layer.parse(data, (33, 40))[1], (y[0] * MEAN_UNIT).int().numpy())


def test_symbols_do_not_depend_on_strips_threads_or_the_pixel_path(layer, monkeypatch):
    size = (150, 110)
    data, _ = layer.encode(picture(size), known(size), 80)
    z, y = layer.parse(data, size)
    assert z.dtype == y.dtype == np.int32 and z.shape == (8, 3, 2) and y.shape == (16, 10, 7)
    assert len(np.unique(y)) > 50
    other = made(isinstance(layer, LatentLayer), torch.bfloat16)
    for codec, cells, threads in ((layer, 4, 1), (layer, 14, 2), (other, 1024, 1)):
        monkeypatch.setitem(lean_codec.CELLS, "cpu", cells)
        check_symbols_with(threads, codec, data, size, z, y)


def test_strips_write_the_same_bytes(layer, monkeypatch):
    """Unless float rounding moves a latent over a threshold, which these do not."""
    size = (150, 110)
    data, _ = layer.encode(picture(size), known(size), 80)
    monkeypatch.setitem(lean_codec.CELLS, "cpu", 14)
    assert layer.encode(picture(size), known(size), 80)[0] == data


def test_almost_certain_zeros_are_not_coded():
    layer = made(False)
    index = torch.arange(entropy.LEVELS, dtype=torch.uint8)
    symbols = layer._quantise(torch.full((entropy.LEVELS,), 3.2), index, layer.thresholds)
    assert symbols.tolist() == [0] * lean_codec.SKIPPED + [3] * (entropy.LEVELS - lean_codec.SKIPPED)
    coder, empty = entropy.Encoder(layer.tables), entropy.Encoder(layer.tables)
    coder.y(index[: lean_codec.SKIPPED].numpy(), np.zeros(lean_codec.SKIPPED, np.int32))
    assert coder.data() == empty.data()


def test_garbage_gives_a_picture_or_one_error(layer):
    size, rng = (40, 56), np.random.default_rng(3)
    data, _ = layer.encode(picture(size), known(size), 70)
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(len(broken))] ^= int(rng.integers(1, 256))
        try:
            assert layer.decode(bytes(broken[: rng.integers(1, len(data) + 1)]), size, known(size)(), 70).shape == (
                *size,
                3,
            )
        except DamagedError:
            continue


def test_quality_spans_the_lambdas():
    assert quality_to_lambda(1) == pytest.approx(LAMBDAS[0])
    assert quality_to_lambda(60) == pytest.approx(0.013, rel=0.01)
    assert quality_to_lambda(100) == pytest.approx(LAMBDAS[-1], rel=0.01)


def test_blocks_in_integers():
    """A twin of one block, in units that are a thousandth of its activations, differs by about as little."""
    torch.manual_seed(4)
    block, unit = PlainBlock(12), 0.01
    nn.init.normal_(block.p2.weight, std=0.2)
    tensors = {}
    for name, layer in (("dw", block.dw), ("p1", block.p1), ("p2", block.p2)):
        packed = exact.pack(layer.weight.detach(), layer.bias.detach(), unit, unit)
        tensors |= {f"b.{name}.{key}": value for key, value in packed.items()}
    x = torch.randint(-150, 151, (1, 12, 9, 7)).float()
    twin = exact.Block(tensors, "b")(nn.functional.pad(x, (0, 0, 1, 1)))
    with torch.no_grad():
        assert (twin * unit - block(x * unit)).abs().max() < 0.1
