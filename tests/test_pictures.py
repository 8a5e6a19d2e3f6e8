"""Pictures as they are: every mode, upright, with alpha, profile, EXIF and XMP; and written with all that again."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import crop, psnr
from PIL import Image, ImageCms, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from compass_codec import colour, metrics, pictures
from compass_codec.commands import values
from compass_codec.container import Sections
from compass_codec.errors import DamagedError, PictureError

SRGB = ImageCms.createProfile("sRGB")
ICC = ImageCms.ImageCmsProfile(SRGB).tobytes()
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/">é</x:xmpmeta>'.encode()
ORIENTATION, MAKER, WHEN = 0x0112, 271, 36867


def exif_bytes(orientation: int | None = None, order: str = ">") -> bytes:
    """A TIFF structure with maker, orientation, a sub-IFD and bytes that no tag describes."""
    entries = [struct.pack(f"{order}HHI4s", MAKER, 2, 4, b"Cam\0")]
    if orientation is not None:
        entries.append(struct.pack(f"{order}HHIHH", ORIENTATION, 3, 1, orientation, 0))
    sub = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries.append(struct.pack(f"{order}HHII", 0x8769, 4, 1, sub))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    first = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    second = struct.pack(f"{order}HHHIII", 1, WHEN, 2, 20, sub + 18, 0) + b"2020:02:02 02:02:02\0"
    return head + first + second + b"undescribed"


def profile(space: bytes) -> bytes:
    """An ICC profile of this colour space, built by hand: grey of gamma 2.2, or inks that darken evenly and are all
    grey, or else one for RGB that claims to be something else."""
    if space == b"GRAY":
        return built(space, b"kTRC", b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2))
    if space == b"CMYK":
        even = bytes(range(256))
        nodes = b"".join(bytes([max(0, 255 - 60 * (n & 7).bit_count() - 255 * (n >> 3 & 1)), 128, 128]) for n in INKS)
        table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
        return built(space, b"A2B0", table + 4 * even + nodes + 3 * even)
    return ICC[:16] + space + ICC[20:]


INKS = [c | m << 1 | y << 2 | k << 3 for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]


def built(space: bytes, name: bytes, content: bytes) -> bytes:
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    words = b"desc" + bytes(4) + struct.pack(">I", 5) + b"made\0" + bytes(79)
    parts = {b"desc": words, b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3), b"wtpt": white, name: content}
    tags, at, body = b"", 128 + 4 + 12 * len(parts), b""
    for tag, data in parts.items():
        tags += tag + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytearray(ICC[:128])
    head[0:4], head[16:20] = struct.pack(">I", at + len(body)), space
    if space == b"CMYK":
        head[12:16], head[20:24] = b"prtr", b"Lab "
    return bytes(head) + struct.pack(">I", len(parts)) + tags + body


def saved(image: Image.Image, name: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, name, **options)
    file.seek(0)
    return file


def read(image: Image.Image, name: str = "PNG", **options) -> pictures.Source:
    return pictures.read(saved(image, name, **options))


def mask(size: tuple[int, int]) -> Image.Image:
    """Half hidden, with a soft edge."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2, size[1]), fill=255)
    return image.filter(ImageFilter.GaussianBlur(2))


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("mode", "name", "note"),
    [
        ("RGB", "PNG", None),
        ("L", "PNG", "greyscale converted to RGB"),
        ("1", "PNG", "1-bit samples converted to RGB"),
        ("P", "PNG", "palette converted to RGB"),
        ("P", "GIF", "palette converted to RGB"),
        ("CMYK", "TIFF", "CMYK converted to RGB"),
        ("CMYK", "JPEG", "CMYK converted to RGB"),
        ("LAB", "TIFF", "LAB converted to RGB"),
    ],
)
def test_opaque_modes(mode, name, note):
    base = crop(20, 16)
    if mode == "LAB":
        image = ImageCms.profileToProfile(base, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
        image.info.clear()
    else:
        image = base.convert(mode, dither=Image.Dither.NONE)
    source = read(image, name)
    assert source.image.mode == "RGB" and source.image.size == (20, 16)
    assert (source.alpha, source.icc, source.exif, source.xmp) == (None, None, None, None)
    assert source.notes == ([note] if note else [])
    if name != "JPEG":
        assert (np.asarray(source.image) == np.asarray(pictures.to_rgb(image))).all()


@pytest.mark.parametrize(("mode", "name"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
@pytest.mark.parametrize("opaque", [False, True])
def test_modes_with_alpha(mode, name, opaque):
    image = crop(20, 16).convert(mode)
    image.putalpha(Image.new("L", image.size, 255) if opaque else mask(image.size))
    source = read(image, name, **({"lossless": True, "exact": True} if name == "WEBP" else {}))
    if opaque:
        assert source.alpha is None
    else:
        assert (np.asarray(source.alpha) == np.asarray(mask(image.size))).all()
    # colours are those of the file, not laid onto anything
    assert (np.asarray(source.image) == np.asarray(image.convert("RGBA"))[..., :3]).all()
    assert source.notes == (["greyscale converted to RGB"] if mode == "LA" else [])


def test_transparent_colours():
    """PNG's single transparent colour, in RGB, grey, 16-bit grey, and palettes, of PNG and GIF."""
    image = crop(20, 16)
    clear = image.getpixel((3, 3))
    source = read(image, transparency=clear)
    assert source.alpha.getpixel((3, 3)) == 0 and source.image.getpixel((3, 3)) == clear
    assert source.alpha.getextrema() == (0, 255)
    grey = image.convert("L")
    assert read(grey, transparency=grey.getpixel((3, 3))).alpha.getpixel((3, 3)) == 0
    source = read(deep(image), transparency=deep(image).getpixel((3, 3)))
    assert source.alpha.getpixel((3, 3)) == 0 and source.alpha.getextrema() == (0, 255)
    assert (np.asarray(source.image)[..., 0] == np.asarray(grey)).all()
    indexed = image.quantize(16)
    for name in ("PNG", "GIF"):
        assert read(indexed, name, transparency=indexed.getpixel((3, 3))).alpha.getpixel((3, 3)) == 0


def test_16_bits():
    base = crop(20, 16)
    note = "16-bit samples reduced to 8 bits"
    for name in ("PNG", "TIFF", "PPM"):
        source = read(deep(base), name)
        assert source.notes == [note, "greyscale converted to RGB"], name
        assert (np.asarray(source.image)[..., 1] == np.asarray(base.convert("L"))).all(), name
    ppm = b"P6 20 16 65535\n" + (np.asarray(base).astype(">u2") * 257).tobytes()
    source = pictures.read(io.BytesIO(ppm))
    assert source.notes == [note] and (np.asarray(source.image) == np.asarray(base)).all()


def test_16_bit_colour_png():
    """Which Pillow reads and does not write."""
    pixels = np.random.default_rng(2).integers(0, 65536, (5, 7, 4)).astype(">u2")
    for channels, kind in ((4, 6), (3, 2)):
        rows = b"".join(b"\0" + row.tobytes() for row in pixels[..., :channels])
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, kind, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        png = b"\x89PNG\r\n\x1a\n"
        for name, data in chunks:
            png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        source = pictures.read(io.BytesIO(png))
        assert source.notes == ["16-bit samples reduced to 8 bits"]
        assert (np.asarray(source.image) == pixels[..., :3] >> 8).all()
        assert source.alpha is None if channels == 3 else (np.asarray(source.alpha) == pixels[..., 3] >> 8).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    with pytest.raises(PictureError, match="32-bit samples"):
        read(crop(4, 4).convert("L").convert(mode), "TIFF")


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_are_refused(name):
    frames = [crop(20, 16), crop(20, 16).rotate(180)]
    with pytest.raises(PictureError, match="animation of 2 frames"):
        read(frames[0], name, save_all=True, append_images=frames[1:])
    read(frames[0], name, save_all=True)


@pytest.mark.parametrize("name", ["MPO", "TIFF"])
def test_several_pictures_that_are_no_animation(name):
    source = read(crop(20, 16), name, save_all=True, append_images=[crop(20, 16).rotate(180)])
    assert source.notes == ["only the first of 2 pictures in the file is taken"]
    assert np.abs(np.asarray(source.image).astype(int) - np.asarray(crop(20, 16))).mean() < 12


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied_and_reset(name, orientation, order):
    image = crop(24, 16)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)  # fmt: skip
    file = saved(image, name, exif=b"Exif\0\0" + exif_bytes(orientation, order))
    source = pictures.read(file)
    with Image.open(file) as shown:
        upright = shown.convert("RGB").transpose(turn) if turn is not None else shown.convert("RGB")
    assert (np.asarray(source.image) == np.asarray(upright)).all()
    assert source.exif == exif_bytes(1, order)  # one value, and not a byte beside it


def test_orientation_of_alpha():
    image = crop(24, 16).convert("RGBA")
    image.putalpha(mask(image.size))
    source = read(image, exif=b"Exif\0\0" + exif_bytes(6))
    assert (np.asarray(source.alpha) == np.asarray(mask(image.size).transpose(Image.Transpose.ROTATE_270))).all()


def test_orientation_of_a_wrong_type_is_reset_if_it_is_applied():
    usual = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    long = exif_bytes(6).replace(usual, struct.pack(">HHII", ORIENTATION, 4, 1, 6))
    source = read(crop(24, 16), exif=b"Exif\0\0" + long)
    assert source.image.size == (16, 24) and source.exif == exif_bytes(1)
    byte = exif_bytes(6).replace(usual, struct.pack(">HHIB3x", ORIENTATION, 1, 1, 6))
    source = read(crop(24, 16), exif=b"Exif\0\0" + byte)
    assert source.image.size == (24, 16) and source.exif == byte


def test_orientation_in_xmp_is_reset_as_well():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:title="A"/></x:xmpmeta>'
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    for options in ({}, {"exif": b"Exif\0\0" + exif_bytes(6)}):
        source = read(crop(24, 16), pnginfo=text, **options)
        assert source.image.size == (16, 24) and source.xmp == xmp.replace(b'tiff:Orientation="6"', b"")


def test_damaged_exif_is_left_out_and_said():
    good = exif_bytes(6)
    for bad in (b"garbage", good[:9], good[:15], b"XX" + good[2:], good[:4] + b"\xff\xff\xff\xff" + good[8:]):
        source = read(crop(8, 6), exif=b"Exif\0\0" + bad)
        assert source.exif is None and source.notes == ["damaged EXIF left out"], bad


def test_tiff_tags_become_exif():
    """Those that describe the picture, and none of those that say how a TIFF file lays out its samples."""
    tags = Image.Exif()
    tags[MAKER], tags[33432] = "Cam", "nobody"
    source = read(crop(8, 6), "TIFF", exif=tags, resolution=300)
    found = Image.Exif()
    found.load(source.exif)
    assert dict(found) == {MAKER: "Cam", 33432: "nobody"}
    assert read(crop(8, 6), "TIFF").exif is None


def test_rgb_profile_is_carried():
    for name in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF"):
        assert read(crop(8, 6), name, icc_profile=ICC).icc == ICC
    assert read(crop(8, 6).quantize(8), icc_profile=ICC).icc == ICC


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profile_is_applied_and_not_carried(mode):
    base = crop(20, 16)
    image = deep(base) if mode == "I;16" else base.convert(mode)
    if mode == "LA":
        image.putalpha(mask(image.size))
    source = read(image, icc_profile=profile(b"GRAY"))
    assert source.icc is None and source.notes[-1] == "greyscale converted to sRGB by its ICC profile"
    assert (source.alpha is None) == (mode != "LA")
    # gamma 2.2 and sRGB's curve are near each other, and not the same
    difference = np.abs(np.asarray(source.image)[..., 0].astype(int) - np.asarray(base.convert("L")))
    assert 0 < difference.max() < 12


@pytest.mark.parametrize("name", ["TIFF", "JPEG"])
def test_cmyk_profile_is_applied_and_not_carried(name):
    """The profile's inks are grey, which CMYK without a profile is not."""
    image = Image.new("CMYK", (24, 8))
    for k, inks in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (255, 255, 0, 0), (0, 0, 0, 255)]):
        image.paste(inks, (6 * k, 0, 6 * k + 6, 8))
    source = read(image, name, icc_profile=profile(b"CMYK"), **({"quality": 100} if name == "JPEG" else {}))
    assert source.icc is None and source.notes == ["CMYK converted to sRGB by its ICC profile"]
    white, cyan, blue, black = (source.image.getpixel((6 * k + 3, 4)) for k in range(4))
    for shade in (white, cyan, blue, black):
        assert max(shade) - min(shade) <= 3
    assert min(white) >= 252 and white > cyan > blue > black and max(black) <= 3
    plain = read(image, name)
    assert plain.notes == ["CMYK converted to RGB"] and plain.image.getpixel((9, 4))[0] < 5


def test_profiles_that_do_not_fit_are_left_out():
    for mode, name, space in (("RGB", "PNG", b"GRAY"), ("L", "TIFF", b"CMYK"), ("CMYK", "TIFF", b"RGB ")):
        source = read(crop(8, 6).convert(mode), name, icc_profile=profile(space))
        assert source.icc is None and "does not fit" in source.notes[-1], mode
    # a profile that lies about itself, and garbage
    for mode, icc in (("CMYK", profile(b"CMYK")[:200]), ("CMYK", b"x" * 200), ("RGB", b"short")):
        source = read(crop(8, 6).convert(mode), "TIFF", icc_profile=icc)
        assert source.icc is None and "left out" in source.notes[-1]


def test_rgb_profile_of_a_grey_picture_holds_for_rgb():
    assert read(crop(8, 6).convert("L"), "JPEG", icc_profile=ICC).icc == ICC


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "avif", "tif"])
def test_extras_go_into_the_file_byte_by_byte(name):
    extras = Sections(ICC, exif_bytes(), XMP)
    data = pictures.to_bytes(crop(24, 16), Path(f"x.{name}"), extras)
    source = pictures.read(io.BytesIO(data))
    assert source.icc == ICC and source.xmp == XMP and source.notes == []
    if name == "tif":  # TIFF has no block of EXIF: its tags become those of the file
        found = Image.Exif()
        found.load(source.exif)
        assert found[MAKER] == "Cam" and found.get_ifd(0x8769)[WHEN] == "2020:02:02 02:02:02"
    else:
        assert source.exif == extras.exif
    bare = pictures.read(io.BytesIO(pictures.to_bytes(crop(24, 16), Path(f"x.{name}"))))
    assert (bare.icc, bare.exif, bare.xmp) == (None, None, None)


def test_orientation_1_does_not_turn_what_is_written():
    for name in ("png", "jpg", "webp", "avif", "tif"):
        data = pictures.to_bytes(crop(24, 16), Path(f"x.{name}"), Sections(exif=exif_bytes(1)))
        source = pictures.read(io.BytesIO(data))
        assert source.image.size == (24, 16)
        assert np.abs(np.asarray(source.image).astype(int) - np.asarray(crop(24, 16))).mean() < 4


@pytest.mark.parametrize("name", ["png", "webp", "avif", "tif", "jpg", "ppm", "bmp"])
def test_alpha_is_written_or_laid_onto_white(name):
    image = crop(24, 16)
    image.putalpha(mask(image.size))
    source = pictures.read(io.BytesIO(pictures.to_bytes(image, Path(f"x.{name}"), Sections(icc=ICC))))
    if name in ("png", "webp", "avif", "tif"):
        assert np.abs(np.asarray(source.alpha).astype(int) - np.asarray(mask(image.size))).max() < 6
        assert source.icc == ICC
    else:
        assert source.alpha is None
        shown = np.asarray(pictures.flatten(image)).astype(int)
        assert np.abs(np.asarray(source.image) - shown).mean() < 2 and shown[:, -1].min() > 250


def test_lossy_outputs_are_good():
    image = crop(64, 48)
    for name, least in (("jpg", 36), ("webp", 33), ("avif", 36)):
        source = pictures.read(io.BytesIO(pictures.to_bytes(image, Path(f"x.{name}"))))
        assert metrics.psnr(np.asarray(image), np.asarray(source.image)) > least, name


def test_what_a_jpeg_cannot_hold_is_left_out():
    extras = Sections(icc=ICC + bytes(100_000), exif=exif_bytes() + bytes(66_000), xmp=XMP + b" " * 66_000)
    source = pictures.read(io.BytesIO(pictures.to_bytes(crop(8, 6), Path("x.jpg"), extras)))
    assert (source.exif, source.xmp) == (None, None) and len(source.icc) > 100_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["png", "jpg", "webp", "avif", "tif"])
def test_broken_metadata_never_keeps_a_picture_from_being_written(name):
    rng = np.random.default_rng(11)
    for _ in range(150 if name != "avif" else 25):
        exif, icc = bytearray(exif_bytes(1)), bytearray(ICC)
        for data in (exif, icc):
            for i in rng.integers(0, len(data), 3):
                data[i] = rng.choice([0, 1, 2, 255, rng.integers(256)])
        extras = Sections(bytes(icc), bytes(exif[: rng.integers(1, 2 * len(exif))]), b"\xff<x/>")
        source = pictures.read(io.BytesIO(pictures.to_bytes(crop(8, 6), Path(f"x.{name}"), extras)))
        assert source.image.size == (8, 6) and source.xmp == extras.xmp


def test_xmp_of_png_is_found_where_it_is():
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    assert read(crop(8, 6), pnginfo=text).xmp == XMP


SIZES = [(5, 4), (12, 8), (24, 16)]


def test_opaque_pyramid_is_what_it_was():
    image = crop(24, 16)
    layers, alphas = pictures.pyramid_alpha(pictures.Source(image), SIZES)
    assert alphas == []
    assert all((a == b).all() for a, b in zip(layers, pictures.pyramid(image, SIZES), strict=True))


def test_colours_do_not_bleed_out_of_what_is_hidden():
    """Red that shows, beside green that does not: no layer holds any green."""
    image = Image.new("RGB", (24, 16), (0, 255, 0))
    alpha = mask(image.size)
    image.paste((255, 0, 0), mask=alpha.point(lambda v: 255 * (v > 0)))
    layers, alphas = pictures.pyramid_alpha(pictures.Source(image, alpha), SIZES)
    for layer, a, (width, height) in zip(layers, alphas, SIZES, strict=True):
        assert layer.shape == (height, width, 3) and a.shape == (height, width) and layer.dtype == a.dtype == np.uint8
        assert (np.abs(layer.astype(int) - [255, 0, 0]) <= 1).all()
    assert (alphas[-1] == np.asarray(alpha)).all() and alphas[0].max() == 255 and alphas[0].min() == 0


@pytest.mark.parametrize("size", [(24, 16), (12, 8), (5, 4), (2, 2)])
def test_a_reduced_layer_has_no_colour_of_what_is_hidden(size):
    """Red that shows, beside green that does not: for encoders that mix the two, the hidden is red as well."""
    image = Image.new("RGBA", (24, 16), (0, 255, 0, 0))
    alpha = mask(image.size)
    image.paste((255, 0, 0), mask=alpha.point(lambda v: 255 * (v > 0)))
    image.putalpha(alpha)
    small = pictures.reduced(image, size)
    assert small.mode == "RGBA" and small.size == size
    assert (np.abs(np.asarray(small)[..., :3].astype(int) - [255, 0, 0]) <= 2).all()
    assert np.abs(np.asarray(small.getchannel("A")).mean() - np.asarray(alpha).mean()) < 9
    opaque = crop(24, 16)
    assert psnr(pictures.reduced(opaque, (12, 8)), opaque.resize((12, 8), Image.Resampling.BICUBIC)) > 40


def test_hidden_colours_do_not_bleed_through_a_lossy_encoder():
    image = crop(64, 48)
    hard = Image.new("L", image.size)
    ImageDraw.Draw(hard).ellipse((7, 5, 50, 40), fill=255)
    green = Image.composite(image, Image.new("RGB", image.size, (0, 255, 0)), hard)
    green.putalpha(hard)
    back = pictures.read(io.BytesIO(pictures.to_bytes(green, Path("x.webp")))).image
    edge = np.asarray(hard.filter(ImageFilter.MinFilter(3))) < np.asarray(hard)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image))[edge].mean() < 6


def test_what_shows_at_the_top_is_exact_and_what_does_not_is_smooth():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    picture, alpha = crop(64, 48), mask((64, 48))
    hidden = np.asarray(alpha) == 0
    pixels = np.where(hidden[..., None], noise, np.asarray(picture))
    (top,), _ = pictures.pyramid_alpha(pictures.Source(Image.fromarray(pixels), alpha), [(64, 48)])
    assert (top[~hidden] == np.asarray(picture)[~hidden]).all()

    def roughness(p):
        return np.abs(np.diff(p.astype(int), axis=1))[:, 40:].mean()

    assert hidden[:, 41:].all() and roughness(top) < 3 < 30 < roughness(pixels)


def test_composites_of_reduced_layers_are_reduced_composites():
    """What a viewer sees of a layer on any background is the picture on that background, reduced."""
    picture, alpha = crop(96, 64), mask((96, 64))
    (layer,), (a,) = pictures.pyramid_alpha(pictures.Source(picture, alpha), [(24, 16)])
    for background in ("white", "black", "blue"):
        whole = Image.composite(picture, Image.new("RGB", picture.size, background), alpha)
        expected = np.asarray(whole.resize((24, 16), Image.Resampling.BICUBIC)).astype(int)
        seen = Image.composite(Image.fromarray(layer), Image.new("RGB", (24, 16), background), Image.fromarray(a))
        assert np.abs(np.asarray(seen) - expected).max() <= 12 and np.abs(np.asarray(seen) - expected).mean() < 1


def test_a_picture_that_does_not_show_at_all():
    source = pictures.Source(crop(7, 5), Image.new("L", (7, 5)))
    layers, alphas = pictures.pyramid_alpha(source, [(1, 1), (3, 2), (7, 5)])
    assert all((layer == 128).all() for layer in layers) and not any(a.any() for a in alphas)


def planes():
    rng = np.random.default_rng(3)
    for shape in ((1, 1), (1, 9), (37, 23), (64, 64)):
        yield np.full(shape, 77, np.uint8)
        yield rng.integers(0, 256, shape, np.uint8)
        yield 255 * (rng.random(shape) < 0.5).astype(np.uint8)
    yield np.asarray(mask((64, 48)))
    yield (np.arange(16384) % 251).astype(np.uint8)[None]  # wider than a WebP
    yield (np.arange(16383) % 251).astype(np.uint8)[:, None]


def test_alpha_is_coded_without_loss():
    for plane in planes():
        data = pictures.alpha_to_bytes(plane)
        back = pictures.alpha_from_bytes(data, plane.shape[::-1])
        assert back.dtype == np.uint8 and (back == plane).all()
        assert len(data) <= len(saved(Image.fromarray(plane), "PNG", optimize=True).getvalue())
        if max(plane.shape) <= 16383:
            webp = saved(Image.fromarray(plane).convert("RGB"), "WEBP", lossless=True, quality=100)
            assert len(data) <= len(webp.getvalue())


def test_alpha_of_another_size_or_format_is_refused_before_it_is_decoded(monkeypatch):
    plane = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    webp = saved(plane.convert("RGB"), "WEBP", lossless=True).getvalue()
    bomb = bytearray(saved(plane, "PNG").getvalue())
    bomb[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    refused = [
        b"",
        webp[:24],
        bytes(bomb),
        webp[:21] + b"\xff\xff\xff\x0f" + webp[25:],  # 16384 x 16384
        saved(plane, "GIF").getvalue(),
        saved(plane, "JPEG").getvalue(),
        saved(plane.convert("RGB"), "PNG").getvalue(),
        saved(plane.convert("P"), "PNG").getvalue(),
        saved(deep(plane), "PNG").getvalue(),
        saved(plane.convert("RGB"), "WEBP").getvalue(),  # lossy
        saved(plane.resize((3, 4)), "PNG").getvalue(),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *a, **k: pytest.fail("decoded"))
        for data in refused:
            with pytest.raises(DamagedError):
                pictures.alpha_from_bytes(data, (4, 3))
    assert (pictures.alpha_from_bytes(saved(plane, "PNG").getvalue(), (4, 3)) == np.asarray(plane)).all()


def test_damaged_alpha_is_one_clean_error():
    rng = np.random.default_rng(5)
    plane = np.asarray(mask((40, 30)))
    refused = 0
    image = Image.fromarray(plane)
    for data in (saved(image.convert("RGB"), "WEBP", lossless=True).getvalue(), saved(image, "PNG").getvalue()):
        for case in range(300):
            broken = bytearray(data[: rng.integers(1, len(data))] if case % 2 else data)
            for i in rng.integers(0, len(broken), 3):
                broken[i] = rng.integers(256)
            try:
                assert pictures.alpha_from_bytes(bytes(broken), (40, 30)).shape == (30, 40)
            except DamagedError as e:
                assert "\n" not in str(e)
                refused += 1
    assert refused > 300


def test_with_alpha():
    rgb = np.asarray(crop(6, 5))
    assert pictures.with_alpha(rgb, None).mode == "RGB"
    image = pictures.with_alpha(rgb, np.full((5, 6), 9, np.uint8))
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (*rgb[0, 0], 9)


def tiff(samples: np.ndarray, order: str, photometric: int, bits: int = 16) -> io.BytesIO:
    """A grey TIFF, built by hand: Pillow writes neither byte order nor WhiteIsZero by choice."""
    height, width = samples.shape
    pixels = samples.astype(f"{order}u2").tobytes()
    if bits == 12:
        pixels = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in samples.reshape(-1, 2).tolist())
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (274, 6)]
    tags += [(277, 1), (278, height), (279, len(pixels))]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    table = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return io.BytesIO(head + pixels + struct.pack(f"{order}H", len(tags)) + table + bytes(4))


@pytest.mark.parametrize(
    ("order", "photometric", "bits"), [("<", 1, 16), (">", 1, 16), ("<", 0, 16), (">", 0, 16), ("<", 1, 12)]
)
def test_grey_tiffs_of_all_kinds(order, photometric, bits):
    grey = np.asarray(crop(20, 16).convert("L")).astype(np.uint16)
    samples = grey * 257 if bits == 16 else grey * 16 + grey // 16
    stored = 65535 - samples if photometric == 0 else samples
    source = pictures.read(tiff(stored, order, photometric, bits))
    assert (np.asarray(source.image)[..., 0] == np.rot90(grey, -1)).all()  # and upright
    assert source.notes == ["16-bit samples reduced to 8 bits", "greyscale converted to RGB"]


def test_signed_samples_are_refused():
    data = tiff(np.zeros((16, 20)), "<", 1).getvalue()
    signed = data.replace(struct.pack("<HHIHH", 277, 3, 1, 1, 0), struct.pack("<HHIHH", 339, 3, 1, 2, 0))
    with pytest.raises(PictureError, match="signed"):
        pictures.read(io.BytesIO(signed))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_byte_orders_of_16_bits_in_memory(mode):
    grey = np.asarray(crop(8, 6).convert("L")).astype(np.uint16) * 257
    image = Image.frombytes(mode, (8, 6), grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert (np.asarray(pictures.split(image).image)[..., 2] == grey >> 8).all()


def png(bits: int, kind: int, rows: bytes, size: tuple[int, int], *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    head = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]:
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return io.BytesIO(made)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_grey_of_any_depth(bits):
    values = np.arange(32) // 8 % 2**bits
    row = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - bits :]
    rows = (b"\0" + np.packbits(row).tobytes()) * 3
    source = pictures.read(png(bits, 0, rows, (32, 3), (b"tRNS", b"\0\1")))
    assert (np.asarray(source.alpha) == np.where(values == 1, 0, 255)).all()


def test_the_transparent_colour_of_16_bits():
    pixels = np.array([[[1000, 2000, 3000], [40000, 50000, 60000]]])
    rows = b"\0" + pixels.astype(">u2").tobytes()
    source = pictures.read(png(16, 2, rows, (2, 1), (b"tRNS", struct.pack(">3H", 40000, 50000, 60000))))
    assert np.asarray(source.alpha).tolist() == [[255, 0]] and "compared in 8 bits" in source.notes[1]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_jpeg_without_its_end_marker(tmp_path, options):
    data = saved(crop(40, 24), "JPEG", **options).getvalue()
    source = pictures.read(io.BytesIO(data[:-2]))
    assert source.notes == ["the end marker is missing"]
    assert (np.asarray(source.image) == np.asarray(pictures.read(io.BytesIO(data)).image)).all()
    (tmp_path / "x.jpg").write_bytes(data[:-1])  # half of the marker
    assert (np.asarray(pictures.read(tmp_path / "x.jpg").image) == np.asarray(source.image)).all()
    for cut in (len(data) - 12, len(data) - 60, len(data) * 2 // 3):
        with pytest.raises(PictureError, match=r"(?i)truncated"):
            pictures.read(io.BytesIO(data[:cut]))


def test_a_picture_without_pixels_is_refused():
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(PictureError, match="no pixels"):
            pictures.split(Image.new("RGB", size))


def converted(image: Image.Image, icc: bytes) -> np.ndarray:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return np.asarray(ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")).astype(int)


def test_gamma_of_a_png_becomes_a_profile():
    """A picture of linear light looks as libpng's users show it."""
    grey = np.asarray(crop(20, 16))[..., 0]
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    linear = pictures.read(png(8, 0, rows, (20, 16), (b"gAMA", struct.pack(">I", 100_000))))
    expected = 255 * np.where(grey > 0, 1.055 * (grey / 255) ** (1 / 2.4) - 0.055, 0)
    assert np.abs(converted(linear.image, linear.icc)[..., 0] - expected)[grey > 3].max() < 2
    assert "gAMA" in linear.notes[0]
    for chunks in ([(b"gAMA", struct.pack(">I", 45455))], [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))]):
        source = pictures.read(png(8, 0, rows, (20, 16), *chunks))
        assert source.icc is None and source.notes == ["greyscale converted to RGB"]
    senseless = pictures.read(png(8, 0, rows, (20, 16), (b"cHRM", bytes(32))))
    assert senseless.icc is None and "make no sense" in senseless.notes[0]


P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def p3_as_srgb(pixels: np.ndarray) -> np.ndarray:
    """Display P3 to sRGB, with the matrix of CSS Color 4's sample code."""
    light = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    matrix = [[1.2249401, -0.2249402, 0], [-0.0420570, 1.0420571, 0], [-0.0196376, -0.0786361, 1.0982736]]
    light = (light @ np.array(matrix).T).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def test_primaries_of_a_png_and_an_avif_become_a_profile():
    picture = np.array(crop(20, 16))
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    said = [(b"cHRM", struct.pack(">8I", *P3))], [(b"cICP", b"\x0c\x0d\0\1"), (b"sRGB", b"\0")]
    sources = [pictures.read(png(8, 2, rows, (20, 16), *chunks)) for chunks in said]
    avif = saved(crop(20, 16), "AVIF", subsampling="4:4:4", quality=100).getvalue()
    source = pictures.read(io.BytesIO(avif))
    assert source.icc is None and source.notes == []
    sources.append(pictures.read(io.BytesIO(avif.replace(b"colrnclx\0\x01", b"colrnclx\0\x0c"))))
    for source in sources:
        expected = p3_as_srgb(np.asarray(source.image) / 255)
        assert np.abs(converted(source.image, source.icc) - expected).max() < 3
        assert source.notes[0].endswith("is kept as an ICC profile")
    assert pictures.read(png(8, 2, rows, (20, 16), (b"cICP", b"\x01\x0d\0\1"))).icc is None
    hdr = pictures.read(png(8, 2, rows, (20, 16), (b"cICP", b"\x09\x10\0\1")))
    assert hdr.icc is None and "code points 9, 16" in hdr.notes[0]


@pytest.mark.parametrize("name", ["ppm", "bmp", "tga", "jp2", "qoi"])
def test_a_format_without_profiles_gets_srgb(name):
    image, notes = crop(20, 16), []
    wide = colour.matrix_profile([v / 100_000 for v in P3], None)
    data = pictures.to_bytes(image, Path(f"x.{name}"), Sections(icc=wide, exif=exif_bytes()), notes)
    shown = np.asarray(pictures.read(io.BytesIO(data)).image)
    assert (shown == converted(image, wide)).all() and (shown != np.asarray(image)).any()
    assert notes == [
        f"converted to sRGB, for .{name} keeps no ICC profile",
        f"EXIF left out, which .{name} does not hold",
    ]
    notes = []
    same = pictures.to_bytes(image, Path(f"x.{name}"), Sections(icc=ICC), notes)
    assert (np.asarray(pictures.read(io.BytesIO(same)).image) == np.asarray(image)).all() and notes == []


def with_dimensions(width: int, height: int, order: str = ">") -> bytes:
    """EXIF with the size of the picture, in both directories."""
    first = [(0x0100, 4, width), (0x0101, 4, height), (0x8769, 4, 8 + 2 + 36 + 4)]
    second = [(0xA002, 3, width), (0xA003, 4, height)]
    made = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    for entries in (first, second):
        made += struct.pack(f"{order}H", len(entries))
        for tag, kind, value in entries:
            field = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
            made += struct.pack(f"{order}HHI", tag, kind, 1) + field
        made += bytes(4)
    return made


@pytest.mark.parametrize("order", "<>")
def test_dimensions_in_exif_are_those_of_the_picture(order):
    source = read(crop(24, 16), exif=b"Exif\0\0" + with_dimensions(24, 16, order))
    assert source.exif == with_dimensions(24, 16, order), "not a byte was touched"
    for name in ("png", "jpg", "webp", "avif"):
        small = pictures.to_bytes(crop(12, 8), Path(f"x.{name}"), Sections(exif=source.exif))
        tags = Image.open(io.BytesIO(small)).getexif()
        sizes = tags[0x0100], tags[0x0101], tags.get_ifd(0x8769)[0xA002], tags.get_ifd(0x8769)[0xA003]
        assert sizes == (12, 8, 12, 8), name


def test_extended_xmp_and_iptc_are_told():
    pointer = b'<x:xmpmeta><rdf:Description xmpNote:HasExtendedXMP="0123456789ABCDEF" dc:title="A"/></x:xmpmeta>'
    source = read(crop(8, 6), "JPEG", xmp=pointer)
    assert source.xmp == b'<x:xmpmeta><rdf:Description dc:title="A"/></x:xmpmeta>'
    assert source.notes == ["extended XMP left out; the main part is kept"]
    data = saved(crop(8, 6), "JPEG").getvalue()
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x08\x1c\x02\x05\0\x03abc"
    iptc = data[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert pictures.read(io.BytesIO(iptc)).notes == ["IPTC left out"]


@pytest.mark.parametrize(
    "suffix", ["wmf", "h5", "bufr", "grib", "xbm", "blp", "pgm", "pbm", "pfm", "bw", "rgba", "mpo", "x"]
)
def test_formats_that_cannot_work_are_refused_by_name(suffix):
    with pytest.raises(PictureError) as caught:
        pictures.check_format(Path(f"x.{suffix}"))
    assert suffix in str(caught.value)


@pytest.mark.parametrize("text", ["a.png", "", ".", "png/a", "png\n"])
def test_what_is_no_extension(text):
    with pytest.raises(ValueError):
        values.extension(text)
    assert values.extension("PNG") == values.extension(".PNG") == ".PNG"


def test_formats_that_work_are_not_refused():
    for suffix in ("png", "jpg", "webp", "avif", "tif", "ppm", "bmp", "gif", "tga", "qoi", "jp2", "pnm", "rgb"):
        pictures.check_format(Path(f"x.{suffix.upper()}"))
    assert pictures.to_bytes(crop(8, 6), Path("x.j2k"))[:4] == b"\xff\x4f\xff\x51"
    assert pictures.to_bytes(crop(8, 6), Path("x.jp2"))[4:8] == b"jP  "


def test_heic_is_read_and_written():
    pictures.register()
    image = crop(24, 16)
    image.putalpha(mask(image.size))
    data = pictures.to_bytes(image, Path("x.heic"), Sections(icc=ICC, exif=exif_bytes(1), xmp=XMP))
    source = pictures.read(io.BytesIO(data))
    assert data[4:11] == b"ftyphei" and (source.icc, source.exif, source.xmp) == (ICC, exif_bytes(1), XMP)
    assert np.abs(np.asarray(source.alpha).astype(int) - np.asarray(mask(image.size))).max() < 6


def test_psnr_counts_what_shows():
    rng = np.random.default_rng(4)
    a, b = (rng.integers(0, 256, (6, 7, 3), np.uint8) for _ in range(2))
    alpha = np.zeros((6, 7), np.uint8)
    assert metrics.psnr(a, b, alpha) == np.inf
    alpha[2:4] = 77
    assert metrics.psnr(a, b, alpha) == pytest.approx(metrics.psnr(a[2:4], b[2:4]))
    alpha[2] = 154
    errors = [((a[row].astype(int) - b[row]) ** 2).mean() for row in (2, 2, 3)]
    assert metrics.psnr(a, b, alpha) == pytest.approx(10 * np.log10(255**2 / np.mean(errors)))


def test_deeper_samples_of_heic_and_jpeg_2000_are_told():
    import pillow_heif

    pixels = (np.asarray(crop(24, 16)).astype(np.uint16) * 257).tobytes()
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (24, 16), pixels).save(file, quality=95)
    source = pictures.read(file)
    assert source.notes == ["10-bit samples reduced to 8 bits"] and psnr(source.image, crop(24, 16)) > 30
    data = pictures.to_bytes(crop(24, 16), Path("x.j2k"))
    assert pictures.read(io.BytesIO(data)).notes == []
    image = Image.open(io.BytesIO(data))
    assert pictures._bits(image, data) == 8 and pictures._bits(image, data[:42] + b"\x0f" + data[43:]) == 16


def test_icns_holds_one_size(tmp_path):
    """Pillow fills the file up with enlarged pictures, which would be read in place of this one."""
    name = tmp_path / "a.icns"
    assert Image.open(io.BytesIO(pictures.to_bytes(Image.new("RGB", (1024, 1024)), name))).size == (1024, 1024)
    with pytest.raises(PictureError, match="ICNS cannot hold a picture of 32 x 32"):
        pictures.to_bytes(Image.new("RGB", (32, 32)), name)
