"""LIFF: the factored form against the paper's own, written out."""

import pytest
import torch
import torch.nn.functional as F

from compass_codec import liff as module
from compass_codec.liff import LIFF, SIZES, bicubic, bicubic_matrix


def coordinates(n: int) -> torch.Tensor:
    return -1 + (2 * torch.arange(n, dtype=torch.float64) + 1) / n


def nearest(low: int, high: int) -> torch.Tensor:
    """Index of the source sample nearest to each target sample; of two equally near, the later."""
    source = torch.tensor([[(2 * k + 1) * high for k in range(low)]])
    target = torch.tensor([[(2 * i + 1) * low] for i in range(high)])
    distance = (source - target).abs()
    return low - 1 - distance.flip(1).argmin(1)


def naive(liff: LIFF, low: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Section 3.2 of the paper as it stands: unfold, look up the nearest, make a filter for every pixel, apply it."""
    h, w = low.shape[-2:]
    unfolded = F.unfold(liff.extractor(low), 3, padding=1).reshape(1, -1, h, w)
    target_y, target_x = coordinates(size[0]), coordinates(size[1])
    rows, cols = nearest(h, size[0]), nearest(w, size[1])
    features = unfolded[:, :, rows][:, :, :, cols][0].permute(1, 2, 0)
    offset_y = ((target_y - coordinates(h)[rows]) * h).float()[:, None, None].expand(*size, 1)
    offset_x = ((target_x - coordinates(w)[cols]) * w).float()[None, :, None].expand(*size, 1)
    cell = torch.tensor([2 * h / size[0], 2 * w / size[1]]).expand(*size, 2)
    hidden = F.relu(liff.mlp_first(torch.cat([features, offset_y, offset_x, cell], -1)))
    for layer in liff.mlp_hidden:
        hidden = F.relu(layer(hidden))
    filters = liff.mlp_last(hidden).reshape(*size, -1, 3)
    out = torch.einsum("hwk,hwko->hwo", features, filters)
    return bicubic(low, size) + out.permute(2, 0, 1)[None]


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


def test_shipped_weights_too(codec):
    x = torch.rand(1, 3, 10, 12)
    with torch.inference_mode():
        torch.testing.assert_close(codec.liff(x, (16, 27)), naive(codec.liff, x, (16, 27)), atol=1e-5, rtol=0)


def test_tiles_change_nothing(liff, monkeypatch):
    x = torch.rand(1, 3, 62, 49)
    whole = liff(x, (131, 70))
    monkeypatch.setitem(module.STRIP_PIXELS, "cpu", 100)
    for tile in (1, 7, 40):
        monkeypatch.setitem(module.TILE, "cpu", tile)
        parts = [liff.rows(x, (131, 70), rows) for rows in ((0, 1), (1, 64), (64, 131))]
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


def test_bytes_as_well_as_floats(liff):
    x = torch.randint(0, 256, (1, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(liff.rows(x, (12, 13), (0, 12)), liff(x.float() / 255, (12, 13)))


@pytest.mark.parametrize(("low", "high"), [(5, 5), (7, 11), (3, 12), (1, 4), (40, 41)])
def test_bicubic_as_a_matrix(low, high):
    x = torch.rand(1, 1, low, low)
    weights = bicubic_matrix(low, high, (0, high), 0, low)
    torch.testing.assert_close(weights @ x @ weights.T, bicubic(x, (high, high)), atol=5e-6, rtol=0)


def test_untrained_is_bicubic():
    x = torch.rand(1, 3, 6, 6)
    liff = LIFF(**SIZES["small"] | {"channels": 8, "hidden": 8})
    torch.testing.assert_close(liff(x, (9, 13)), bicubic(x, (9, 13)), atol=5e-6, rtol=0)


def test_size_is_read_from_the_weights():
    sizes = {"channels": 8, "hidden": 12, "depth": 3, "growth": 4, "blocks": 2, "convs": 5}
    assert LIFF.dimensions(LIFF(**sizes).state_dict()) == sizes
