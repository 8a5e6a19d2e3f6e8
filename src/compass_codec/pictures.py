"""Picture files to arrays and back, through Pillow: colours, alpha, profiles, EXIF and XMP."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from compass_codec import colour
from compass_codec.errors import CompassError, DamagedError, PictureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.container import Sections


HEIC = re.compile(rb".{4}ftyp(?:.{4}){0,16}?he[iv][cxms]", re.DOTALL)  # how a file begins
HEIC_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
NEEDS_HEIF = 'needs pillow-heif: pip install "compass_codec[heic]"'
ANIMATED = {"GIF", "PNG", "WEBP", "AVIF", "JXL"}  # formats whose further frames are an animation
WITH_ALPHA = {"PNG", "WEBP", "AVIF", "HEIF", "TIFF", "JPEG2000"}
WITH_EXTRAS = {"PNG", "JPEG", "WEBP", "AVIF", "HEIF", "TIFF"}
NOT_WRITTEN = dict.fromkeys((".pgm", ".pbm", ".bw"), "pictures have colours") | {
    ".pfm": "it holds floating point",
    ".rgba": "it always has alpha",
    ".mpo": "it holds several pictures",
    ".cmps": "it is what is decoded",
}
CODESTREAMS = {".j2k", ".j2c", ".jpc"}  # of JPEG 2000, without the boxes around
SAVING: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90, "subsampling": "4:4:4"},
    "HEIF": {"quality": 90, "chroma": 444},
}
WEBP_SIDE = 16383  # the largest side of a WebP picture
MARKER = 65533  # bytes that a JPEG marker holds
GREYS = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}
WORDS = {"P": "palette", "PA": "palette", "1": "1-bit samples"} | dict.fromkeys(GREYS - {"1"}, "greyscale")
IFDS = (0x8769, 0x8825)  # tags that point to the EXIF and GPS tags
ORIENTATION, XMP_TAG, BITS, PHOTOMETRIC = 0x0112, 700, 258, 262
DIMENSIONS = (0x0100, 0x0101, 0xA002, 0xA003)  # width and height in pixels, of TIFF and of EXIF
# where a packet of XMP points to more, which other markers of a JPEG hold
EXTENDED = re.compile(rb"\s*xmpNote:HasExtendedXMP\s*=\s*(\"[^\"]*\"|'[^']*')|<xmpNote:HasExtendedXMP>[^<]*</[^>]*>")
HEAD = 1 << 20  # bytes, in which a file says what its colours are
DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 316, 33432, *IFDS)  # words, device, time, owner


@contextmanager
def library(what: str, kind: type[CompassError] = PictureError) -> Iterator[None]:
    """Wraps every call of a library that reads or writes a picture: any error becomes one of ``kind`` that names
    ``what`` is wrong and why.

    No list of exceptions would do. Pillow and its plugins raise whatever their parsers stumble over (RuntimeError,
    IndexError, struct.error, ...), and those in Rust panics that are no Exception.
    """
    try:
        with warnings.catch_warnings():
            # of bad metadata, which the notes tell, and of size, where an error follows at twice as much
            warnings.simplefilter("ignore")
            yield
    except (CompassError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except UnidentifiedImageError as e:
        raise kind("not a picture that Pillow can read") from e
    except Image.DecompressionBombError as e:
        raise kind(f"the picture is too large ({str(e).split(', could')[0]})") from e
    except MemoryError as e:
        raise kind("not enough memory") from e
    except BaseException as e:
        raise kind(getattr(e, "strerror", None) or f"{what} ({str(e) or type(e).__name__})") from e


@dataclass(frozen=True)
class Source:
    """A picture that was read. ``image`` is 8-bit RGB and upright; ``alpha`` is L of the same size, or None for an
    opaque picture. EXIF has orientation 1. ``notes`` has a sentence for each conversion."""

    image: Image.Image
    alpha: Image.Image | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: list[str] = field(default_factory=list)


def read(path: Path | BinaryIO) -> Source:
    """Open a picture, upright as its EXIF orientation says. CMYK and grey profiles are applied; the RGB pixels are then
    sRGB and carry none. Raises PictureError; also for an animation and for samples of 32 bits."""
    register()
    with library("damaged picture"), path.open("rb") if isinstance(path, Path) else nullcontext(path) as opened:
        file = opened if opened.seekable() else io.BytesIO(opened.read())  # a pipe is read once
        file.seek(0)
        head = file.read(HEAD)
        if "HEIF" not in Image.OPEN and HEIC.match(head):
            raise PictureError(f"a HEIC picture, which {NEEDS_HEIF}")
        notes: list[str] = []
        with Image.open(file) as image:
            return from_image(_loaded(image, head, notes), notes)


def _loaded(image: Image.Image, head: bytes, notes: list[str]) -> Image.Image:
    """The picture of an opened file, corrected where Pillow loses or misreads something; ``head`` is its first
    bytes."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        if image.format in ANIMATED:
            raise PictureError(f"an animation of {frames} frames; only still pictures can be coded")
        notes.append(f"only the first of {frames} pictures in the file is taken")
    # Pillow reduces RGB to 8 bits while it reads; only the layout of the file's samples tells
    layout = [str(tile[3]) for tile in getattr(image, "tile", ())]
    deep = any(";16" in text for text in layout)
    deep = deep or any(tile[0] == "ppm" and tile[3][-1] > 255 for tile in getattr(image, "tile", ()))
    if any("16S" in text or "16BS" in text for text in layout):
        raise PictureError("signed samples are not supported")
    _load(image, notes)
    image.info["icc_profile"] = colour.said_profile(image, head, notes)
    if _has_iptc(image):
        notes.append("IPTC left out")
    if image.mode == "I" and deep:
        image = image.convert("I;16")
    bits = 16 if deep or image.mode.startswith("I;16") else _bits(image, head)
    if bits > 8:
        notes.append(f"{bits}-bit samples reduced to 8 bits")
    clear = image.info.get("transparency")
    if isinstance(clear, int) and layout in (["L;2"], ["L;4"]):  # of a PNG: Pillow stretches the samples and not this
        image.info["transparency"] = clear * (85 if layout == ["L;2"] else 17)
    elif isinstance(clear, tuple) and deep:
        image.info["transparency"] = tuple(v >> 8 for v in clear)
        notes.append("the transparent colour is compared in 8 bits")
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") and (tags.get(BITS) == (12,) or tags.get(PHOTOMETRIC) == 0):
        import numpy as np

        samples = np.asarray(image)
        samples = samples << 4 | samples >> 8 if tags.get(BITS) == (12,) else samples
        image.im = Image.fromarray(~samples if tags.get(PHOTOMETRIC) == 0 else samples).im
    return image


def _load(image: Image.Image, notes: list[str]) -> None:
    """Load the pixels. A JPEG that lacks only its end marker is read, as other programs do, with a note. Raises
    anything."""
    try:
        image.load()
    except OSError:
        file = getattr(image, "fp", None)
        if image.format != "JPEG" or file is None:
            raise
        file.seek(0)
        data = file.read().rstrip(b"\xff")  # of half a marker
        # a decoder takes what it misses from whatever follows: where nothing is missing, that does not matter
        endings = b"", b"\xb5\x5a\x3c\xc3" * 64
        whole, other = (Image.open(io.BytesIO(data + ending + b"\xff\xd9")) for ending in endings)
        if whole.tobytes() != other.tobytes():
            raise
        image.im = whole.im
        image.tile = []  # type: ignore[attr-defined]
        notes.append("the end marker is missing")


def _bits(image: Image.Image, head: bytes) -> int:
    """Bits of a sample in an AVIF, HEIC or JPEG 2000 file, of which Pillow gives 8; 8 if the file does not say."""
    if image.format in ("AVIF", "HEIF") and (at := head.find(b"pixi")) > 0:
        return head[at + 9]
    if image.format == "JPEG2000" and image.mode not in ("L", "I;16"):
        at = head.find(b"\xff\x4f\xff\x51")
        return (head[at + 42] & 0x7F) + 1
    return 8


def _has_iptc(image: Image.Image) -> bool:
    """Whether a JPEG, TIFF or PNG file has IPTC."""
    info, tags = image.info, getattr(image, "tag_v2", {})
    blocks = info.get("photoshop")
    return (isinstance(blocks, dict) and 0x0404 in blocks) or 33723 in tags or "Raw profile type iptc" in info


def from_image(image: Image.Image, notes: list[str] | None = None) -> Source:
    """A Pillow image as a source: its pixels (see ``split``) upright, and the profile, EXIF and XMP in its ``info``.
    ``notes`` go before those of the conversion. Raises PictureError."""
    notes = [] if notes is None else notes
    exif = None
    with library("damaged picture"):
        image.load()
        try:
            original, image = image, ImageOps.exif_transpose(image)
            exif = _exif(original, image.size)
        except Exception:  # Pillow's reader has no error of its own for bad EXIF; the pixels are sound
            notes.append("damaged EXIF left out")
        xmp = image.info.get("xmp")
        xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp) if xmp else None
        if xmp and EXTENDED.search(xmp):
            xmp = EXTENDED.sub(b"", xmp)
            notes.append("extended XMP left out; the main part is kept")
        return replace(split(image, notes), exif=exif, xmp=xmp)


def _to_rgba(image: Image.Image) -> Image.Image | None:
    """The picture with its transparency, or None if it has none."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I;16"):
        import numpy as np

        shown = np.asarray(image) != image.info["transparency"]
        alpha = Image.fromarray(255 * shown.astype(np.uint8))
        return Image.merge("RGBA", [_upper_bits(image)] * 3 + [alpha])
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey of either byte order as L: the upper 8 bits."""
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _to_srgb(image: Image.Image, rgb: Image.Image, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """``rgb`` and the profile that holds for it. A profile of ``image`` that is not for RGB is applied and dropped."""
    icc = image.info.get("icc_profile") or None
    space = "GRAY" if image.mode in GREYS else image.mode if image.mode in ("CMYK", "LAB", "HSV") else "RGB"
    if not image.mode.startswith("RGB"):
        notes.append(f"{WORDS.get(image.mode, image.mode)} converted to RGB")
    if icc is None or (icc[16:20] == b"RGB " and space in ("RGB", "GRAY")):
        return rgb, icc
    if icc[16:20].decode("latin1").strip() == space and space in ("GRAY", "CMYK"):
        converted = colour.apply_profile(rgb.convert("L") if space == "GRAY" else image, icc)
        if converted is not None:
            notes[-1] = f"{notes[-1].removesuffix('RGB')}sRGB by its ICC profile"
            return converted, None
    notes.append("ICC profile left out, which does not fit the picture")
    return rgb, None


def _descriptive(exif: Image.Exif) -> Image.Exif:
    """The tags that describe the picture. In a TIFF file, the layout of the samples is among the same tags."""
    tags = Image.Exif()
    for tag in DESCRIPTIVE:
        if value := exif.get_ifd(tag) if tag in IFDS else exif.get(tag):
            tags[tag] = value
    return tags


def _exif(image: Image.Image, size: tuple[int, int]) -> bytes | None:
    """EXIF as a TIFF structure for a picture of ``size`` that is upright. Raises anything on garbage."""
    exif = image.info.get("exif")
    if not exif:
        tags = _descriptive(image.getexif())
        exif = tags.tobytes() if tags else b""
    exif = exif.removeprefix(b"Exif\0\0")
    return fitted(exif, size) if exif else None


def fitted(exif: bytes, size: tuple[int, int]) -> bytes:
    """EXIF, a TIFF structure, with orientation 1 and the pixel dimensions ``size`` (width, height) where it has these
    tags. All other bytes stay. Raises anything on garbage."""
    data = bytearray(exif)
    order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
    values = dict(zip(DIMENSIONS, 2 * size, strict=True)) | {ORIENTATION: 1}

    def fit(at: int) -> int | None:
        """Correct the tags of the directory ``at``; returns the place of the EXIF directory, if it is named there."""
        (count,) = struct.unpack_from(f"{order}H", data, at)
        found = None
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
            # a short, or a long, which Pillow applies as well
            if tag not in (*values, IFDS[0]) or kind not in (3, 4) or length != 1:
                continue
            (value,) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, entry + 8)
            if tag == IFDS[0]:
                found = value
            elif tag == ORIENTATION:
                struct.pack_into(f"{order}HIHH", data, entry + 2, 3, 1, 1, 0)
            elif value != values[tag]:
                struct.pack_into(f"{order}HII", data, entry + 2, 4, 1, values[tag])
        return found

    if more := fit(struct.unpack_from(f"{order}I", data, 4)[0]):
        with suppress(struct.error):  # where a part is damaged, the rest is not
            fit(more)
    return bytes(data)


def split(image: Image.Image, notes: list[str] | None = None) -> Source:
    """The pixels of a Pillow image: RGB and, unless it is opaque, alpha. Its profile is carried if it is for RGB, else
    applied; ``notes`` say so. Raises PictureError; also for samples of 32 bits and where there are no pixels."""
    notes = [] if notes is None else notes
    if not (image.width and image.height):
        raise PictureError(f"a picture of {image.width} x {image.height} has no pixels")
    with library("damaged picture"):
        image.load()
        rgba = _to_rgba(image)
        alpha = rgba.getchannel("A") if rgba else None
        rgb, icc = _to_srgb(image, rgba.convert("RGB") if rgba else to_rgb(image), notes)
        opaque = alpha is None or alpha.getextrema() == (255, 255)
        return Source(rgb, None if opaque else alpha, icc, notes=notes)


def as_image(picture: object) -> Image.Image:
    """A Pillow image as it is, an array (uint8 [height, width, 3], or 4 with alpha, or 1, or [height, width]) as such.
    Raises PictureError for anything else."""
    if isinstance(picture, Image.Image):
        return picture
    import numpy as np

    with library("neither a Pillow image nor an array of pixels"):
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 and pixels.ndim:
            raise PictureError(f"an array of {pixels.dtype}; pixels are uint8")
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def check_layers(layers: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The layers if each is uint8 [height, width, 3] with pixels, and none is smaller than one before. Raises
    PictureError."""
    import numpy as np

    with library("not an array of pixels"):
        arrays = [np.require(layer, requirements="W") for layer in layers]  # PyTorch takes no others
    for k, layer in enumerate(arrays):
        if layer.dtype != np.uint8 or layer.ndim != 3 or layer.shape[2] != 3 or not layer.size:
            raise PictureError(f"layer {k} is {layer.dtype} {[*layer.shape]}; layers are uint8 [height, width, 3]")
        if k and (layer.shape[0] < arrays[k - 1].shape[0] or layer.shape[1] < arrays[k - 1].shape[1]):
            raise PictureError(f"layer {k} is smaller than layer {k - 1}")
    return arrays


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is flattened onto white, 16-bit samples keep their upper 8 bits."""
    if image.mode.startswith("I;16"):
        image = _upper_bits(image)
    elif image.mode in ("I", "F"):
        raise PictureError(f"pictures of mode {image.mode} (32-bit samples) are not supported")
    return flatten(image) if image.has_transparency_data else image.convert("RGB")


def pyramid(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """The picture reduced to each (width, height), bicubic, as uint8 [height, width, 3]."""
    import numpy as np

    return [np.array(_resized(image, s)) for s in sizes]


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pyramid_alpha(
    source: Source, sizes: Sequence[tuple[int, int]]
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """The picture reduced to each (width, height): colours as uint8 [height, width, 3], and alpha as uint8
    [height, width]; no alpha where the picture is opaque.

    Colours are weighted by their alpha. Where the picture is transparent they are made smooth, to cost few bits.
    """
    import numpy as np

    if source.alpha is None:
        return pyramid(source.image, sizes), []
    alphas = [np.array(_resized(source.alpha, s)) for s in sizes]
    layers = [np.empty((height, width, 3), np.uint8) for width, height in sizes]
    weight = source.alpha.convert("F")
    for channel, band in enumerate(source.image.split()):
        values = np.asarray(band, np.float32)
        weighted = Image.fromarray(values * np.asarray(weight))
        for layer, alpha, size in zip(layers, alphas, sizes, strict=True):
            reduced = values if size == band.size else _weighted_mean(weighted, weight, size, alpha)
            layer[..., channel] = _filled(reduced, alpha > 0).round().clip(0, 255)
    return layers, alphas


def reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A decoded layer, RGB or RGBA, reduced to ``size`` (width, height), bicubic, to be shown or given to any encoder.

    Colours are weighted by their alpha, so that hidden colours do not bleed into edges. Pixels with alpha 0 get the
    colours of their neighbours (see ``filled``), also where the size stays as it is.
    """
    if image.mode != "RGBA":
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    # as Pillow's reducing_gap does it: a box filter takes most of a large layer away, weighted by alpha too
    factor = max(1, int(image.width / size[0] / 3)), max(1, int(image.height / size[1] / 3))
    near = image if factor == (1, 1) else image.reduce(factor)
    colours, alpha = near.convert("RGB"), near.getchannel("A")
    layers, alphas = pyramid_alpha(Source(colours, alpha), [size])
    return with_alpha(layers[0], alphas[0])


def filled(image: Image.Image) -> Image.Image:
    """An RGBA picture whose hidden pixels (alpha 0) have the colours of their neighbours. A lossy encoder mixes hidden
    colours into edges, and smooth ones cost it few bits."""
    import numpy as np

    pixels = np.array(image)
    known = pixels[..., 3] > 0
    for channel in range(0 if known.all() else 3):
        found = _filled(pixels[..., channel].astype(np.float32), known)
        pixels[..., channel] = found.round().clip(0, 255)
    return Image.fromarray(pixels)


def _weighted_mean(
    weighted: Image.Image, weight: Image.Image, size: tuple[int, int], alpha: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Values times weight and weight, reduced and divided: float32 of ``alpha``'s shape. Where little shows, the
    filter has no negative lobes, which over a small weight would give any colour."""
    import numpy as np

    filters = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    bicubic, bilinear = (
        np.asarray(weighted.resize(size, f)) / np.maximum(np.asarray(weight.resize(size, f)), 1e-3) for f in filters
    )
    return np.where(alpha >= 128, bicubic, bilinear)


def _filled(values: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """float32 [height, width] with unknown values interpolated from known ones around, over ever larger distances;
    mid-grey if none is known."""
    import numpy as np

    height, width = known.shape
    if known.all():
        return values
    if height == width == 1:
        return np.full_like(values, 128)
    even = ((0, height % 2), (0, width % 2))
    blocks = -(-height // 2), 2, -(-width // 2), 2
    count = np.pad(known, even).reshape(blocks).sum((1, 3))
    total = np.pad(np.where(known, values, 0), even).reshape(blocks).sum((1, 3), dtype=np.float32)
    coarse = Image.fromarray(_filled(total / np.maximum(count, 1).astype(np.float32), count > 0))
    around = coarse.resize((2 * coarse.width, 2 * coarse.height), Image.Resampling.BILINEAR)
    return np.where(known, values, np.asarray(around)[:height, :width])


def alpha_to_bytes(alpha: NDArray[np.uint8]) -> bytes:
    """Code an alpha plane, uint8 [height, width], without loss: as WebP or as PNG, whichever is smaller."""
    image, webp, png = Image.fromarray(alpha), io.BytesIO(), io.BytesIO()
    with library("alpha cannot be written"):
        image.save(png, "PNG", optimize=True)
        if max(image.size) <= WEBP_SIDE:
            image.convert("RGB").save(webp, "WEBP", lossless=True, quality=100)
    return min(filter(None, (webp.getvalue(), png.getvalue())), key=len)


def alpha_from_bytes(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An alpha plane of ``size`` (width, height) as uint8 [height, width]. Raises DamagedError for anything else than a
    lossless WebP or an 8-bit grey PNG of just this size, before it is decoded."""
    import numpy as np

    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L" and data[20:21] == b"\x2f" and len(data) > 24:
        (bits,) = struct.unpack_from("<I", data, 21)
        found = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and data[24:29] == b"\x08\0\0\0\0":
        found = struct.unpack_from(">II", data, 16)
    else:
        raise DamagedError("alpha is neither a lossless WebP nor an 8-bit grey PNG")
    if found != size:
        raise DamagedError(f"alpha of {found[0]} x {found[1]} in a layer of {size[0]} x {size[1]}")
    with library("alpha does not decode", DamagedError):  # the header's limit on pixels holds
        image = Image.open(io.BytesIO(data), formats=["WEBP", "PNG"])
        return np.array(image if image.mode == "L" else image.getchannel("G"))


def with_alpha(picture: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> Image.Image:
    """uint8 [height, width, 3] and, for RGBA, uint8 [height, width], as a Pillow image."""
    image = Image.fromarray(picture)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


@cache
def register() -> None:
    """Register Pillow's formats, HEIC where pillow-heif is installed (the extra ``heic``), and big-endian 16-bit
    grey TIFF with WhiteIsZero, of which Pillow has only the little-endian one."""
    from PIL import TiffImagePlugin

    Image.init()
    TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def check_format(path: Path) -> str:
    """Pillow's name of the format that the file name asks for. Raises PictureError if it cannot be written."""
    if not path.suffix:
        raise PictureError(f"the output {path.name} has no extension, which names a picture format")
    return _check_suffix(path.suffix.lower())


# Pillow fills an ICNS file up with enlarged pictures, and reads the largest of them.
ICNS_SIDE = 1024


@cache
def _check_suffix(suffix: str) -> str:
    for load in (Image.preinit, register):  # the five usual formats, then all; PNG is there already
        if suffix not in Image.EXTENSION:
            load()
    name = Image.EXTENSION.get(suffix)
    if name is None and suffix in HEIC_SUFFIXES:
        raise PictureError(f"{suffix} {NEEDS_HEIF}")
    if name is None or name not in Image.SAVE:
        raise PictureError(f"no picture format known for {suffix!r}")
    if suffix in NOT_WRITTEN:
        raise PictureError(f"{suffix} is not written: {NOT_WRITTEN[suffix]}")
    # some can only be written by programs that are not here, or hold no colours
    trial = Image.new("RGB", (ICNS_SIDE,) * 2 if name == "ICNS" else (16, 16))
    _save(trial, name, suffix, None, [], f"{suffix} cannot be written here")
    return name


def flatten(image: Image.Image) -> Image.Image:
    """A picture with transparency laid onto white, as RGB."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_bytes(image: Image.Image, path: Path, extras: Sections | None = None, notes: list[str] | None = None) -> bytes:
    """The picture, RGB or RGBA, as a file in the format that ``path`` asks for. Raises PictureError.

    PNG, WebP, AVIF, HEIC, TIFF and JPEG 2000 keep alpha, the others show it on white. ICC, EXIF and XMP go into PNG,
    JPEG, WebP, AVIF, HEIC and TIFF, as far as they fit. Formats that hold no profile get sRGB. EXIF's pixel dimensions
    become those of the picture. JPEG has quality 95 and full chroma, WebP 95, AVIF and HEIC 90 and full chroma.
    ``notes`` get a sentence for everything that was converted or left out.
    """
    name = check_format(path)
    notes = [] if notes is None else notes
    return _save(image, name, path.suffix, extras, notes)


class _Png(io.BytesIO):
    """A file with a name, by which Pillow knows its format; told the format, it loads those of other files too."""

    name = "a.png"


def _save(
    image: Image.Image, name: str, suffix: str, extras: Sections | None, notes: list[str], failed: str = ""
) -> bytes:
    options = dict(SAVING.get(name, {}))
    if suffix.lower() in CODESTREAMS:
        options["no_jp2"] = True
    buffer = _Png() if name == "PNG" else io.BytesIO()
    with library(failed or f"{image.width} x {image.height} cannot be written as {suffix}"):
        if extras and name in WITH_EXTRAS:
            options |= _metadata(extras, name, image.size, notes)
        elif extras:
            if extras.icc:
                image = colour.to_srgb(image, extras.icc, notes, suffix)
            if left := [word for word, data in (("EXIF", extras.exif), ("XMP", extras.xmp)) if data]:
                notes.append(f"{' and '.join(left)} left out, which {suffix} does not hold")
        if image.mode == "RGBA" and name not in WITH_ALPHA:
            image = flatten(image)
            notes.append(f"transparency laid onto white, as {suffix} holds none")
        elif image.mode == "RGBA" and name in SAVING:  # lossy
            image = filled(image)
        image.save(buffer, None if name == "PNG" else name, **options)
        data = buffer.getvalue()
        _check_size(data, name, image.size)
    return data


def _check_size(data: bytes, name: str, size: tuple[int, int]) -> None:
    """Raise PictureError if Pillow reads the file back with another size than ``size``. Some formats write a picture
    that is too large for them as garbage, without an error."""
    if name in Image.OPEN and name != "PNG":
        with Image.open(io.BytesIO(data), formats=[name]) as found:
            if found.size != size:
                raise PictureError(f"{name} cannot hold a picture of {size[0]} x {size[1]}")


def _metadata(extras: Sections, name: str, size: tuple[int, int], notes: list[str]) -> dict[str, Any]:
    """Pillow's options to save ``extras`` in the format ``name`` with a picture of ``size``. EXIF and XMP too long for
    a marker of a JPEG are left out, as is damaged EXIF in formats for which Pillow must read it."""
    options: dict[str, Any] = {}
    room = {"exif": MARKER - 6, "xmp": MARKER - 29} if name == "JPEG" else {}
    kept = {"exif": extras.exif, "xmp": extras.xmp}
    for kind, data in kept.items():
        if data and len(data) > room.get(kind, len(data)):
            kept[kind] = None
            notes.append(f"{kind.upper()} left out, which is too long for a JPEG")
    exif, xmp = kept["exif"], kept["xmp"]
    if exif:
        with suppress(Exception):  # on garbage, which goes on as it came
            exif = fitted(exif, size)
    if extras.icc:
        options["icc_profile"] = extras.icc
    if name in ("AVIF", "TIFF"):
        tags = _tags(exif, name)
        if exif and tags is None:
            notes.append("damaged EXIF left out")
        if name == "TIFF":
            tags = Image.Exif() if tags is None else tags
            if xmp:
                tags[XMP_TAG] = xmp
            return options | {"exif": tags}
        if tags is not None:
            options["exif"] = exif
    elif exif:
        options["exif"] = b"Exif\0\0" + exif
    if xmp and name == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    elif xmp:
        options["xmp"] = xmp
    return options


def _tags(exif: bytes | None, name: str) -> Image.Exif | None:
    """Those of EXIF's tags that describe the picture; None if a file in the format ``name`` cannot be made with it."""
    if not exif:
        return None
    tags = Image.Exif()
    try:
        tags.load(exif)
        for tag in set(tags) - set(DESCRIPTIVE):
            del tags[tag]
        Image.new("L", (1, 1)).save(io.BytesIO(), name, exif=tags if name == "TIFF" else exif)
    except Exception:  # Pillow has no error of its own for bad EXIF
        return None
    return tags
