"""Whole files through the Python calls."""

import numpy as np
import pytest
import torch
from conftest import KODAK, crop, psnr
from PIL import Image

import compass_codec
from compass_codec import container
from compass_codec.backbones.symbols import MAGNITUDES, MOST_BEYOND, quantise
from compass_codec.codec import Codec, layer_sizes, shared
from compass_codec.distortions import squared
from compass_codec.errors import (
    CompassError,
    DamagedError,
    FormatError,
    LayerError,
    LimitError,
    OptionError,
    PictureError,
    TruncatedError,
    WeightsError,
)
from compass_codec.networks.mean_scale_numbers import quality_to_lambda
from compass_codec.search import CodedLayer
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
    frugal, wide = (
        quantise(x.clone(), torch.full(x.shape, i, dtype=torch.uint8), layer.thresholds).flatten() for i in (0, 45)
    )
    assert frugal.tolist() == [0, 0, 0, 1, 1, 7, 41, 0, 0, 0, -1, -1, -7, -41]
    assert wide.tolist() == [0, 0, 1, 1, 1, 7, 41, 0, 0, -1, -1, -1, -7, -41]

    picture = np.array(crop(160, 120))

    def cost() -> float:
        data, reconstruct = codec.encode_layer(picture, None, 40)
        return CodedLayer.of((data, reconstruct()), picture, quality_to_lambda(40), squared).cost

    before = cost()
    monkeypatch.setattr(layer, "thresholds", torch.full_like(layer.thresholds, 0.5))
    assert before < cost()


SOLID = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255), (12, 200, 220), (128, 127, 126)]


@pytest.mark.parametrize("profile", ["lean", "paper"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 3), (33, 17), (130, 70)])
def test_a_solid_colour_is_that_colour_with_every_set(size, profile):
    installed = shared("cpu", model=profile)
    for colour in SOLID:
        for quality in (1, 60, 100):
            coded = installed.encode(Image.new("RGB", size, colour), [1, 2, 3.2], quality)
            for k, layer in enumerate(coded.layers):
                assert (layer == colour).all() and (np.asarray(installed.decode(coded.data, k)) == layer).all()


def test_a_nearly_solid_colour_is_within_one(codec):
    pixels = np.random.default_rng(0).integers(199, 202, (40, 30, 3), dtype=np.uint8)
    coded = codec.encode(pixels, [1], 60)
    assert (coded.layers[0] == 200).all() and len(coded.data) < 50
    pixels[20, 15] = 220  # no longer one colour: a codec's layer
    assert len(codec.encode(pixels, [1], 60).data) > len(coded.data)


def test_a_layer_of_one_colour_is_four_bytes(codec):
    def file(payload: bytes) -> bytes:
        return container.write(codec.model, [(3, 2)], [1], [60], [payload])

    assert (np.asarray(codec.decode(file(bytes([1, 250, 128, 0])))) == (250, 128, 0)).all()
    for wrong in (bytes([1]), bytes([1, 250, 128]), bytes([1, 250, 128, 0, 0])):
        with pytest.raises(DamagedError, match="one colour"):
            codec.decode(file(wrong))


def test_a_layer_over_one_of_one_colour(codec):
    picture = np.array(crop(64, 48))
    below = np.full((24, 32, 3), 90, np.uint8)
    coded = codec.encode_layers([below, picture], [1, 2], 60)
    assert (coded.layers[0] == 90).all() and psnr(codec.decode(coded.data), picture) > 20
    assert (np.asarray(codec.decode(coded.data)) == coded.layers[1]).all()


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
    monkeypatch.setattr(codec, "predictor", never)
    assert (np.asarray(codec.decode(garbage, 0)) == expected).all()


def test_sixteen_layers_and_equal_factors(codec):
    scales = [1, 1, 1.1, 1.2, 1.3, 1.5, 1.5, 1.7, 2, 2.2, 2.5, 2.5, 3, 3.3, 3.7, 4]
    data = codec.encode(crop(40, 30), scales, 40).data
    assert len(container.read_header(data).layers) == 16
    assert codec.decode(data).size == (40, 30)
    twice = codec.encode_layers([np.array(crop(64, 64))] * 2, [1, 1], [60, 80])
    assert psnr(Image.fromarray(twice.layers[1]), crop(64, 64)) > psnr(Image.fromarray(twice.layers[0]), crop(64, 64))


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


def test_arrays_of_every_shape_are_taken():
    pixels = np.asarray(crop(12, 8))
    grey = compass_codec.encode(pixels[..., 0], [1], device="cpu")
    for same in (pixels[..., :1], memoryview(pixels[..., :1]), torch.tensor(pixels[..., 0])):
        assert compass_codec.encode(same, [1], device="cpu") == grey
    assert compass_codec.decode(memoryview(grey)).size == (12, 8)
    assert container.read_header(bytearray(grey)) == container.read_header(grey)
    assert container.extract(memoryview(grey), 0) == grey


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": np.zeros((8, 8, 3))},
        {"image": np.zeros((0, 8, 3), np.uint8)},
        {"image": "a.png"},
        {"image": None},
        {"scales": 2},
        {"scales": [None]},
        {"quality": "high"},
        {"quality": None},
        {"device": "tpu"},
        {"device": None},
        {"device": ["cpu"]},
        {"model": "none"},
        {"model": 5},
        {"model": b"paper"},
    ],
)
def test_what_encode_cannot_take_is_told(wrong):
    with pytest.raises(CompassError) as caught:
        compass_codec.encode(**{"image": np.zeros((8, 8, 3), np.uint8), "scales": [1]} | wrong)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("layer", ["0", 1.0, [0], float("nan"), -1, 3])
def test_layers_that_no_file_has(small_file, layer):
    for call in (compass_codec.decode, container.extract):
        with pytest.raises(LayerError):
            call(small_file, layer)


@pytest.mark.parametrize("data", [None, 5, "text", ["list"], object()])
def test_what_is_no_file(data):
    for call in (compass_codec.decode, container.read_header, lambda data: container.extract(data, 0)):
        with pytest.raises(FormatError):
            call(data)


def test_weights_folder_problems(tmp_path):
    with pytest.raises(WeightsError, match=r"model\.json"):
        Codec.load("cpu", tmp_path)
    for part in ("base", "residual", "liff"):
        (tmp_path / f"{part}.safetensors").write_bytes(b"not safetensors at all")
    describe(tmp_path)
    with pytest.raises(WeightsError, match="cannot be used"):
        Codec.load("cpu", tmp_path)
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"base\.safetensors: cannot read"):
        Codec.load("cpu", tmp_path)


@pytest.mark.skipif(not KODAK.is_dir(), reason="the Kodak pictures are not at hand")
def test_kodak_three_layers_beat_three_files(codec):
    """Three of the 24 pictures here; `make tables` measures all of them."""
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


def test_the_top_layer_is_reconstructed_when_it_is_asked_for(codec, monkeypatch):
    done, reconstruct = [], codec.residual.reconstruct

    def counted(*given):
        done.append(given[-1])
        return reconstruct(*given)

    monkeypatch.setattr(codec.residual, "reconstruct", counted)
    encoded = codec.encode(crop(96, 64), [1, 2, 3])
    assert done == [(43, 64)]
    assert encoded.layers[-1].shape == (64, 96, 3) and encoded.layers is encoded.layers
    assert done == [(43, 64), (64, 96)]
    assert (np.asarray(codec.decode(encoded.data)) == encoded.layers[-1]).all()
