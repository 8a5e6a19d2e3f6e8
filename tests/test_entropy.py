"""Symbols survive the range coder, and cost what their probabilities say."""

import numpy as np
import pytest

from compass_codec import entropy
from compass_codec.errors import CompassError, DamagedError

CHANNELS = 3


@pytest.fixture(scope="module")
def tables() -> entropy.Tables:
    y, lengths = entropy.gaussian_tables()
    n = np.arange(-4, 5)
    pmf = np.stack([np.exp(-np.abs(n) / s) / np.exp(-np.abs(n) / s).sum() * 0.999 for s in (0.5, 1, 2)])
    return entropy.Tables(np.stack([entropy.frequencies(p) for p in pmf]), y, lengths)


def symbols(seed: int, h: int, w: int):
    rng = np.random.default_rng(seed)
    index = rng.integers(0, entropy.LEVELS, (5, h, w))
    y = np.rint(rng.normal(size=index.shape) * entropy.scale_levels()[index]).astype(np.int64)
    z = np.rint(rng.laplace(size=(CHANNELS, 2, 3))).astype(np.int64)
    return z, y, index


def read(data, tables, z, index):
    decoder = entropy.Decoder(data, tables, z[0].size, index.size)
    return decoder.z(*z.shape), decoder.y(index)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (40, 50)])
def test_round_trip(tables, shape):
    z, y, index = symbols(1, *shape)
    got = read(entropy.encode(z, y, index, tables), tables, z, index)
    assert (got[0] == z).all() and (got[1] == y).all()


def test_large_layers_give_the_same_bytes(tables, monkeypatch):
    """What is sorted and coded in pieces comes in the same order."""
    z, y, index = symbols(1, 40, 50)
    data = entropy.encode(z, y.astype(np.int16), index.astype(np.uint8), tables)
    monkeypatch.setattr(entropy, "PIECE", 300)
    assert entropy.encode(z, y, index, tables) == data
    assert (read(data, tables, z, index)[1] == y).all()


def test_escapes(tables):
    z, y, index = symbols(2, 4, 4)
    z[0, 0, 0], z[2, 1, 2], y[0, 0, 0], y[4, 3, 3] = 1000, -(2**20), 2**20, -5000
    got = read(entropy.encode(z, y, index, tables), tables, z, index)
    assert (got[0] == z).all() and (got[1] == y).all()


def test_rate_is_the_entropy(tables):
    rng = np.random.default_rng(3)
    index = rng.integers(0, entropy.LEVELS, (8, 64, 64))
    y = np.rint(rng.normal(size=index.shape) * entropy.scale_levels()[index]).astype(np.int64)
    z = np.zeros((CHANNELS, 1, 1), np.int64)
    ideal = 0.0
    for i, table in enumerate(tables.y):
        part = y[index == i] + table.width
        ideal += (entropy.PRECISION - np.log2(table.freq[part.clip(0, 2 * table.width + 1)])).sum()
    assert 8 * len(entropy.encode(z, y, index, tables)) == pytest.approx(ideal, rel=1e-3)


def test_tables_are_whole_and_near_the_normal_distribution():
    y, lengths = entropy.gaussian_tables()
    for freq, scale in zip(np.split(y, np.cumsum(lengths)[:-1]), entropy.scale_levels(), strict=True):
        assert freq.min() >= 1 and freq.sum() == 2**entropy.PRECISION
        width = len(freq) // 2 - 1
        n = np.arange(-width, width + 1)
        p = freq[:-1] / 2**entropy.PRECISION
        assert (p * n).sum() == pytest.approx(0, abs=1e-3)
        if scale > 1:
            assert (p * n * n).sum() == pytest.approx(scale**2 + 1 / 12, rel=2e-3)


def test_coder_keeps_integer_frequencies():
    """The bits of many equal symbols tell the coder's own probability."""
    from constriction import stream

    freq = np.array([2**24 - 1007, 1000, 7], np.int32)
    for symbol, f in enumerate(freq):
        encoder = stream.queue.RangeEncoder()
        encoder.encode(np.full(50_000, symbol, np.int32), entropy.Table(freq).model)
        assert encoder.num_bits() / 50_000 == pytest.approx(24 - np.log2(f), abs=0.002)


def test_too_few_bytes_for_the_size(tables):
    """No honest stream is refused, not even the cheapest; a forged size is."""
    index = np.zeros((5, 300, 300), np.int64)
    z = np.zeros((CHANNELS, 60, 60), np.int64)
    data = entropy.encode(z, np.zeros_like(index), index, tables)
    assert tables.least_bytes(3600, index.size) <= len(data) < tables.least_bytes(3600, index.size) + 40
    assert (read(data, tables, z, index)[0] == z).all()
    with pytest.raises(DamagedError, match="too short"):
        entropy.Decoder(data, tables, 4000, index.size)


def test_garbage_gives_symbols_or_one_error(tables):
    rng = np.random.default_rng(4)
    z, y, index = symbols(5, 6, 6)
    for _ in range(200):
        data = rng.integers(0, 256, rng.integers(0, 60)).astype(np.uint8).tobytes()
        try:
            got = read(data, tables, z, index)
            assert got[0].shape == z.shape and got[1].shape == y.shape
        except CompassError:
            pass
