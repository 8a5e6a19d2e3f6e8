"""Pictures in and out, through Pillow; and files that are either written whole or not at all."""

from __future__ import annotations

import io
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from compass_codec.errors import DamagedError, PictureError

if TYPE_CHECKING:
    import numpy as np


ANIMATED = {"GIF", "PNG", "WEBP", "AVIF", "JXL"}  # formats whose further frames are an animation
WITH_ALPHA = {"PNG", "WEBP", "AVIF", "TIFF", "JPEG2000"}
WITH_EXTRAS = {"PNG", "JPEG", "WEBP", "AVIF", "TIFF"}
SAVING: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90, "subsampling": "4:4:4"},
}
WEBP_SIDE = 16383  # the largest side of a WebP picture
MARKER = 65533  # bytes that a JPEG marker holds
GREYS = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}
WORDS = {"P": "palette", "PA": "palette", "1": "1-bit samples"} | dict.fromkeys(GREYS - {"1"}, "greyscale")
IFDS = (0x8769, 0x8825)  # tags that point to the EXIF and GPS tags
ORIENTATION, XMP_TAG = 0x0112, 700
DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 316, 33432, *IFDS)  # words, device, time, owner


class Extras(Protocol):
    """What goes beside the pixels: an ICC profile, EXIF (a TIFF structure) and XMP (UTF-8), each None if absent."""

    @property
    def icc(self) -> bytes | None: ...
    @property
    def exif(self) -> bytes | None: ...
    @property
    def xmp(self) -> bytes | None: ...


@dataclass(frozen=True)
class Source:
    """A picture as it was found: ``image`` RGB with 8 bits, upright; ``alpha`` L of the same size, or None when it is
    opaque all over; its profile, EXIF (orientation 1) and XMP; and a sentence for everything that was converted."""

    image: Image.Image
    alpha: Image.Image | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: list[str] = field(default_factory=list)


def read(path: Path | BinaryIO) -> Source:
    """Open a picture, upright as its EXIF orientation says. CMYK and grey profiles are applied; the RGB pixels are then
    sRGB and carry none. Raises PictureError; also for an animation and for samples of 32 bits."""
    try:
        with warnings.catch_warnings():
            # of bad metadata, which the notes tell, and of size, where an error follows at twice as much
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _source(image)
    except PictureError:
        raise
    except Image.UnidentifiedImageError as e:
        raise PictureError("not a picture that Pillow can read") from e
    except Image.DecompressionBombError as e:
        raise PictureError(f"the picture is too large ({str(e).split(', could')[0]})") from e
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        raise PictureError(getattr(e, "strerror", None) or f"damaged picture ({e})") from e


def _source(image: Image.Image) -> Source:
    notes = []
    if (frames := getattr(image, "n_frames", 1)) > 1:
        if image.format in ANIMATED:
            raise PictureError(f"an animation of {frames} frames; only still pictures can be coded")
        notes.append(f"only the first of {frames} pictures in the file is taken")
    # Pillow reduces RGB to 8 bits while it reads; only the layout of the file's samples tells
    deep = any(";16" in str(tile) or (tile[0] == "ppm" and tile[3][-1] > 255) for tile in getattr(image, "tile", ()))
    image.load()
    exif = None
    try:
        original, image = image, ImageOps.exif_transpose(image)
        exif = _exif(original)
    except Exception:  # Pillow's reader has no error of its own for bad EXIF; the pixels are sound
        notes.append("damaged EXIF left out")
    xmp = image.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp) if xmp else None
    if image.mode == "I" and deep:
        image = image.convert("I;16")
    if deep or image.mode.startswith("I;16"):
        notes.append("16-bit samples reduced to 8 bits")
    pixels = split(image)
    rgb, icc = _to_srgb(image, pixels.image, notes)
    return Source(rgb, pixels.alpha, icc, exif, xmp, notes)


def _to_rgba(image: Image.Image) -> Image.Image | None:
    """The picture with its transparency, or None if it has none."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I;16"):
        clear = image.info["transparency"]
        alpha = image.convert("I").point([255 * (v != clear) for v in range(65536)], "L")
        return Image.merge("RGBA", [image.point(lambda v: v / 256).convert("L")] * 3 + [alpha])
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _to_srgb(image: Image.Image, rgb: Image.Image, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """``rgb`` and the profile that holds for it. A profile of ``image`` that is not for RGB is applied and dropped."""
    icc = image.info.get("icc_profile") or None
    space = "GRAY" if image.mode in GREYS else image.mode if image.mode in ("CMYK", "LAB", "HSV") else "RGB"
    if not image.mode.startswith("RGB"):
        notes.append(f"{WORDS.get(image.mode, image.mode)} converted to RGB")
    if icc is None or (icc[16:20] == b"RGB " and space in ("RGB", "GRAY")):
        return rgb, icc
    if icc[16:20].decode("latin1").strip() == space and space in ("GRAY", "CMYK"):
        from PIL import ImageCms

        try:
            converted = ImageCms.profileToProfile(
                rgb.convert("L") if space == "GRAY" else image,
                ImageCms.ImageCmsProfile(io.BytesIO(icc)),
                ImageCms.createProfile("sRGB"),
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                "RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
        except (ImageCms.PyCMSError, OSError):
            pass
        else:
            assert converted is not None
            notes[-1] = f"{notes[-1].removesuffix('RGB')}sRGB by its ICC profile"
            return converted, None
    notes.append("ICC profile left out, which does not fit the picture")
    return rgb, None


def _descriptive(exif: Image.Exif) -> Image.Exif:
    """What describes the picture: a TIFF file keeps the layout of its samples among the same tags."""
    tags = Image.Exif()
    for tag in DESCRIPTIVE:
        if value := exif.get_ifd(tag) if tag in IFDS else exif.get(tag):
            tags[tag] = value
    return tags


def _exif(image: Image.Image) -> bytes | None:
    """EXIF as a TIFF structure whose orientation is 1, all else as it was. Raises anything on garbage."""
    exif = image.info.get("exif")
    if not exif:
        tags = _descriptive(image.getexif())
        exif = tags.tobytes() if tags else b""
    exif = bytearray(exif.removeprefix(b"Exif\0\0"))
    if not exif:
        return None
    order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(exif[:4])]
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        # a short, or wrongly a long, which Pillow applies as well
        if struct.unpack_from(f"{order}HHI", exif, entry) in ((ORIENTATION, 3, 1), (ORIENTATION, 4, 1)):
            struct.pack_into(f"{order}HIHH", exif, entry + 2, 3, 1, 1, 0)
    return bytes(exif)


def split(image: Image.Image) -> Source:
    """The pixels of a Pillow image: RGB and, unless it is opaque, alpha. Raises PictureError for samples of 32 bits."""
    rgba = _to_rgba(image)
    if rgba is None or rgba.getchannel("A").getextrema() == (255, 255):
        return Source(rgba.convert("RGB") if rgba else to_rgb(image))
    return Source(rgba.convert("RGB"), rgba.getchannel("A"))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is flattened onto white, 16-bit samples keep their upper 8 bits."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda v: v / 256).convert("L")
    elif image.mode in ("I", "F"):
        raise PictureError(f"pictures of mode {image.mode} (32-bit samples) are not supported")
    return flatten(image) if image.has_transparency_data else image.convert("RGB")


def pyramid(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The picture reduced to each (width, height), bicubic, as uint8 [height, width, 3]."""
    import numpy as np

    return [np.array(_resized(image, s)) for s in sizes]


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pyramid_alpha(source: Source, sizes: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
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


def _weighted_mean(weighted: Image.Image, weight: Image.Image, size: tuple[int, int], alpha: np.ndarray) -> np.ndarray:
    """Values times weight and weight, reduced and divided: float32 of ``alpha``'s shape. Where little shows, the
    filter has no negative lobes, which over a small weight would give any colour."""
    import numpy as np

    filters = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    bicubic, bilinear = (
        np.asarray(weighted.resize(size, f)) / np.maximum(np.asarray(weight.resize(size, f)), 1e-3) for f in filters
    )
    return np.where(alpha >= 128, bicubic, bilinear)


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float32 [height, width] with the values that are not known made from those around, over ever larger distances;
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


def alpha_to_bytes(alpha: np.ndarray) -> bytes:
    """Code an alpha plane, uint8 [height, width], without loss: as WebP or as PNG, whichever is smaller."""
    image, webp, png = Image.fromarray(alpha), io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if max(image.size) <= WEBP_SIDE:
        image.convert("RGB").save(webp, "WEBP", lossless=True, quality=100)
    return min(filter(None, (webp.getvalue(), png.getvalue())), key=len)


def alpha_from_bytes(data: bytes, size: tuple[int, int]) -> np.ndarray:
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the header's limit on pixels holds
            image = Image.open(io.BytesIO(data), formats=["WEBP", "PNG"])
            return np.array(image if image.mode == "L" else image.getchannel("G"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as e:
        raise DamagedError(f"alpha does not decode ({e})") from e


def with_alpha(picture: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """uint8 [height, width, 3] and, for RGBA, uint8 [height, width], as a Pillow image."""
    image = Image.fromarray(picture)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


def squared_error(a: np.ndarray, b: np.ndarray) -> int:
    """Sum of squared differences of two uint8 pictures of one shape."""
    import numpy as np

    # a few rows at a time: all integers of a large picture take a gigabyte
    parts = ((a[row : row + 64], b[row : row + 64]) for row in range(0, len(a), 64))
    return sum(int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in parts)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB; infinite when they are equal."""
    squares = squared_error(a, b)
    return 10 * math.log10(255**2 * a.size / squares) if squares else math.inf


def check_format(path: Path) -> str:
    """Pillow's name of the format that the file name asks for. Raises PictureError if it cannot be written."""
    Image.init()
    name = Image.EXTENSION.get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise PictureError(f"no picture format known for {path.suffix or 'a name without extension'!r}")
    return name


def flatten(image: Image.Image) -> Image.Image:
    """A picture with transparency laid onto white, as RGB."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_bytes(image: Image.Image, path: Path, extras: Extras | None = None) -> bytes:
    """The picture, RGB or RGBA, as a file in the format that ``path`` asks for. Raises PictureError.

    PNG, WebP, AVIF, TIFF and JPEG 2000 keep alpha, the others show it on white. ICC, EXIF and XMP go into PNG, JPEG,
    WebP, AVIF and TIFF, as far as they fit. JPEG has quality 95 and full chroma, WebP 95, AVIF 90 and full chroma.
    """
    name = check_format(path)
    if image.mode == "RGBA" and name not in WITH_ALPHA:
        image = flatten(image)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF that is not quite right
            options = SAVING.get(name, {}) | (_metadata(extras, name) if extras and name in WITH_EXTRAS else {})
            image.save(buffer, name, **options)
    except (OSError, ValueError) as e:
        raise PictureError(f"cannot be written as {path.suffix} ({e})") from e
    return buffer.getvalue()


def _metadata(extras: Extras, name: str) -> dict[str, Any]:
    """Pillow's options to save ``extras`` in the format ``name``. What no marker of a JPEG can hold is left out, and so
    is EXIF that Pillow cannot read where it has to."""
    options: dict[str, Any] = {}
    if extras.icc:
        options["icc_profile"] = extras.icc
    if name in ("AVIF", "TIFF"):
        tags = _tags(extras.exif, name)
        if name == "TIFF":
            tags = Image.Exif() if tags is None else tags
            if extras.xmp:
                tags[XMP_TAG] = extras.xmp
            return options | {"exif": tags}
        if tags is not None:
            options["exif"] = extras.exif
    elif extras.exif and (name != "JPEG" or len(extras.exif) + 6 <= MARKER):
        options["exif"] = b"Exif\0\0" + extras.exif
    if extras.xmp and name == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", extras.xmp)
    elif extras.xmp and (name != "JPEG" or len(extras.xmp) + 29 <= MARKER):
        options["xmp"] = extras.xmp
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


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it first, flushed to disk, then renamed. Raises OSError.

    What is there and no regular file, such as a device or a pipe, is written to as it is.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(prefix=".compass.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            mode = path.stat().st_mode & 0o777
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            mode = 0o666 & ~mask
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
