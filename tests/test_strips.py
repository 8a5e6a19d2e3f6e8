"""A picture in strips and tiles gives what it gives as a whole."""

import weakref

import numpy as np
import pytest
import torch
from conftest import crop

from compass_codec import container
from compass_codec.codec import Codec, shared
from compass_codec.networks import liff_rows, strips


@pytest.mark.parametrize(("length", "largest"), [(1, 5), (5, 5), (6, 5), (100, 7)])
def test_spans_cut_evenly(length, largest):
    found = strips.spans(length, largest)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == length
    sizes = [b - a for a, b in found]
    assert max(sizes) <= largest and max(sizes) - min(sizes) <= 1


def test_rows_are_taken_in_any_numbers():
    x = torch.arange(20.0).reshape(1, 1, 10, 2)
    rows = strips.Rows(iter([x[:, :, :3], x[:, :, 3:9], x[:, :, 9:]]))
    assert torch.equal(torch.cat([rows.take(n) for n in (1, 1, 5, 3)], 2), x)


@pytest.mark.parametrize("height", [16, 17, 64, 97])
@pytest.mark.parametrize("pieces", [(16,), (5, 40), (1,)])
def test_a_network_in_strips(height, pieces):
    """Two convolutions of stride 2 and back, over strips that come in odd numbers of rows."""
    torch.manual_seed(1)
    down = torch.nn.Sequential(*(torch.nn.Conv2d(3 if i == 0 else 4, 4, 5, 2, 2) for i in range(2)))
    x = torch.rand(1, 3, height + -height % 4, 20)
    whole = down(x)
    cuts, at = [], 0
    while at < x.shape[2]:
        step = pieces[len(cuts) % len(pieces)]
        cuts.append(x[:, :, at : at + step])
        at += step
    network = strips.Network(lambda part, size: down(part), 4, 1, 2, tile=2, height=3)
    parts = list(strips.run(network, cuts, x.shape[2], tuple(whole.shape[2:])))
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_what_is_computed_at_once_does_not_depend_on_how_the_input_comes(rows):
    seen = []

    def apply(part, size):
        seen.append((part[0, 0, :, 0].tolist(), size))
        return part

    x = torch.arange(27.0).reshape(1, 1, 27, 1)
    cuts = [x[:, :, at : at + rows] for at in range(0, 27, rows)]
    parts = list(strips.run(strips.Network(apply, 1, 1, 2, tile=9, height=7), cuts, 27, (27, 1)))
    assert torch.equal(torch.cat(parts, 2), x)
    ends = [(0, 8), (4, 15), (11, 22), (18, 27)]  # four strips of six or seven rows, and two more on either side
    assert seen == [([float(i) for i in range(a, b)], (b - a, 1)) for a, b in ends]


def test_a_fork_keeps_only_what_is_still_to_be_taken():
    alive = weakref.WeakSet()

    def source():
        for i in range(80):
            x = torch.tensor(i)
            alive.add(x)
            yield x
            del x

    first, second = strips.fork(source())
    for i in range(80):
        assert next(first) == i
        if i >= 3:
            assert next(second) == i - 3
        assert len(alive) <= 5
    assert [int(x) for x in second] == [77, 78, 79] and list(first) == []


def small_strips(monkeypatch) -> Codec:
    """A codec that cuts even a small picture into many tiles."""
    for table in (strips.STRIP, strips.TILE):
        monkeypatch.setitem(table, "cpu", 64)
    monkeypatch.setitem(liff_rows.TILE, "cpu", 40)
    return Codec.load("cpu", model="paper")


@pytest.fixture(scope="module")
def codec(in_float32):
    """Of the networks that are computed in tiles."""
    return shared("cpu", model="paper")


@pytest.mark.parametrize("size", [(130, 201), (257, 75)])
def test_the_codec_in_tiles(codec, monkeypatch, size):
    """The same bytes, and the same pixels but for the last digit of a float here and there."""
    image, scales = crop(*size), [1, 1.7, 3.1]
    whole = codec.encode(image, scales, 60)
    tiled = small_strips(monkeypatch)
    again = tiled.encode(image, scales, 60)
    assert again.data == whole.data
    header = container.read_header(again.data)
    for mine, theirs, seen in zip(again.layers, whole.layers, tiled.decode_layers(again.data, header, 2), strict=True):
        assert np.array_equal(mine, seen)
        difference = np.abs(mine.astype(int) - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_memory_follows_the_strip_and_not_the_height(codec, monkeypatch):
    """No network ever sees more rows than a strip and what lies around it."""
    tiled = small_strips(monkeypatch)
    seen = []
    for layer in (tiled.base, tiled.residual):
        exact = layer.networks.codec.synthesis

        def synthesis(y, level, size, exact=exact):
            seen.append(size)
            return exact(y, level, size)

        monkeypatch.setattr(layer.networks.codec, "synthesis", synthesis)
    tiled.encode(crop(90, 600), [1, 2], 60)
    assert len(seen) > 12 and max(max(size) for size in seen) <= 64 + 2 * 2 * 16
