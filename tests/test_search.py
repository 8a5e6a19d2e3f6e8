"""Search in the encoder: never worse, always the same, and nothing that a decoder would notice."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import compass, crop

from compass_codec import container, search
from compass_codec.backbones.lean import quality_to_lambda
from compass_codec.codec import Codec
from compass_codec.distortions import squared
from compass_codec.errors import OptionError
from compass_codec.measure import effort as efforts
from compass_codec.weights import choose


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


def parts(data: bytes) -> list[bytes]:
    header = container.read_header(data)
    return [container.payload(header, data, k) for k in range(len(header.layers))]


@pytest.mark.parametrize(("widths", "quality"), [((64,), 60), ((24, 64), 1), ((24, 64), 100)])
def test_more_effort_never_costs_more(codec, widths, quality):
    layers = layers_of(*widths)
    found = [codec.encode_layers(layers, list(widths), quality, effort) for effort in (0, 1, 2)]
    values = [costs(f, layers, quality) for f in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.995 * values[0]


@pytest.mark.parametrize("seed", range(6))
def test_no_picture_costs_more(codec, seed):
    """Random pictures, which networks were not trained on: of noise, of few colours, of one."""
    rng = np.random.default_rng(seed)
    side, quality = int(rng.integers(1, 65)), float(rng.integers(1, 101))
    noise = rng.integers(0, 256, (side, 64, 3)) >> rng.integers(0, 8)
    top = noise.astype(np.uint8) if seed % 3 else np.kron(noise[::8, ::8], np.ones((8, 8, 1), int)).astype(np.uint8)
    layers = [top[::2, ::2].copy(), top] if seed % 2 else [top]
    heard: list[float] = []
    plain = codec.encode_layers(layers, [1, 2][: len(layers)], quality)
    found = codec.encode_layers(
        layers, [1, 2][: len(layers)], quality, 3, progress=lambda effort, gain, _: heard.append(gain)
    )
    assert heard == sorted(heard) and heard[0] >= 0
    assert costs(found, layers, quality) == pytest.approx(costs(plain, layers, quality) * (1 - heard[-1]), rel=1e-6)
    decoded = codec.decode_layers(found.data, container.read_header(found.data), len(layers) - 1)
    assert all(np.array_equal(*pair) for pair in zip(found.layers, decoded, strict=True))


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
    assert 0 <= heard[0][1] == heard[1][1] < heard[2][1] < 1


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
    quantised = search.Search.quantised

    def watch(self, y, z, change, least):
        widest.append(y.shape[3])
        assert y.shape[2:] == change.shape[2:] == (3, 4 * z.shape[3])
        return quantised(self, y, z, change, least)

    monkeypatch.setattr(search.Search, "quantised", watch)
    layers = [np.array(crop(320, 40))]
    plain, found = (codec.encode_layers(layers, [1], 60, effort) for effort in (0, 2))
    assert len(widest) == 5 * search.STEPS[2]
    assert max(widest) == (1 + 2 * search.REACH) * 4
    assert costs(found, layers, 60) < 0.99 * costs(plain, layers, 60)


def test_gradients_are_those_of_the_codec(codec):
    """What a step quantises is what the encoder writes, and its bits are those of the file, but for the float networks
    in place of the integer ones."""
    picture = np.array(crop(128, 96))
    own, job = (
        search.Search(codec.base),
        search.LayerTask(picture, None, 60, search.error_price(quality_to_lambda(60)), math.inf),
    )
    with torch.inference_mode():
        latents = own.start(job, codec.predict, None)
        written = latents.y.clone()
        data = own.layer.write(latents.z, written, own.least(job))
    with search.gradients():
        y, z = latents.y.clone(), latents.z.clone().requires_grad_()
        change = torch.zeros_like(y).requires_grad_()
        found, bits = own.quantised(y, z, change, own.least(job).clone())
        bits.backward()
    assert (found - written).abs().mean() < 0.1 * written.abs().mean()
    assert float(bits.detach()) == pytest.approx(8 * len(data), rel=0.03)
    assert change.grad.abs().max() > 0 and z.grad.abs().max() > 0


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
    exact = search.Search.encode

    def encode(self, job, latents, effort, more):
        data, seen = exact(self, job, latents, effort, more)
        return (data * 3, seen) if effort and self.layer is codec.base else (data, seen)

    monkeypatch.setattr(search.Search, "encode", encode)
    found = codec.encode_layers(layers, [1, 2], 60, 1)
    lower, upper = zip(*(parts(each.data) for each in (plain, found)), strict=True)
    assert lower[0] == lower[1] and np.array_equal(plain.layers[0], found.layers[0])
    assert upper[0] != upper[1] and costs(found, layers, 60) < costs(plain, layers, 60)


def test_layer_weights(codec):
    """What counts more comes out better."""
    layers = layers_of(48, 96)

    def layer_costs(weights: list[float]) -> list[float]:
        encoded = codec.encode_layers(layers, [1, 2], 60, 2, layer_weights=weights)
        header = container.read_header(encoded.data)
        payloads = [container.payload(header, encoded.data, k) for k in (0, 1)]
        coded = zip(payloads, encoded.layers, strict=True)
        return [
            search.CodedLayer.of(each, picture, quality_to_lambda(60), squared).cost
            for each, picture in zip(coded, layers, strict=True)
        ]

    lower, upper = layer_costs([20, 1]), layer_costs([1, 20])
    assert lower[0] < upper[0] and upper[1] < lower[1]
    for wrong in ([1], [1, 0], [1, math.nan], [1, math.inf]):
        with pytest.raises(OptionError, match="layer weights"):
            codec.encode_layers(layers, [1, 2], 60, 1, layer_weights=wrong)


def test_bits_of_the_normal_distribution():
    """They add up to a probability of one, and a far symbol has a gradient."""
    for scale in (0.11, 0.7, 30.0):
        x = torch.arange(-300.0, 301.0)
        bits = search.gaussian_bits(x, torch.full_like(x, math.log(scale)))
        assert float((-bits).exp2().sum()) == pytest.approx(1, abs=1e-4)
    far = torch.tensor(3.0, requires_grad=True)
    search.gaussian_bits(far, torch.tensor(-0.7)).backward()
    assert far.grad > 1


def test_command(tmp_path):
    source = tmp_path / "a.png"
    crop(48, 40).save(source)
    sizes = []
    for effort in (0, 2):
        target = tmp_path / f"{effort}.cmps"
        done = compass("encode", source, "-s", "1,2", "--effort", effort, "--verify", "--json", "-o", target)
        assert done.code == 0, done.err
        sizes.append(json.loads(done.out)["size"])
        assert sizes[-1] == target.stat().st_size
    assert (tmp_path / "0.cmps").read_bytes() != (tmp_path / "2.cmps").read_bytes()
    weighted = tmp_path / "weighted.cmps"
    assert compass("encode", source, "-s", "1,2", "--effort", 2, "--layer-weights", "9,1", "-o", weighted).code == 0
    assert weighted.read_bytes() != (tmp_path / "2.cmps").read_bytes()
    assert compass("encode", source, "-s", "1", "--effort", 1, "--target-bpp", 2, "-o", tmp_path / "t.cmps").code == 0
    assert 8 * (tmp_path / "t.cmps").stat().st_size <= 2 * 48 * 40
    refused = compass("encode", source, "-s", "1", "--model", "paper", "--effort", 1, "-o", tmp_path / "p.cmps")
    assert refused.code == 1 and "only effort 0" in refused.err
    for wrong in ("9", "9,0", "9,inf", "9,x"):
        assert compass("encode", source, "-s", "1,2", "--effort", 1, "--layer-weights", wrong).code == 2
    assert compass("encode", source, "-s", "1,2", "--layer-weights", "9,1").code == 2
    assert compass("encode", source, "-s", "1", "--effort", 10).code == 2
    assert compass("encode", source, "-s", "1", "--time-budget", 3).code == 2
    assert compass("encode", source, "-s", "1", "--time-budget", 3, "--effort", 1, "--target-bpp", 1).code == 2


def test_the_table_of_efforts(tmp_path):
    """Each layer of a file has its own BD-rate, and lower layers gain too."""
    crop(48, 48).save(tmp_path / "a.png")
    arguments = ["--images", str(tmp_path), "--side", "48", "--layers", "3", "--effort", "1"]
    result = CliRunner().invoke(efforts.main, arguments)
    *_, none, first = result.output.strip().splitlines()
    assert none.startswith("| 3 | 0 | 0 |") and first.endswith(" MiB |")
    changes = [float(part.strip().removesuffix(" %")) for part in first.split("|")[3].split(",")]
    assert len(changes) == 3 and max(changes) < 0


def test_a_set_that_is_not_installed_is_searched_too(tmp_path):
    folder = shutil.copytree(choose().folder, tmp_path / "mine")
    card = folder / "model.json"
    card.write_text(card.read_text().replace("the default", "another"))
    picture = np.asarray(crop(32, 24))
    files = [Codec.load("cpu", folder).encode(picture, [1], effort=effort).data for effort in (0, 1)]
    assert {container.read_header(data).model for data in files} == {choose(folder).identity} and files[0] != files[1]
