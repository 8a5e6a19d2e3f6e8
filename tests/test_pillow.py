"""The plugin for Pillow, as its users know formats."""

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, crop, psnr
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from test_pictures import profile

import compass_codec.pillow  # noqa: F401
from compass_codec import container, pictures


@pytest.fixture
def path(tmp_path, small_file) -> Path:
    path = tmp_path / "photo.cmps"
    path.write_bytes(small_file)
    return path


@pytest.fixture(scope="module")
def layers(codec, small_file) -> list[np.ndarray]:
    return list(codec.decode_layers(small_file, container.read_header(small_file), 2))


def test_opens_at_the_largest_layer(path, layers):
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("CMPS", "RGB", (80, 60))
        assert (image.n_frames, image.tell(), image.is_animated) == (3, 2, True)
        assert image.info["scales"] == [1, 2, 4] and image.info["layers"] == 3 and image.info["quality"] == 50
        assert image.get_format_mimetype() == "image/x-cmps"
        assert (np.asarray(image) == layers[2]).all()
        assert (np.asarray(image) == layers[2]).all()


def test_frames_are_layers(path, layers):
    with Image.open(path) as image:
        for frame in (1, 0, 2, 2, 1):
            image.seek(frame)
            assert image.tell() == frame and image.size == layers[frame].shape[1::-1]
            assert (np.asarray(image) == layers[frame]).all()
        for frame in (3, -1):
            with pytest.raises(EOFError):
                image.seek(frame)
        assert image.tell() == 1 and (np.asarray(image) == layers[1]).all()
        shown = [np.array(frame) for frame in ImageSequence.Iterator(image)]
    assert all((a == b).all() for a, b in zip(shown, layers, strict=True))


def test_opening_is_light(path):
    code = (
        "import sys, compass_codec.pillow\nfrom PIL import Image\n"
        "with Image.open(sys.argv[1]) as image: image.draft(None, (10, 10)); print(image.size)\n"
        "print(sorted({'torch', 'numpy', 'constriction', 'compressai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(20, 15)", "[]"], done.stderr


class Counting(io.BytesIO):
    """A file that remembers how far it was read."""

    furthest = 0

    def read(self, size=-1):
        data = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        return data


def test_reads_only_what_the_layer_needs(small_file):
    ends = [entry.end for entry in container.read_header(small_file).layers]
    file = Counting(small_file + bytes(10_000))
    with Image.open(file) as image:
        opened = file.furthest
        image.draft("RGB", (30, 20))
        image.load()
        assert opened < 5000 and file.furthest == max(opened, ends[1])


@pytest.mark.parametrize(
    ("wanted", "layer"),
    [
        ((1, 1), 0),
        ((20, 15), 0),
        ((21, 15), 1),
        ((20, 16), 1),
        ((40, 30), 1),
        ((41, 1), 2),
        ((80, 60), 2),
        ((999, 9), 2),
    ],
)
def test_draft(path, layers, wanted, layer):
    with Image.open(path) as image:
        height, width = layers[layer].shape[:2]
        assert image.draft("L", wanted) == ("RGB", (0, 0, width, height))
        assert image.size == (width, height) and image.tell() == layer
        assert (np.asarray(image) == layers[layer]).all()
        assert image.draft(None, (1, 1)) is None, "it is loaded"


def test_draft_never_goes_up(path):
    with Image.open(path) as image:
        image.seek(1)
        image.draft(None, (80, 60))
        assert image.size == (40, 30)
        image.draft(None, (5, 5))
        image.draft(None, (40, 30))
        assert image.size == (20, 15)


def test_thumbnail_takes_a_small_layer(path, layers):
    with Image.open(path) as image:
        image.thumbnail((20, 15))
        assert image.size == (20, 15) and image.tell() == 1, "twice the size, then reduced"
        assert psnr(image, Image.fromarray(layers[1]).resize((20, 15), Image.Resampling.BICUBIC)) > 40
    with Image.open(path) as image:
        image.thumbnail((20, 15), reducing_gap=1.0)
        assert image.tell() == 0 and (np.asarray(image) == layers[0]).all()
        image.seek(2)
        assert image.size == (80, 60) and (np.asarray(image) == layers[2]).all()


def test_save(tmp_path, codec):
    picture, path = crop(24, 16), tmp_path / "x.cmps"
    picture.save(path, scales=[1, 3], quality=80)
    assert path.read_bytes() == codec.encode(picture, [1, 3], 80).data
    picture.save(path, scales=[1, 3], quality=[80, 40])
    with Image.open(path) as image:
        assert image.info["quality"] == 40
    buffer = io.BytesIO()
    picture.save(buffer, "CMPS")
    with Image.open(buffer) as image:
        assert image.info["scales"] == [1, 2, 4] and image.info["quality"] == 60 and image.size == (24, 16)


def test_alpha_and_metadata(tmp_path):
    picture = crop(24, 16).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((24, 16)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a portrait"
    path = tmp_path / "x.cmps"
    for wrong in ({"xmp": 5}, {"exif": "x"}, {"icc_profile": 1.5}):
        with pytest.raises(TypeError, match="bytes"):
            picture.save(path, **wrong)
    picture.save(path, scales=[1, 2], icc_profile=profile, exif=exif, xmp=b"<x:xmpmeta/>")
    with Image.open(path) as image:
        assert image.mode == "RGBA" and image.info["icc_profile"] == profile and image.info["xmp"] == b"<x:xmpmeta/>"
        assert image.getexif()[0x010E] == "a portrait"
        assert image.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
        image.seek(0)
        assert image.mode == "RGBA" and image.getchannel("A").size == (12, 8)
        image.save(tmp_path / "again.cmps", scales=[1])
        image.save(tmp_path / "shown.png")
    with Image.open(tmp_path / "again.cmps") as again:
        assert again.info["icc_profile"] == profile and "exif" not in again.info
    with Image.open(tmp_path / "shown.png") as shown:
        assert shown.mode == "RGBA" and shown.info["icc_profile"] == profile
    path.write_bytes(path.read_bytes()[:-1])
    with Image.open(path) as image:
        image.load()
        assert "xmp" not in image.info and "icc_profile" in image.info, "the last section was cut off"
    with Image.open(path) as image, pytest.raises(OSError, match="XMP is cut off"):
        image.verify()


def test_modes(tmp_path):
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = grey[:16] + b"GRAY" + grey[20:]
    for mode, kept in [("L", "RGB"), ("1", "RGB"), ("CMYK", "RGB"), ("LA", "RGBA"), ("P", "RGB")]:
        picture = crop(8, 8).convert(mode.replace("LA", "L"))
        if mode == "LA":
            picture.putalpha(128)
        picture.save(tmp_path / "x.cmps", scales=[1], icc_profile=grey)
        with Image.open(tmp_path / "x.cmps") as image:
            assert image.mode == kept and image.size == (8, 8) and "icc_profile" not in image.info
            image.load()


def test_bad_options_leave_no_file(tmp_path):
    path = tmp_path / "x.cmps"
    for options in ({"scales": [2, 1]}, {"quality": 0}, {"scales": []}):
        with pytest.raises(ValueError):
            crop(8, 8).save(path, **options)
    with pytest.raises(OSError, match="cannot write mode F"):
        Image.new("F", (8, 8)).save(path)
    assert not path.exists()


def test_a_file_that_was_cut_off(path, small_file, layers):
    ends = [entry.end for entry in container.read_header(small_file).layers]
    path.write_bytes(small_file[: ends[1] + 9])
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["layers"]) == (2, (40, 30), 3)
        assert (np.asarray(image) == layers[1]).all()
        with pytest.raises(EOFError):
            image.seek(2)
    path.write_bytes(small_file[: ends[0] - 1])
    with Image.open(path) as image:
        assert image.size == (20, 15)
        with pytest.raises(OSError, match="cut off"):
            image.load()
    path.write_bytes(small_file[:30])
    with pytest.raises(UnidentifiedImageError):
        Image.open(path)


def test_a_damaged_layer(path, small_file, layers):
    path.write_bytes(small_file[:-3] + bytes([small_file[-3] ^ 8]) + small_file[-2:])
    with Image.open(path) as image:
        with pytest.raises(OSError, match="layer 2 is damaged"):
            image.load()
        image.seek(1)
        assert (np.asarray(image) == layers[1]).all()


def test_verify(path, small_file):
    with Image.open(path) as image:
        image.verify()
    for data in (small_file[:-1], small_file[:-3] + bytes([small_file[-3] ^ 8]) + small_file[-2:]):
        path.write_bytes(data)
        with Image.open(path) as image, pytest.raises(OSError, match="layer 2 is"):
            image.verify()


@pytest.mark.parametrize("data", [b"CMPS", b"CMPS\x09" + bytes(200), b"CMPS\x01\xff" + bytes(200)])
def test_other_files_are_not_identified(data):
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))


def test_weights_that_are_not_here(small_file):
    header = container.read_header(small_file)
    parts = [container.payload(header, small_file, k) for k in range(3)]
    sizes = [(e.width, e.height) for e in header.layers]
    data = container.write("0123456789ab", sizes, [1, 2, 4], [50] * 3, parts)
    with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="0123456789ab"):
        image.load()


def test_the_limit_on_pixels_is_pillows_own():
    data = container.write("00" * 6, [(30_000, 30_000)], [1], [60], [b"x"])
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


@pytest.mark.parametrize("name", ["portrait", "dot"])
def test_files_are_closed(tmp_path, name):
    """One layer or many: nothing stays open behind the user's back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with Image.open(GOLDEN / f"{name}.cmps") as image:
            file = image.fp
            image.load()
        assert file.closed
    crop(8, 8).save(tmp_path / "one.cmps", scales=[1])
    image = Image.open(tmp_path / "one.cmps")
    file = image.fp
    image.load()
    assert file.closed


def test_closed_images_say_so(path):
    with Image.open(path) as image:
        image.seek(0)
    image.seek(1)
    with pytest.raises(ValueError, match="closed"):
        image.load()


def test_orientation_in_exif_turns_the_picture_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Cam"
    crop(24, 16).save(tmp_path / "in.jpg", exif=exif, quality=98)
    with Image.open(tmp_path / "in.jpg") as image:
        image.save(tmp_path / "x.cmps", scales=[1], quality=100, exif=image.info["exif"])
        upright = ImageOps.exif_transpose(image)
    with Image.open(tmp_path / "x.cmps") as made:
        assert made.getexif()[0x0112] == 1 and made.getexif()[0x010F] == "Cam"
        assert made.size == (16, 24) and psnr(made, upright) > 25


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_profiles_are_applied(tmp_path, codec, mode):
    picture = crop(24, 16).convert(mode)
    picture.info["icc_profile"] = profile(b"GRAY" if mode == "L" else b"CMYK")
    picture.save(tmp_path / "in.tif", icc_profile=picture.info["icc_profile"])
    source = pictures.read(tmp_path / "in.tif")
    picture.save(tmp_path / "x.cmps", scales=[1])
    with Image.open(tmp_path / "x.cmps") as image:
        assert "icc_profile" not in image.info and psnr(image, source.image) > 25
    assert (tmp_path / "x.cmps").read_bytes() == codec.encode(picture, [1]).data == codec.encode(source.image, [1]).data


def test_no_pixels_and_damaged_sources_are_oserrors(tmp_path):
    with pytest.raises(OSError, match="no pixels"):
        Image.new("RGB", (0, 0)).save(tmp_path / "x.cmps")
    crop(64, 48).save(tmp_path / "in.png")
    (tmp_path / "in.png").write_bytes((tmp_path / "in.png").read_bytes()[:-2000])
    with Image.open(tmp_path / "in.png") as image, pytest.raises(OSError):
        image.save(tmp_path / "x.cmps")
    assert not (tmp_path / "x.cmps").exists()
