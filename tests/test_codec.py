"""Whole files through the Python calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KODAK, crop, psnr
from PIL import Image

import compass_codec
from compass_codec import container, strips
from compass_codec.codec import Codec, layer_sizes
from compass_codec.errors import (
    CompassError,
    DamagedError,
    LimitError,
    OptionError,
    PictureError,
    TruncatedError,
    WeightsError,
)
from compass_codec.layer import MAGNITUDES, MOST_BEYOND
from compass_codec.pictures import squared_error
from compass_codec.side import FULL_GAIN, FULL_STRENGTH, Side
from compass_codec.training.export import describe


def test_sizes_follow_the_rule():
    assert layer_sizes((1000, 600), [1, 2.0, 3.2]) == [(312, 188), (625, 375), (1000, 600)]
    assert layer_sizes((1, 1), [1, 7.7]) == [(1, 1), (1, 1)]
    assert layer_sizes((3, 2), [1, 100]) == [(1, 1), (3, 2)]


def test_decoder_sees_what_the_encoder_saw(codec):
    result = codec.encode(crop(90, 70), [1, 1.37, 2.9], 70)
    header = container.read_header(result.data)
    for k, layer in enumerate(result.layers):
        assert (np.asarray(codec.decode(result.data, k)) == layer).all()
        assert layer.shape == (header.layers[k].height, header.layers[k].width, 3)
    assert codec.decode(result.data).size == (90, 70)


def test_public_calls(small_file):
    image = compass_codec.decode(small_file, layer=1, device="cpu")
    assert image.size == (40, 30) and image.mode == "RGB"
    again = compass_codec.encode(crop(80, 60), [1, 2, 4], 50, device="cpu")
    assert again == small_file
    assert issubclass(CompassError, ValueError)


def test_alpha_is_kept(codec):
    image = crop(40, 30).convert("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    data = codec.encode(image, [1, 2], 60).data
    assert (np.asarray(codec.decode(data).getchannel("A")) == np.asarray(alpha)).all()
    assert codec.decode(data, 0).mode == "RGBA" and codec.decode(codec.encode(crop(8, 8), [1]).data).mode == "RGB"


def test_symbols_are_rounded_by_what_they_cost(codec, monkeypatch):
    layer = codec.base
    least = layer.thresholds.reshape(-1, MAGNITUDES)
    assert (least >= 0.5).all() and (least <= 0.5 + MOST_BEYOND).all() and least[0, 0] > least[40, 0] + 0.02
    x = torch.tensor([0.3, 0.5, 0.55, 0.9, 1.2, 7.2, 40.9])
    x = torch.cat([x, -x])[None, :, None, None]
    frugal, wide = (layer.quantise(x.clone(), torch.full(x.shape, i, dtype=torch.uint8)).flatten() for i in (0, 45))
    assert frugal.tolist() == [0, 0, 0, 1, 1, 7, 41, 0, 0, 0, -1, -1, -7, -41]
    assert wide.tolist() == [0, 0, 1, 1, 1, 7, 41, 0, 0, -1, -1, -1, -7, -41]

    picture = np.array(crop(160, 120))
    cost = codec.encode_layer(picture, None, 40).cost
    monkeypatch.setattr(layer, "thresholds", torch.full_like(layer.thresholds, 0.5))
    assert cost < codec.encode_layer(picture, None, 40).cost


def test_it_is_the_picture(codec):
    image = crop(128, 128)
    for quality, least in ((1, 24), (60, 28), (100, 30)):
        assert psnr(codec.decode(codec.encode(image, [1, 2], quality).data), image) > least


def test_quality_buys_bits_and_decibels(codec):
    image = crop(128, 96)
    coded = [codec.encode(image, [1, 2], q).data for q in (10, 50, 90)]
    assert len(coded[0]) < len(coded[1]) < len(coded[2])
    values = [psnr(codec.decode(data), image) for data in coded]
    assert values == sorted(values)


def test_cut_anywhere_every_complete_layer_decodes_bit_for_bit(codec, small_file):
    header = container.read_header(small_file)
    whole = [np.asarray(codec.decode(small_file, k)) for k in range(3)]
    for k, entry in enumerate(header.layers):
        for size in (entry.end, min(entry.end + 1, len(small_file))):
            part = small_file[:size]
            for below in range(k + 1):
                assert (np.asarray(codec.decode(part, below)) == whole[below]).all()
            assert (np.asarray(codec.decode(part)) == whole[k]).all()
        with pytest.raises(TruncatedError):
            codec.decode(small_file[: entry.end - 1], k)


def test_layers_above_are_neither_read_nor_computed(codec, small_file, monkeypatch):
    header = container.read_header(small_file)
    end = header.layers[0].end
    garbage = small_file[:end] + bytes(255 - b for b in small_file[end:])

    def never(*args):
        raise AssertionError("an enhancement layer was computed")

    expected = np.asarray(codec.decode(small_file, 0))
    monkeypatch.setattr(codec.residual, "decode", never)
    monkeypatch.setattr(codec, "liff", never)
    assert (np.asarray(codec.decode(garbage, 0)) == expected).all()


def test_sixteen_layers_and_equal_factors(codec):
    scales = [1, 1, 1.1, 1.2, 1.3, 1.5, 1.5, 1.7, 2, 2.2, 2.5, 2.5, 3, 3.3, 3.7, 4]
    data = codec.encode(crop(40, 30), scales, 40).data
    assert len(container.read_header(data).layers) == 16
    assert codec.decode(data).size == (40, 30)
    twice = codec.encode_layers([np.array(crop(64, 64))] * 2, [1, 1], [60, 80])
    assert psnr(Image.fromarray(twice.layers[1]), crop(64, 64)) > psnr(Image.fromarray(twice.layers[0]), crop(64, 64))


GREY = Image.new("RGB", (40, 30), (128, 128, 128))  # what the base layer's prediction already is


def sides(data: bytes) -> list[Side]:
    return [entry.side for entry in container.read_header(data).layers]


def seen_again(codec, encoded) -> bool:
    """Does every layer decode to what the encoder saw?"""
    decoded = codec.decode_layers(encoded.data, container.read_header(encoded.data), len(encoded.layers) - 1)
    return all((a == b).all() for a, b in zip(decoded, encoded.layers, strict=True))


def test_nothing_to_add(codec):
    data = codec.encode(GREY, [1, 1], 60).data
    assert sides(data)[0] == Side(empty=True) and container.read_header(data).layers[0].length == 0
    assert codec.decode(data, 0).getextrema() == ((128, 128),) * 3
    # a photograph's first layers are never worth leaving out
    assert not any(side.empty for side in sides(codec.encode(crop(64, 48), [1, 2], 60).data)[:1])


def test_an_empty_layer_costs_less_and_a_better_one_is_never_empty(codec):
    layers = [np.array(crop(64, 48))] * 2
    both = []
    for adaptive in (True, False):
        codec.adaptive = adaptive
        try:
            both.append(codec.encode_layers(layers, [1, 1], [100, 1]))
        finally:
            del codec.adaptive
    chosen, plain = both
    assert sides(chosen.data)[1].empty and len(chosen.data) < len(plain.data) and seen_again(codec, chosen)
    assert [replace(side, filter=b"") for side in sides(plain.data)] == [Side()] * 2
    header = container.read_header(chosen.data)
    assert header.layers[1].end == header.layers[0].end
    # the same quality once more may be empty, a higher one may not
    raised = codec.encode_layers(layers, [1, 1], [60, 66])
    assert not sides(raised.data)[1].empty and seen_again(codec, raised)
    # unless it is no worse for it: its prediction may then be nearer than what little could be coded
    raised = codec.encode_layers(layers, [1, 1], [60, 60.5])
    lower, upper = (squared_error(layers[0], seen) for seen in raised.layers)
    assert upper <= lower and seen_again(codec, raised)


def spoiled(factor: float) -> Codec:
    """A codec whose LIFF adds ``factor`` times what it should."""
    codec = Codec.load("cpu")
    with torch.inference_mode():
        codec.liff.mlp_last.weight *= factor
        codec.liff.mlp_last.bias *= factor
    return codec


def test_a_prediction_that_harms_is_left_out():
    """Where a size repeats that costs no trying; else an effort finds it."""
    codec, layers = spoiled(-6), [np.array(crop(64, 48))] * 2
    repeated = codec.encode_layers(layers, [1, 1], [20, 60])
    assert replace(sides(repeated.data)[1], filter=b"", strength=FULL_STRENGTH) == Side(gain=0)
    assert seen_again(codec, repeated)
    layers = [np.array(crop(64, 48).resize(size)) for size in ((32, 24), (64, 48))]
    plain, tried = (codec.encode_layers(layers, [1, 2], 60, effort) for effort in (0, 1))
    assert sides(plain.data)[1].gain == FULL_GAIN
    assert sides(tried.data)[1].gain < FULL_GAIN and seen_again(codec, tried)
    assert len(tried.data) < len(plain.data)


def test_an_empty_layer_of_a_higher_quality_is_no_worse_than_the_one_below():
    """However cheap it would be to leave in it what LIFF adds."""
    codec, picture = spoiled(0.2), np.array(crop(64, 48))
    wanted, unwanted = (codec.encode_layer(picture, picture, 1, needed, FULL_GAIN) for needed in (True, False))
    assert wanted.side == Side(0, empty=True) and np.array_equal(wanted.seen, picture)
    assert unwanted.side.empty and unwanted.side.gain == FULL_GAIN and not np.array_equal(unwanted.seen, picture)


@pytest.mark.parametrize("factor", [-6, 1])
def test_gains_of_pictures_of_several_strips(monkeypatch, factor):
    """The first strip, from which the gain is chosen, is the one that the decoder predicts."""
    monkeypatch.setitem(strips.STRIP, "cpu", 64)
    layers = [np.array(crop(64, 150))] * 2
    encoded = spoiled(factor).encode_layers(layers, [1, 1], [5, 30])
    assert (sides(encoded.data)[1].gain == 0) == (factor < 0) and seen_again(spoiled(factor), encoded)


def test_a_search_keeps_side_information(codec):
    """An empty layer stays empty, and the others are searched above it."""
    layers = [np.array(image) for image in (GREY, GREY, crop(40, 30))]
    for effort in (0, 1):
        encoded = codec.encode_layers(layers, [1, 1, 1], [60, 60, 70], effort)
        assert [side.empty for side in sides(encoded.data)][::2] == [True, False] and seen_again(codec, encoded)


def test_side_information_of_every_kind_decodes(codec, small_file):
    """What no encoder would choose: it changes the layer that it belongs to and those above, not those below."""
    header = container.read_header(small_file)
    parts = [container.payload(header, small_file, k) for k in range(3)]
    plain = [np.asarray(codec.decode(small_file, k)) for k in range(3)]
    rest = {
        "sizes": [(e.width, e.height) for e in header.layers],
        "scales": [e.scale for e in header.layers],
        "qualities": [e.quality for e in header.layers],
    }
    for side in (Side(0), Side(15), Side(7, True), Side(strength=0)):
        forged = [Side(), side, Side()]
        payloads = [parts[0], b"" if side.empty else parts[1], parts[2]]
        data = container.write(codec.model, payloads=payloads, sides=forged, **rest)
        found = [np.asarray(codec.decode(data, k)) for k in range(3)]
        assert (found[0] == plain[0]).all()
        assert all((a != b).any() for a, b in zip(found[1:], plain[1:], strict=True))


def test_interpolation_alone(codec, monkeypatch):
    """LIFF is not asked. A layer of the same size is then the one below it, to the bit."""
    image = crop(37, 23)
    small = np.array(image.resize((20, 11)))
    encoded = codec.encode_layers([small], [1], 60)
    header = container.read_header(encoded.data)
    (part,) = (container.payload(header, encoded.data, 0),)
    sides = [header.layers[0].side, Side(0, True), Side(0, True)]
    sizes = [(20, 11), (20, 11), (37, 23)]
    data = container.write(codec.model, sizes, [1, 1, 2], [60] * 3, [part, b"", b""], sides=sides)
    monkeypatch.setattr(codec.liff, "_query", None)
    assert (np.asarray(codec.decode(data, 1)) == encoded.layers[0]).all()
    resized = Image.fromarray(encoded.layers[0]).resize((37, 23), Image.Resampling.BICUBIC)
    assert psnr(codec.decode(data, 2), resized) > 30


def test_same_input_same_bytes_with_one_thread_or_two(codec):
    image = crop(70, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = codec.encode(image, [1, 2], 60).data
        pictures = np.asarray(codec.decode(one)).astype(int)
        torch.set_num_threads(2)
        assert codec.encode(image, [1, 2], 60).data == codec.encode(image, [1, 2], 60).data
        assert np.abs(np.asarray(codec.decode(one)).astype(int) - pictures).max() <= 1
    finally:
        torch.set_num_threads(threads)


def test_damage_is_found_before_decoding(codec, small_file):
    broken = bytearray(small_file)
    broken[container.read_header(small_file).layers[1].start] ^= 255
    with pytest.raises(DamagedError, match=r"layer 1 is damaged .* layer 0 decodes"):
        codec.decode(bytes(broken))
    assert codec.decode(bytes(broken), 0).size == (20, 15)


def test_other_weights_are_named(codec, small_file):
    data = container.write("00" * 6, [(4, 4)], [1], [50], [b"x"])
    with pytest.raises(WeightsError, match=f"000000000000.*{codec.model}"):
        codec.decode(data)


def test_bad_options(codec):
    image = crop(8, 8)
    for scales, quality in (([2, 1], 50), ([1], 0), ([1], 101), ([1], float("nan")), ([], 50)):
        with pytest.raises(OptionError):
            codec.encode(image, scales, quality)
    with pytest.raises(PictureError):
        codec.encode(Image.new("F", (4, 4)), [1], 50)
    with pytest.raises(LimitError):
        codec.decode(codec.encode(image, [1], 50).data, max_pixels=63)


def test_weights_folder_problems(tmp_path):
    with pytest.raises(WeightsError, match=r"model\.json"):
        Codec.load("cpu", tmp_path)
    describe(tmp_path)
    with pytest.raises(WeightsError, match=r"base\.safetensors"):
        Codec.load("cpu", tmp_path)
    for part in ("base", "residual", "liff"):
        (tmp_path / f"{part}.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(WeightsError, match="cannot be used"):
        Codec.load("cpu", tmp_path)


@pytest.mark.skipif(not KODAK.is_dir(), reason="the Kodak pictures are not at hand")
def test_kodak_three_layers_beat_three_files(codec):
    """Three of the 24 pictures here; `make kodak` measures all of them."""
    layered = separate = 0
    values = []
    for number in (5, 15, 23):
        image = Image.open(KODAK / f"kodim{number:02}.png")
        result = codec.encode(image, [1, 2, 4])
        layered += len(result.data)
        sources = [image.resize((r.shape[1], r.shape[0]), Image.Resampling.BICUBIC) for r in result.layers]
        separate += sum(len(codec.encode(source, [1]).data) for source in sources)
        values.append([psnr(Image.fromarray(r), s) for r, s in zip(result.layers, sources, strict=True)])
    assert layered < separate
    assert np.mean(values, axis=0).min() >= 26
