"""The transforms: layer-wise padding, GDN, gains, and the integer hyper-decoder."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import crop

from compass_codec.codec import shared
from compass_codec.entropy import SCALE_RANGE
from compass_codec.networks import mean_scale as networks
from compass_codec.networks.hyper import HyperDecoder
from compass_codec.networks.mean_scale import GDN, ImageCodec
from compass_codec.networks.mean_scale_numbers import (
    LAMBDAS,
    half,
    hyper_size,
    latent_size,
    quality_to_lambda,
    stages,
)
from compass_codec.networks.rates import gain, level_of


@pytest.fixture(scope="module")
def image_codec() -> ImageCodec:
    torch.manual_seed(1)
    return ImageCodec(n=8, m=12).eval()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 31), (33, 64), (65, 127)])
def test_any_size_survives(image_codec, size):
    level = torch.tensor([2.5])
    y = image_codec.analysis(torch.rand(1, 3, *size), level)
    z = image_codec.hyper_analysis(y)
    assert tuple(y.shape[-2:]) == latent_size(size) == stages(size, 4)[-1]
    assert tuple(z.shape[-2:]) == hyper_size(size)
    scales, means = image_codec.hyper_synthesis(z, tuple(y.shape[-2:]))
    assert scales.shape == means.shape == y.shape
    assert tuple(image_codec.synthesis(y, level, size).shape) == (1, 3, *size)


@pytest.mark.parametrize(("kind", "apart"), [(torch.float16, 1), (torch.bfloat16, 8)])
def test_fewer_digits_are_those_of_the_pixels_alone(image_codec, kind, apart):
    short, level, x = copy.deepcopy(image_codec), torch.tensor([2.5]), torch.rand(1, 3, 33, 20) - 0.5
    short.pixels_in(kind)
    for name, weight in short.state_dict().items():
        pixels = name.startswith(("g_a", "g_s")) and not name.endswith(("beta", "gamma"))
        assert weight.dtype == (kind if pixels else torch.float32), name
    y, expected = (codec.analysis(x, level) for codec in (short, image_codec))
    assert y.dtype == torch.float32 and 0 < (y - expected).abs().max() < apart * 2e-3 * expected.abs().max()
    out, expected = (codec.synthesis(y, level, (33, 20)) for codec in (short, image_codec))
    assert out.dtype == torch.float32 and 0 < (out - expected).abs().max() < apart * 5e-3 * expected.abs().max()
    assert torch.equal(short.hyper_analysis(y), image_codec.hyper_analysis(y))


def test_weights_say_how_many_channels_they_have():
    for sizes in ((8, 12), (6, 20)):
        codec = ImageCodec(*sizes)
        like = ImageCodec.like(codec.state_dict())
        assert {k: v.shape for k, v in like.state_dict().items()} == {k: v.shape for k, v in codec.state_dict().items()}
        assert (like.n, like.m) == sizes


def test_latent_of_odd_sides_is_the_ceiling():
    assert [half(n) for n in (1, 2, 3, 517)] == [1, 1, 2, 259]
    assert latent_size((517, 389)) == (33, 25)


def test_padding_replicates_the_edge(image_codec):
    """An odd picture codes as the even one with its last row repeated."""
    x = torch.rand(1, 3, 15, 16)
    longer = torch.cat([x, x[:, :, -1:]], 2)
    assert torch.equal(networks.descend(image_codec.g_a[:1], x), networks.descend(image_codec.g_a[:1], longer))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_compressais(inverse):
    Reference = pytest.importorskip("compressai.layers").GDN

    ours, theirs = GDN(6, inverse), Reference(6, inverse)
    with torch.no_grad():
        ours.beta.copy_(torch.rand(6) + 0.01)
        ours.gamma.copy_(torch.rand(6, 6) - 0.2)
        theirs.beta.copy_(ours.beta)
        theirs.gamma.copy_(ours.gamma)
    x, y = (torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    torch.testing.assert_close(ours(x), theirs(y))
    ours(x).pow(3).sum().backward()
    theirs(y).pow(3).sum().backward()
    for found, expected in (ours.gamma.grad, theirs.gamma.grad), (ours.beta.grad, theirs.beta.grad), (x.grad, y.grad):
        torch.testing.assert_close(found, expected)
    expected, x.grad = x.grad, None
    ours.requires_grad_(False)(x).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(y))


@pytest.mark.parametrize("autocast", [False, True])
def test_transposed_convolutions_and_their_gradients_are_pytorchs(autocast):
    ours = networks._up(6, 5)
    theirs = torch.nn.ConvTranspose2d(6, 5, 5, stride=2, padding=2, output_padding=1)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer in ours, theirs:
        x = torch.randn(2, 6, 7, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, autocast):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        out.float().pow(3).sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        found.append([out, x.grad, layer.weight.grad, layer.bias.grad])
    close = {"rtol": 2e-2, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_levels_and_qualities():
    torch.testing.assert_close(
        level_of(torch.tensor(LAMBDAS), LAMBDAS), torch.arange(6.0, dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert quality_to_lambda(1) == pytest.approx(LAMBDAS[0])
    assert quality_to_lambda(100) == pytest.approx(LAMBDAS[-1])
    assert 2 < float(level_of(0.01, LAMBDAS)) < 3


def test_gain_is_interpolated_geometrically():
    table = torch.tensor([[0.0], [2.0], [3.0], [3.0], [3.0], [5.0]])
    gains = gain(table, torch.tensor([0.0, 0.5, 1.0, 5.0])).flatten()
    torch.testing.assert_close(gains, torch.tensor([0.0, 1.0, 2.0, 5.0]).exp())


@pytest.fixture
def real(in_float32):
    """The parts of the base layer of the paper's set."""
    return shared("cpu", model="paper").base


class TestHyperDecoder:
    def symbols(self, batch: int = 1) -> torch.Tensor:
        torch.manual_seed(2)
        return (torch.randn(batch, 128, 3, 5) * 3).round()

    @pytest.mark.parametrize("level", [0.0, 5.0])
    def test_near_the_float_network(self, real, level):
        with torch.inference_mode():
            x = torch.from_numpy(np.array(crop(176, 288))).permute(2, 0, 1)[None] / 255
            y = real.networks.codec.analysis(x, torch.tensor([level]))
            z = real.networks.codec.hyper_analysis(y).round()
            index, means = real.networks.hyper(z, tuple(y.shape[2:]))
            scales, float_means = real.networks.codec.hyper_synthesis(z, tuple(y.shape[2:]))
        # what a mean that is off costs a Gaussian symbol, in bits
        lost = ((means - float_means) / scales.clamp_min(SCALE_RANGE[0])).square() / (2 * math.log(2))
        assert lost.mean() < 5e-6 and lost.max() < 1e-3
        expected = torch.bucketize(scales.double().contiguous(), real.networks.hyper.bounds / 2**12)
        assert (expected != index).double().mean() < 0.05
        assert (expected - index).abs().max() <= 1

    def test_threads_batch_and_layout_change_nothing(self, real):
        z = self.symbols(3)
        index, means = real.networks.hyper(z, (11, 18))
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for variant in (z[:1], z.contiguous(memory_format=torch.channels_last)[:1], z[:1].long()):
                    one, mean = real.networks.hyper(variant, (11, 18))
                    assert torch.equal(one, index[:1]) and torch.equal(mean, means[:1])
        finally:
            torch.set_num_threads(threads)

    def test_onednn_off_changes_nothing(self, real):
        z = self.symbols()
        index, means = real.networks.hyper(z, (9, 17))
        with torch.backends.mkldnn.flags(enabled=False):
            again, mean = real.networks.hyper(z, (9, 17))
        assert torch.equal(index, again) and torch.equal(means, mean)

    def test_everything_is_an_integer(self, real):
        assert all((b == b.round()).all() for b in real.networks.hyper.buffers())
        _, means = real.networks.hyper(self.symbols(), (12, 20))
        assert (means * 2**12 == (means * 2**12).round()).all()

    def test_absurd_symbols_stay_finite(self, real):
        index, means = real.networks.hyper(self.symbols() * 2**40, (12, 20))
        assert means.isfinite().all() and index.max() < 64

    def test_weights_too_large_for_exactness_are_refused(self):
        from compass_codec.errors import WeightsError

        bad = ImageCodec(n=8, m=12)
        with torch.no_grad():
            bad.h_s[0].weight.fill_(1e4)
        with pytest.raises(WeightsError):
            HyperDecoder(bad)
