"""Search in the encoder: never worse, always the same, and nothing that a decoder would notice."""

import json
import math
import time

import numpy as np
import pytest
import torch
from conftest import compass, crop

from compass_codec import container, entropy, search
from compass_codec.errors import OptionError
from compass_codec.networks import quality_to_lambda


def layers_of(*widths: int) -> list[np.ndarray]:
    image = crop(widths[-1], widths[-1] * 3 // 4)
    return [np.array(image.resize((w, w * 3 // 4))) for w in widths]


def costs(encoded, layers, quality) -> float:
    """R + lambda * 255^2 * MSE from the file alone, summed over the pixels of its layers."""
    header, total = container.read_header(encoded.data), 0.0
    for k, (picture, seen) in enumerate(zip(layers, encoded.layers, strict=True)):
        mse = float(np.square(picture / 255 - seen / 255).mean())
        size = 8 * len(container.payload(header, encoded.data, k))
        total += size + quality_to_lambda(quality) * 255**2 * mse * picture.shape[0] * picture.shape[1]
    return total


@pytest.mark.parametrize("widths", [(64,), (24, 64)])
@pytest.mark.parametrize("quality", [1, 60, 100])
def test_more_effort_never_costs_more(codec, widths, quality):
    layers = layers_of(*widths)
    found = [codec.encode_layers(layers, list(widths), quality, effort) for effort in (0, 1, 3, 5)]
    values = [costs(f, layers, quality) for f in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.995 * values[0]


def test_effort_0_is_no_search(codec, monkeypatch):
    layers = layers_of(24, 64)
    plain = codec.encode_layers(layers, [1, 2], 60)
    monkeypatch.setattr(search, "improve", None)
    assert codec.encode_layers(layers, [1, 2], 60, effort=0).data == plain.data
    with pytest.raises(OptionError, match="0 to 9"):
        codec.encode_layers(layers, [1, 2], 60, effort=10)


def test_same_bytes_again_whatever_was_drawn_before(codec):
    layers = layers_of(24, 50)
    once = codec.encode_layers(layers, [1, 2], 60, 5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert codec.encode_layers(layers, [1, 2], 60, 5).data == once.data
    assert (torch.get_rng_state() == before).all()


def test_the_ordinary_decoder_sees_what_the_search_saw(codec):
    layers = layers_of(20, 33, 70)
    encoded = codec.encode_layers(layers, [1, 1.6, 3.4], 80, 3)
    header = container.read_header(encoded.data)
    for seen, decoded in zip(encoded.layers, codec.decode_layers(encoded.data, header, 2), strict=True):
        assert (seen == decoded).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 16)])
def test_smallest_pictures(codec, size):
    layers = [np.array(crop(size[1], size[0]))]
    plain, found = (codec.encode_layers(layers, [1], 60, effort) for effort in (0, 2))
    assert costs(found, layers, 60) <= costs(plain, layers, 60)


def test_time_budget(codec, monkeypatch):
    layers = layers_of(96)
    started = time.monotonic()
    codec.encode_layers(layers, [1], 60)
    plain = time.monotonic() - started
    heard: list[int] = []
    started = time.monotonic()
    cut = codec.encode_layers(layers, [1], 60, 9, 1.0, lambda effort, gain: heard.append(effort))
    # a plain encode and one step may be under way when the time is up
    assert time.monotonic() - started < 1.0 + 5 * plain + 2
    assert heard != list(range(1, 10))
    assert costs(cut, layers, 60) <= costs(codec.encode_layers(layers, [1], 60), layers, 60)
    none = codec.encode_layers(layers, [1], 60, 9, 1e-9)
    assert none.data == codec.encode_layers(layers, [1], 60).data


def test_tiles_bound_what_is_computed_at_once(codec, monkeypatch):
    monkeypatch.setattr(search, "TILE", 3)
    largest: list[int] = []
    cut = search.Tile.cut

    def watch(*arguments):
        tile = cut(*arguments)
        largest.append(tile.picture.shape[2] * tile.picture.shape[3])
        return tile

    monkeypatch.setattr(search.Tile, "cut", watch)
    layers = layers_of(300)
    plain, found = (codec.encode_layers(layers, [1], 60, effort) for effort in (0, 1))
    cells = (math.ceil(300 / 16), math.ceil(225 / 16))
    assert len(largest) == math.ceil(cells[0] / 3) * math.ceil(cells[1] / 3)
    assert max(largest) <= (16 * (3 + 4 * search.REACH)) ** 2
    assert costs(found, layers, 60) < 0.995 * costs(plain, layers, 60)


def test_what_a_tile_counts_is_what_it_changes(codec):
    """A core's symbols show in no pixel that its tile leaves out, and the tile's pixels are those of the whole."""
    layer = codec.base
    size, level = (208, 224), layer.level(60)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(-3, 4, (192, 13, 14), generator=generator, dtype=torch.int32).numpy()
    index, means = np.zeros(y.shape, np.uint8), torch.zeros(1, *y.shape)
    picture, flat = np.zeros((*size, 3), np.uint8), torch.zeros(1, 3, *size)
    tile = search.Tile.cut((5, 7, 6, 9), y, index, means, picture, flat)

    def pixels(symbols: np.ndarray) -> torch.Tensor:
        return layer.codec.synthesis(torch.from_numpy(symbols[None]).float(), level, size)

    with torch.inference_mode():
        own = layer.codec.synthesis(tile.symbols.float(), level, tile.size)[tile.pixels]
        rows, columns = slice(16 * 3, 16 * 9), slice(16 * 4, 16 * 11)
        assert torch.allclose(own, pixels(y)[:, :, rows, columns], atol=1e-5)
        moved = y.copy()
        moved[:, 5:7, 6:9] += 1
        change = (pixels(moved) - pixels(y)).abs()
        change[:, :, rows, columns] = 0
        assert change.max() < 1e-5
    assert (tile.symbols[tile.core][0].numpy() == y[:, 5:7, 6:9]).all()


def test_bits_are_those_of_the_coder(codec):
    """A million equal symbols take what the table says."""
    tables = codec.base.tables
    bits = search.table_bits(tables.y)
    reach = bits.shape[1] // 2
    for row, symbol in ((10, 0), (30, 1), (50, -20)):
        y = np.full((192, 30, 30), symbol, np.int32)
        z = np.zeros((128, 1, 1), np.int32)
        short, long = (len(entropy.encode(z, y[:n], np.full(y[:n].shape, row, np.uint8), tables)) for n in (1, 192))
        assert 8 * (long - short) == pytest.approx(191 * 900 * float(bits[row, symbol + reach]), rel=1e-3, abs=64)


def test_command(tmp_path):
    source = tmp_path / "a.png"
    crop(48, 40).save(source)
    sizes = []
    for effort in (0, 3):
        target = tmp_path / f"{effort}.cmps"
        done = compass("encode", source, "-s", "1,2", "--effort", effort, "--verify", "--json", "-o", target)
        assert done.code == 0, done.err
        sizes.append(json.loads(done.out)["size"])
        assert sizes[-1] == target.stat().st_size
    assert (tmp_path / "0.cmps").read_bytes() != (tmp_path / "3.cmps").read_bytes()
    assert compass("encode", source, "-s", "1", "--effort", 10).code == 2
    assert compass("encode", source, "-s", "1", "--time-budget", 3).code == 2
    assert compass("encode", source, "-s", "1", "--time-budget", 3, "--effort", 1, "--target-bpp", 1).code == 2
