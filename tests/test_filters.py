"""The filter of a layer: its arithmetic, its bytes, how it is found, and what it does in a file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import crop

from compass_codec import container, filters
from compass_codec.errors import FormatError
from compass_codec.filters import BITS, BOUNDS, TAPS, WIDER, Filter
from compass_codec.networks import quality_to_lambda
from compass_codec.pictures import squared_error
from compass_codec.side import MAX_FILTER, Side


def drawn(mask: int, taps: int, colour: bool, seed: int = 0, largest: int = 200) -> Filter:
    rng = np.random.default_rng(seed)
    weights = np.zeros((BOUNDS, len(TAPS)), np.int32)
    for k in range(BOUNDS):
        if mask >> k & 1:
            weights[k, :taps] = rng.integers(-largest, largest, taps) | 1
    mixed = rng.integers(-largest, largest, (3, 4)) | 1 if colour else np.zeros((3, 4))
    return Filter(int(rng.integers(1, 255 // WIDER + 1)), weights, mixed.astype(np.int32))


def plainly(found: Filter, layer: np.ndarray) -> np.ndarray:
    """What docs/format.md says, one sample at a time."""
    h, w, _ = layer.shape
    done = np.empty_like(layer)

    def at(row: int, column: int, channel: int) -> int:
        return int(layer[min(max(row, 0), h - 1), min(max(column, 0), w - 1), channel])

    for row, column, channel in itertools.product(range(h), range(w), range(3)):
        here = at(row, column, channel)
        total = (here << BITS) + (1 << BITS - 1)
        for k, limit in enumerate((found.bound, WIDER * found.bound, 255)):
            for (down, right), weight in zip(TAPS, found.weights[k].tolist(), strict=True):
                for sign in (1, -1):
                    step = at(row + sign * down, column + sign * right, channel) - here
                    total += weight * min(max(step, -limit), limit)
        for other in range(3):
            total += int(found.colour[channel, other]) * (at(row, column, other) - 128)
        total += 64 * int(found.colour[channel, 3])
        done[row, column, channel] = min(max(total >> BITS, 0), 255)
    return done


def noisy(size: tuple[int, int] = (150, 200), seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A picture of edges, and what a poor codec makes of it: noise, and less colour."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    picture = np.stack([120 + 90 * ((rows // 23 + columns // 31 + c) % 2) - columns / 4 for c in range(3)], 2)
    grey = picture.mean(2, keepdims=True)
    spoilt = grey + 0.9 * (picture - grey) - 3 + rng.normal(0, 6, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), np.clip(spoilt, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (9, 8)])
def test_arithmetic_is_as_described(size, monkeypatch):
    monkeypatch.setattr(filters, "BLOCK", (4, 5))  # so that blocks meet inside
    layer = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    for seed, (mask, taps, colour) in enumerate(filters.choices()):
        found = drawn(mask, taps, colour, seed)
        assert np.array_equal(filters.apply(found, layer), plainly(found, layer))


def test_nothing_overflows():
    layer = np.random.default_rng(3).choice(np.array([0, 255], np.uint8), (12, 12, 3))
    for weight in (-filters.LARGEST, filters.LARGEST):
        found = Filter(51, np.full((BOUNDS, len(TAPS)), weight, np.int32), np.full((3, 4), weight, np.int32))
        assert np.array_equal(filters.apply(found, layer), plainly(found, layer))
        assert_same(filters.from_bytes(filters.to_bytes(found)), found)


def assert_same(a: Filter, b: Filter) -> None:
    assert np.array_equal(a.weights, b.weights) and np.array_equal(a.colour, b.colour)
    assert a.bound == b.bound or not a.weights[:2].any()


def test_bytes_round_trip():
    choices = list(filters.choices())
    assert len(choices) == 29
    for choice, largest in itertools.product(choices, (2, 40, filters.LARGEST)):
        found = drawn(*choice, largest=largest)
        assert_same(filters.from_bytes(filters.to_bytes(found)), found)


GOOD = filters.to_bytes(drawn(1, 4, False, largest=9))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:1],
        GOOD[:2],
        GOOD[:-1],  # cut off inside a weight
        GOOD + b"\0",  # more than its weights take
        bytes([GOOD[0] | 32]) + GOOD[1:],  # a bit that is not known
        b"\0" + GOOD[1:],  # nothing in it
        b"\x08" + GOOD[1:],  # many taps, no bounds
        GOOD[:1] + b"\0" + GOOD[2:],  # a bound of nothing
        GOOD[:1] + bytes([255 // WIDER + 1]) + GOOD[2:],
        b"\x04\x0b" + b"\xff" * 20,  # no end
        b"\x04\x0b\xff\xff\xff\xff\xff\xff\xff",  # too large
        b"\x04\x00\x01",  # four zeros, and padding that is not zero
    ],
)
def test_no_filter(data):
    with pytest.raises(FormatError, match="filter makes no sense"):
        filters.from_bytes(data)


def test_any_bytes_are_a_filter_or_refused():
    rng, read = np.random.default_rng(4), 0
    layer = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    for mask, taps, colour in list(filters.choices()) * 5:
        data = bytearray(filters.to_bytes(drawn(mask, taps, colour, read)))
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            found = filters.from_bytes(bytes(data))
        except FormatError:
            continue
        read += 1
        assert np.array_equal(filters.apply(found, layer), plainly(found, layer))
    assert 20 < read < 120


def test_equations_are_exact(monkeypatch):
    """So that neither the number of threads nor the order of blocks changes a file."""
    monkeypatch.setattr(filters, "PROBE", (16, 24))
    monkeypatch.setattr(filters, "PROBES", 4)
    picture, layer = noisy((61, 83))
    equations = filters.Equations(picture, layer)
    assert np.array_equal(equations.products, equations.products.round())
    other = filters.Equations(picture[:, ::-1].copy(), layer[:, ::-1].copy())
    assert equations.scale > 1 and not np.array_equal(other.products, equations.products)
    monkeypatch.setattr(filters, "PROBES", 100)
    whole = filters.Equations(picture, layer)
    monkeypatch.setattr(filters, "PROBE", (64, 128))
    assert np.array_equal(whole.products, filters.Equations(picture, layer).products) and whole.scale == 1


@pytest.mark.parametrize("columns", range(1, 14))
def test_probes_are_all_over_a_large_layer(columns):
    layer = np.empty((96 * filters.PROBE[0], columns * filters.PROBE[1], 3), np.uint8)
    parts = filters.probes(layer)
    assert len(parts) == filters.PROBES == len({(rows.start, cut.start) for rows, cut in parts})
    assert {cut.start for _, cut in parts} == set(range(0, layer.shape[1], filters.PROBE[1]))
    quarters = {4 * rows.start // len(layer) for rows, _ in parts}
    assert quarters == {0, 1, 2, 3}
    assert parts == filters.probes(layer)


def test_what_is_found_is_what_was_predicted():
    picture, layer = noisy()
    price = quality_to_lambda(60) / 3
    data, filtered = filters.find(picture, layer, price)
    before, after = squared_error(picture, layer), squared_error(picture, filtered)
    assert after < 0.3 * before and len(data) < 80
    found = filters.from_bytes(data)
    assert np.array_equal(filters.apply(found, layer), filtered)
    _, saved = filters.Equations(picture, layer).solve(7, 12, True)
    # rounding to 8 bits, twice, and clipping are not in the equations
    assert abs(before - after - saved) < 0.1 * before + picture.size / 12
    # weights are the best: to change one is no gain
    for k, tap in ((0, 0), (1, 5)):
        other = found.weights.copy()
        other[k, tap] += 24
        worse = filters.apply(Filter(found.bound, other, found.colour), layer)
        assert squared_error(picture, worse) > after


def test_as_many_weights_as_pay():
    picture, layer = noisy((40, 50))
    lengths = [len(found[0]) if found else 0 for found in (filters.find(picture, layer, p) for p in (1e-9, 0.003, 1))]
    assert lengths[0] == 0 < lengths[1] < lengths[2]
    assert filters.find(picture, picture, 1.0) is None


def test_in_a_file(codec):
    from compass_codec import pictures

    layers = pictures.pyramid(crop(300, 300), [(150, 150), (300, 300)])
    picture = layers[1]
    encoded = codec.encode_layers(layers, [1, 2], 60)
    header = container.read_header(encoded.data)
    assert all(0 < len(entry.side.filter) <= MAX_FILTER for entry in header.layers)
    decoded = list(codec.decode_layers(encoded.data, header, 1))
    assert all(np.array_equal(a, b) for a, b in zip(decoded, encoded.layers, strict=True))
    # the same file without the filter of its last layer
    sides = [header.layers[0].side, replace(header.layers[1].side, filter=b"")]
    parts = [container.payload(header, encoded.data, k) for k in range(2)]
    bare = container.write(codec.model, [(150, 150), (300, 300)], [1, 2], [60, 60], parts, sides=sides)
    *_, plain = codec.decode_layers(bare, container.read_header(bare), 1)
    filtered = filters.apply(filters.from_bytes(header.layers[1].side.filter), plain)
    assert np.array_equal(filtered, decoded[1])
    saved = quality_to_lambda(60) / 3 * (squared_error(picture, plain) - squared_error(picture, filtered))
    assert saved > header.layers[1].side.bits - sides[1].bits


def test_cost_is_that_of_the_file(codec):
    picture = np.array(crop(160, 128))
    coded = codec.encode_layer(picture, None, 80)
    assert coded.side.filter
    error = quality_to_lambda(80) / 3 * squared_error(picture, coded.seen)
    assert coded.cost == pytest.approx(8 * len(coded.data) + coded.side.bits + error)
    file, plain = (
        container.write(codec.model, [(160, 128)], [1], [80], [coded.data], sides=[side])
        for side in (coded.side, Side())
    )
    assert 8 * (len(file) - len(plain)) == coded.side.bits + 16


def test_a_filter_that_makes_no_sense_is_one_error(codec):
    coded = codec.encode_layer(np.array(crop(64, 64)), None, 60)
    side = Side(filter=b"\x20\x00")
    file = container.write(codec.model, [(64, 64)], [1], [60], [coded.data], sides=[side])
    with pytest.raises(FormatError, match="filter makes no sense"):
        codec.decode(file)
