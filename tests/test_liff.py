"""LIFF: the factored form against the paper's own, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compass_codec.codec import shared
from compass_codec.networks import liff_rows
from compass_codec.networks.liff import LIFF, SIZES, bicubic, nearest
from compass_codec.networks.places import as_matrix, bicubic_taps


def naive(network: LIFF, low: Tensor, size: tuple[int, int]) -> Tensor:
    """Section 3.2 of the paper as it stands: unfold, look up the nearest, make a filter for every pixel, apply it.
    ``low`` [1, 3, h, w] in 0..1 to [1, 3, *size]. Bicubic interpolation is in float64, as PyTorch's positions in
    float32 are off by up to a ten-thousandth of a sample."""
    h, w = low.shape[-2:]
    unfolded = F.unfold(network.extractor(low), 3, padding=1).reshape(-1, h, w).permute(1, 2, 0)
    cell = torch.tensor([2 * h / size[0], 2 * w / size[1]])
    cols, dx = nearest(w, size[1], (0, size[1]))
    rows, dy = nearest(h, size[0], (0, size[0]))
    features = unfolded[rows][:, cols]
    offsets = torch.stack(torch.broadcast_tensors(dy[:, None], dx), -1)
    hidden = F.relu(network.mlp_first(torch.cat([features, offsets, cell.expand(*size, 2)], -1)))
    for layer in network.mlp_hidden:
        hidden = F.relu(layer(hidden))
    filters = network.mlp_last(hidden).reshape(*size, -1, 3)
    added = torch.einsum("hwk,hwko->ohw", features, filters)
    return bicubic(low.double(), size).float() + added[None]


def test_nearest_by_searching():
    """The index of the nearest source sample, of two equally near the later; offsets in -1..1 within a sample."""
    for low, high in ((5, 5), (7, 11), (3, 12), (1, 4), (40, 41)):
        source = torch.tensor([[(2 * k + 1) * high for k in range(low)]])
        target = torch.tensor([[(2 * i + 1) * low] for i in range(high)])
        expected = low - 1 - (source - target).abs().flip(1).argmin(1)
        index, offset = nearest(low, high, (0, high))
        assert torch.equal(index, expected)
        torch.testing.assert_close(offset, (target[:, 0] - source[0, expected]).float() / high)


@pytest.fixture(scope="module")
def liff() -> LIFF:
    torch.manual_seed(3)
    liff = LIFF(**SIZES["small"] | {"channels": 16, "hidden": 32})
    torch.nn.init.normal_(liff.mlp_last.weight, std=0.05)
    torch.nn.init.normal_(liff.mlp_last.bias, std=0.05)
    return liff.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((12, 9), (24, 18)),
        ((12, 9), (15, 11)),
        ((7, 13), (28, 52)),
        ((5, 6), (17, 9)),
        ((1, 1), (1, 2)),
        ((8, 8), (8, 8)),
    ],
)
def test_factored_equals_naive(liff, low, high):
    x = torch.rand(1, 3, *low)
    expected = naive(liff, x, high)
    assert (expected - bicubic(x, high)).abs().max() > 1e-3  # the network does contribute
    torch.testing.assert_close(liff(x, high), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def codec(in_float32):
    return shared("cpu", model="paper")


def test_shipped_weights_too(codec):
    x = torch.rand(1, 3, 10, 12)
    with torch.inference_mode():
        torch.testing.assert_close(codec.predictor(x, (16, 27)), naive(codec.predictor, x, (16, 27)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1.2, 2.0, 4.0])
def test_shipped_weights_in_a_larger_picture(codec, factor):
    """Far from the corner, where positions in float32 have lost digits: those here have not."""
    x, high = torch.rand(1, 3, round(20 / factor), round(384 / factor)), (20, 384)
    with torch.inference_mode():
        found, expected = codec.predictor(x, high), naive(codec.predictor, x, high)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if factor == 1.2:
        assert (bicubic(x, high) - bicubic(x.double(), high)).abs().max() > 1e-5


@pytest.mark.parametrize(("kind", "apart"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_fewer_digits(liff, kind, apart):
    x = torch.rand(1, 3, 12, 9)
    short = copy.deepcopy(liff).to(kind)(x, (19, 14))
    assert short.dtype == torch.float32
    difference = (short - liff(x, (19, 14))).abs().max()
    assert 0 < difference < apart
    # the skip stays in float32
    short = LIFF(**SIZES["small"] | {"channels": 8, "hidden": 8}).to(kind)
    torch.testing.assert_close(short(x, (19, 14)), bicubic(x, (19, 14)), atol=5e-6, rtol=0)


def test_tiles_change_nothing(liff, monkeypatch):
    x = torch.rand(1, 3, 62, 49)
    whole = liff(x, (131, 70))
    monkeypatch.setitem(liff_rows.STRIP_PIXELS, "cpu", 100)
    for tile in (1, 7, 40):
        monkeypatch.setitem(liff_rows.TILE, "cpu", tile)
        parts = [liff.rows(x, (131, 70), rows) for rows in ((0, 1), (1, 64), (64, 131))]
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


def test_bytes_as_well_as_floats(liff):
    x = torch.randint(0, 256, (1, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(liff.rows(x, (12, 13), (0, 12)), liff(x.float() / 255, (12, 13)))


@pytest.mark.parametrize(("low", "high"), [(5, 5), (7, 11), (3, 12), (1, 4), (40, 41)])
def test_bicubic_as_a_matrix(low, high):
    x = torch.rand(1, 1, low, low)
    weights = torch.from_numpy(as_matrix(bicubic_taps(low, high, (0, high)), 0, low))
    torch.testing.assert_close(weights @ x @ weights.T, bicubic(x, (high, high)), atol=5e-6, rtol=0)


def test_untrained_is_bicubic():
    x = torch.rand(1, 3, 6, 6)
    liff = LIFF(**SIZES["small"] | {"channels": 8, "hidden": 8})
    torch.testing.assert_close(liff(x, (9, 13)), bicubic(x, (9, 13)), atol=5e-6, rtol=0)


def test_size_is_read_from_the_weights():
    sizes = {"channels": 8, "hidden": 12, "depth": 3, "growth": 4, "blocks": 2, "convs": 5}
    assert liff_rows.dimensions(LIFF(**sizes).state_dict()) == sizes
