"""Symbols survive the range coder, and cost what their probabilities say."""

from contextlib import suppress

import numpy as np
import pytest

from compass_codec import contexts, entropy
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
    """What is grouped without positions, to save memory, is grouped alike."""
    z, y, index = symbols(1, 40, 50)
    data = entropy.encode(z, y.astype(np.int16), index.astype(np.uint8), tables)
    monkeypatch.setattr(entropy, "PIECE", 1000)
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


@pytest.fixture(scope="module")
def with_contexts(tables) -> entropy.Tables:
    """The first scale indices have them: the wider and the more lopsided the later the context."""
    y, lengths = entropy.gaussian_tables()
    levels = 20
    parts = []
    for table in tables.y[:levels]:
        n = np.arange(-table.width, table.width + 1)
        for context in range(contexts.COUNT):
            scale = 0.3 + context / 8
            pmf = np.exp(-np.abs(n) / scale) * np.where(n > 0, 1.0 + context % 4, 1.0)
            parts.append(entropy.frequencies(0.9999 * pmf / pmf.sum()))
    weights = np.random.default_rng(6).integers(-40, 40, (3, 5, 8)).astype(np.int8)
    return entropy.Tables(np.stack([t.freq for t in tables.z]), y, lengths, np.concatenate(parts), weights)


class TestContexts:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (7, 9), (40, 50)])
    def test_round_trip(self, with_contexts, shape):
        z, y, index = symbols(1, *shape)
        index %= 30  # some have contexts, some do not
        y[0, 0, 0] = 2**20
        kept = y.copy()
        got = read(entropy.encode(z, y, index, with_contexts), with_contexts, z, index)
        assert (got[0] == z).all() and (got[1] == kept).all() and (y == kept).all()

    def test_blocks_of_channels(self, with_contexts, monkeypatch):
        z, y, index = symbols(2, 8, 8)
        whole = entropy.encode(z, y, index, with_contexts)
        monkeypatch.setattr(entropy, "PIECE", 128)
        data = entropy.encode(z, y, index, with_contexts)
        assert data != whole and (read(data, with_contexts, z, index)[1] == y).all()

    def test_context_by_hand(self):
        """One symbol of the last phase, all around it known."""
        y = np.zeros((1, 3, 3), np.int32)
        y[0] = [[1, -2, 0], [0, 0, 3], [0, 1, -300]]
        weights = np.zeros((3, 1, 8), np.int32)
        weights[0] = [10, 0, 5, 0, 0, 0, 0, 1]
        around = contexts.Neighbourhood(np.full((1, 3, 3), 64, np.int32), weights)
        around.put(0, y[:, ::2, ::2])
        context, sign = around.look(1)
        # corners 1, 0, 0, 255 of 1 each expected: 16 * (64 * 256 + 32) // 288 = 912; 10 - 255 = -245 in units of 72
        assert (context, sign) == (7 * 4 + 3, -1)
        around.put(1, y[:, 1::2, 1::2])
        context, sign = around.look(2)
        # beside (0, 1): 1 and 0, below it 0 (each twice); 16 * (64 * 2 + 32) // (6 * 64 + 32) = 6
        assert (context[0, 0, 0], sign[0, 0, 0]) == (2 * 4, 1)

    def test_tables_that_do_not_fit(self, tables):
        y, lengths = entropy.gaussian_tables()
        with pytest.raises(ValueError, match="do not fit"):
            entropy.Tables(np.stack([t.freq for t in tables.z]), y, lengths, y[:100], np.zeros((3, 5, 8), np.int8))
        first = np.tile(tables.y[0].freq, contexts.COUNT)
        with pytest.raises(ValueError, match="do not fit"):
            entropy.Tables(np.stack([t.freq for t in tables.z]), y, lengths, first, np.zeros((3, 5, 4), np.int8))

    def test_garbage(self, with_contexts):
        rng = np.random.default_rng(4)
        z, _, index = symbols(5, 6, 6)
        index %= 30
        for _ in range(100):
            data = rng.integers(0, 256, rng.integers(0, 60)).astype(np.uint8).tobytes()
            with suppress(DamagedError):
                assert read(data, with_contexts, z, index)[1].shape == index.shape


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
