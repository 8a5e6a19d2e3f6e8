"""Pictures in and out, through Pillow; and files that are either written whole or not at all."""

from __future__ import annotations

import io
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, ImageOps

from compass_codec.errors import PictureError

if TYPE_CHECKING:
    import numpy as np


def read(path: Path | BinaryIO) -> Image.Image:
    """Open a picture as 8-bit RGB, turned as its EXIF orientation says. Raises PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error follows at twice the size
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as e:
        raise PictureError("not a picture that Pillow can read") from e
    except Image.DecompressionBombError as e:
        raise PictureError(f"the picture is too large ({str(e).split(', could')[0]})") from e
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        raise PictureError(getattr(e, "strerror", None) or f"damaged picture ({e})") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is flattened onto white, 16-bit samples keep their upper 8 bits."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda v: v / 256).convert("L")
    elif image.mode in ("I", "F"):
        raise PictureError(f"pictures of mode {image.mode} (32-bit samples) are not supported")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def pyramid(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The picture reduced to each (width, height), bicubic, as uint8 [height, width, 3]."""
    import numpy as np

    return [np.array(image if image.size == s else image.resize(s, Image.Resampling.BICUBIC)) for s in sizes]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB; infinite when they are equal."""
    import numpy as np

    mse = float(np.square(a.astype(np.float32) - b).mean(dtype=np.float64))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def check_format(path: Path) -> str:
    """Pillow's name of the format that the file name asks for. Raises PictureError if it cannot be written."""
    Image.init()
    name = Image.EXTENSION.get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise PictureError(f"no picture format known for {path.suffix or 'a name without extension'!r}")
    return name


def to_bytes(image: Image.Image, path: Path) -> bytes:
    """The picture as a file in the format that ``path`` asks for."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, check_format(path))
    except (OSError, ValueError) as e:
        raise PictureError(f"cannot be written as {path.suffix} ({e})") from e
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it first, flushed to disk, then renamed. Raises OSError.

    What is there and no regular file, such as a device or a pipe, is written to as it is.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
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
