"""Search in the encoder: never worse, always the same, and nothing that a decoder would notice."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import compass, crop

from compass_codec import container, entropy, search
from compass_codec.codec import shared
from compass_codec.errors import OptionError
from compass_codec.measure import effort as efforts
from compass_codec.networks.mean_scale import quality_to_lambda


def layers_of(*widths: int) -> list[np.ndarray]:
    image = crop(widths[-1], widths[-1] * 3 // 4)
    return [np.array(image.resize((w, w * 3 // 4))) for w in widths]


@pytest.fixture(scope="module")
def codec(in_float32):
    """Of the set that can be searched."""
    return shared("cpu", model="paper")


def costs(encoded, layers, quality) -> float:
    """R + lambda * 255^2 * MSE from the file alone, summed over the pixels of its layers."""
    header, total = container.read_header(encoded.data), 0.0
    for k, (picture, seen) in enumerate(zip(layers, encoded.layers, strict=True)):
        mse = float(np.square(picture / 255 - seen / 255).mean())
        size = 8 * len(container.payload(header, encoded.data, k))
        total += size + quality_to_lambda(quality) * 255**2 * mse * picture.shape[0] * picture.shape[1]
    return total


def parts(data: bytes) -> list[bytes]:
    header = container.read_header(data)
    return [container.payload(header, data, k) for k in range(len(header.layers))]


@pytest.mark.parametrize(("widths", "quality"), [((64,), 60), ((24, 64), 1), ((24, 64), 100)])
def test_more_effort_never_costs_more(codec, widths, quality):
    layers = layers_of(*widths)
    found = [codec.encode_layers(layers, list(widths), quality, effort) for effort in (0, 1, 2)]
    values = [costs(f, layers, quality) for f in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.995 * values[0]  # where sums are added up in another order the search ends elsewhere


def test_effort_0_is_no_search(codec, monkeypatch):
    layers = layers_of(24, 64)
    plain = codec.encode_layers(layers, [1, 2], 60)
    monkeypatch.setattr(search, "improve", None)
    assert codec.encode_layers(layers, [1, 2], 60, effort=0).data == plain.data
    with pytest.raises(OptionError, match="0 to 9"):
        codec.encode_layers(layers, [1, 2], 60, effort=10)


def test_same_bytes_again_whatever_was_drawn_before(codec):
    layers = layers_of(24, 50)
    once = codec.encode_layers(layers, [1, 2], 60, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert codec.encode_layers(layers, [1, 2], 60, 1).data == once.data
    assert (torch.get_rng_state() == before).all()


def test_an_effort_begins_with_those_below_it(codec):
    """What progress says of an effort is the same whatever effort was asked for."""
    layers, heard = layers_of(24, 50), []
    for effort in (1, 2):
        codec.encode_layers(layers, [1, 2], 60, effort, progress=lambda effort, gain, _: heard.append((effort, gain)))
    assert [effort for effort, _ in heard] == [1, 1, 2]
    assert 0 < heard[0][1] == heard[1][1] <= heard[2][1] < 1


def test_the_ordinary_decoder_sees_what_the_search_saw(codec):
    layers = layers_of(20, 33, 70)
    encoded = codec.encode_layers(layers, [1, 1.6, 3.4], 80, 1)
    header = container.read_header(encoded.data)
    for seen, decoded in zip(encoded.layers, codec.decode_layers(encoded.data, header, 2), strict=True):
        assert (seen == decoded).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 16)])
def test_smallest_pictures(codec, size):
    layers = [np.array(crop(size[1], size[0]))]
    plain, found = (codec.encode_layers(layers, [1], 60, effort) for effort in (0, 1))
    assert costs(found, layers, 60) <= costs(plain, layers, 60)


def test_time_budget(codec, monkeypatch):
    """With a clock that advances by a second whenever it is read. The search reads it before each step."""
    layers, heard, ticks = layers_of(96), [], itertools.count()
    plain = codec.encode_layers(layers, [1], 60)
    for module in "codec", "search":
        monkeypatch.setattr(f"compass_codec.{module}.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    cut = codec.encode_layers(layers, [1], 60, 9, 60.0, lambda effort, gain, _: heard.append(effort))
    assert 60 < next(ticks) < 70  # the steps that have begun end, and no other begins
    assert 0 < len(heard) < 9
    assert costs(cut, layers, 60) < costs(plain, layers, 60)
    assert codec.encode_layers(layers, [1], 60, 9, 1e-9).data == plain.data


def test_tiles_bound_what_is_computed_at_once(codec, monkeypatch):
    monkeypatch.setattr(search, "TILE", 1)
    widest: list[int] = []
    error = search.Search.error

    def watch(self, latent, job, tile, pixels, prediction):
        widest.append(latent.shape[3])
        assert pixels.shape == prediction.shape == (1, 3, 40, 16 * latent.shape[3])
        return error(self, latent, job, tile, pixels, prediction)

    monkeypatch.setattr(search.Search, "error", watch)
    layers = [np.array(crop(320, 40))]
    plain, found = (codec.encode_layers(layers, [1], 60, effort) for effort in (0, 1))
    assert len(widest) == 5 * (search.ANNEAL[1] + search.MOVES[1] + 1)
    assert max(widest) == (1 + 2 * search.REACH) * 4
    assert costs(found, layers, 60) < 0.995 * costs(plain, layers, 60)


def test_what_a_tile_counts_is_what_it_changes(codec):
    """A core's symbols show in no pixel that its tile leaves out, and what is computed of the cut is that of the
    whole, in the pixels that count and in the scales and means."""
    layer, size = codec.base, (208, 230)
    level, generator = layer.level(60), torch.Generator().manual_seed(0)
    y = torch.randint(-3, 4, (1, layer.codec.m, 13, 15), generator=generator).float()
    z = torch.randint(-3, 4, (1, 128, 4, 4), generator=generator).float()
    tile = search.Tile(size, (1, 2), (2, 4))
    cut, seen = tile.part(search.LATENT, 1), tile.part(search.PIXEL, 0.5)
    with torch.inference_mode():
        whole = layer.codec.synthesis(y, level, size)
        own = layer.codec.synthesis(y[cut], level, tile.extent(search.PIXEL, 1))
        assert torch.allclose(own[tile.part(search.PIXEL, 0.5, 1)], whole[seen], atol=1e-5)
        moved = y.clone()
        moved[tile.part(search.LATENT)] += 1
        change = (layer.codec.synthesis(moved, level, size) - whole).abs()
        assert change[seen].max() > 0.01
        change[seen] = 0
        assert change.max() < 1e-5
        given = layer.codec.hyper_synthesis(z[tile.part(1, 3)], tile.extent(search.LATENT, 3))
        for part, all_of_it in zip(given, layer.codec.hyper_synthesis(z, (13, 15)), strict=True):
            assert torch.allclose(part[tile.part(search.LATENT, 1, 3)], all_of_it[cut], atol=1e-5)
    assert y[cut][tile.part(search.LATENT, 0, 1)].equal(y[tile.part(search.LATENT)])


def test_tiles_cover_a_layer_once():
    size = (16 * 49 + 3, 1)
    counts = torch.zeros(1, 1, 50, 1)
    for tile in search.Tile.all(size):
        counts[tile.part(search.LATENT)] += 1
    assert (counts == 1).all()


def test_a_lower_layer_that_got_worse_stays(codec, monkeypatch):
    """A layer above is then searched on the prediction that it had."""
    layers = layers_of(24, 64)
    plain = codec.encode_layers(layers, [1, 2], 60)
    exact = search.Search.finish

    def finish(self, job, latents, effort):
        data, seen = exact(self, job, latents, effort)
        return (data * 3, seen) if self.layer is codec.base else (data, seen)

    monkeypatch.setattr(search.Search, "finish", finish)
    found = codec.encode_layers(layers, [1, 2], 60, 1)
    lower, upper = zip(*(parts(each.data) for each in (plain, found)), strict=True)
    assert lower[0] == lower[1] and np.array_equal(plain.layers[0], found.layers[0])
    assert upper[0] != upper[1] and costs(found, layers, 60) < costs(plain, layers, 60)


def test_curvature(codec):
    """It is about how far a step really changes the picture, and the same channel's differs from place to place."""
    own, level = search.Search(codec.base), codec.base.level(60)
    pixels = torch.from_numpy(np.array(crop(128, 96))).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        y = own.codec.analysis(pixels, level).round()
    with search.gradients():
        known = torch.zeros(1, 3, 96, 128)
        job = search.LayerTask(np.array(crop(128, 96)), known, 60, 1.0, torch.Generator(), math.inf)
        tile = search.Tile((96, 128), (0, 2), (0, 2))
        found = own.curvature(y.clone(), job, tile, job.known).detach()
    assert found.shape == y.shape
    channels = range(0, own.codec.m, 16)
    real, believed = np.zeros((2, len(channels), 6))
    with torch.inference_mode():
        plain = own.shown(y, job, tile, job.known)
        for i, channel in enumerate(channels):
            for j, (row, column) in enumerate([(0, 0), (1, 4), (2, 6), (3, 2), (4, 7), (5, 3)]):
                moved = y.clone()
                moved[0, channel, row, column] += 0.1
                real[i, j] = 100 * float((own.shown(moved, job, tile, job.known) - plain).square().sum())
                believed[i, j] = found[0, channel, row, column]
    ratios = real / believed
    assert 0.8 < np.median(ratios) < 1.25
    # much nearer than with what is of the channel alone
    assert np.log(ratios).std() < 0.8 * np.log(real / found.mean((0, 2, 3))[::16, None].numpy()).std()


def test_softening():
    """Ever nearer to rounding, by the distance from the integers on average, and with a gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 40001).requires_grad_()
    below, share = search.soften(x, 0.01, generator)
    assert ((below + share).round() == x.round()).float().mean() > 0.97
    assert ((share < 0.01) | (share > 0.99)).float().mean() > 0.95
    below, share = search.soften(x, 0.5, generator)
    assert 0.2 < (share > 0.5)[(x - below - 0.4).abs() < 0.02].float().mean() < 0.48
    share.sum().backward()
    assert x.grad.isfinite().all() and x.grad.mean() > 0.5


def test_scales_are_those_of_the_integer_decoder(codec):
    with torch.inference_mode():
        x = torch.from_numpy(np.array(crop(128, 128))).permute(2, 0, 1)[None] / 255
        z = codec.base.codec.hyper_analysis(codec.base.codec.analysis(x, torch.tensor([0.0]))).round()
        scales, means = codec.base.codec.hyper_synthesis(z, (8, 8))
        index, exact = codec.base.hyper(z, (8, 8))
    # only what lies between two scales may fall to either
    apart = (search.level_position(scales) - index).abs()
    assert apart.max() < 0.7 and (apart > 0.5).float().mean() < 0.035
    # both round, the one to floats, the other to 2**-12; the bits this costs a Gaussian symbol
    lost = ((means - exact) / scales.clamp_min(entropy.SCALE_RANGE[0])).square() / (2 * math.log(2))
    assert lost.mean() < 5e-6 and lost.max() < 1e-3
    levels = torch.from_numpy(entropy.scale_levels())
    assert torch.allclose(search.level_position(levels), torch.arange(64.0).double(), atol=1e-6)


def test_layer_weights(codec):
    """What counts more comes out better."""
    layers = layers_of(32, 64)

    def layer_costs(weights: list[float]) -> list[float]:
        encoded = codec.encode_layers(layers, [1, 2], 60, 1, layer_weights=weights)
        header = container.read_header(encoded.data)
        payloads = [container.payload(header, encoded.data, k) for k in (0, 1)]
        coded = zip(payloads, encoded.layers, strict=True)
        return [
            search.CodedLayer.of(each, picture, quality_to_lambda(60)).cost
            for each, picture in zip(coded, layers, strict=True)
        ]

    lower, upper = layer_costs([20, 1]), layer_costs([1, 20])
    assert lower[0] < upper[0] and upper[1] < lower[1]
    for wrong in ([1], [1, 0], [1, math.nan], [1, math.inf]):
        with pytest.raises(OptionError, match="layer weights"):
            codec.encode_layers(layers, [1, 2], 60, 1, layer_weights=wrong)


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
    for effort in (0, 1):
        target = tmp_path / f"{effort}.cmps"
        done = compass(
            "encode", source, "--model", "paper", "-s", "1,2", "--effort", effort, "--verify", "--json", "-o", target
        )
        assert done.code == 0, done.err
        sizes.append(json.loads(done.out)["size"])
        assert sizes[-1] == target.stat().st_size
    assert (tmp_path / "0.cmps").read_bytes() != (tmp_path / "1.cmps").read_bytes()
    weighted = tmp_path / "weighted.cmps"
    assert (
        compass(
            "encode", source, "--model", "paper", "-s", "1,2", "--effort", 1, "--layer-weights", "9,1", "-o", weighted
        ).code
        == 0
    )
    assert weighted.read_bytes() != (tmp_path / "1.cmps").read_bytes()
    for wrong in ("9", "9,0", "9,inf", "9,x"):
        assert (
            compass("encode", source, "--model", "paper", "-s", "1,2", "--effort", 1, "--layer-weights", wrong).code
            == 2
        )
    assert compass("encode", source, "--model", "paper", "-s", "1,2", "--layer-weights", "9,1").code == 2
    assert compass("encode", source, "--model", "paper", "-s", "1", "--effort", 10).code == 2
    assert compass("encode", source, "--model", "paper", "-s", "1", "--time-budget", 3).code == 2
    assert (
        compass(
            "encode", source, "--model", "paper", "-s", "1", "--time-budget", 3, "--effort", 1, "--target-bpp", 1
        ).code
        == 2
    )


def test_the_table_of_efforts(tmp_path):
    """Each layer of a file has its own BD-rate, and lower layers gain too."""
    crop(48, 48).save(tmp_path / "a.png")
    arguments = ["--images", str(tmp_path), "--side", "48", "--layers", "3", "--effort", "1"]
    result = CliRunner().invoke(efforts.main, arguments)
    *_, none, first = result.output.strip().splitlines()
    assert none.startswith("| 3 | 0 | 0 |") and first.endswith(" MiB |")
    changes = [float(part.strip().removesuffix(" %")) for part in first.split("|")[3].split(",")]
    assert len(changes) == 3 and max(changes) < 0
