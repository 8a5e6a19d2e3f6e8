"""How much two pictures differ: what is measured by name, here or by a program of libjxl."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from compass_codec.errors import MeasureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MS_SSIM_SIDE = 161  # five scales of windows of 11 samples need this many


def squared_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """Sum of squared differences of two uint8 pictures of one shape."""
    import numpy as np

    # a few rows at a time: all integers of a large picture take a gigabyte
    parts = ((a[row : row + 64], b[row : row + 64]) for row in range(0, len(a), 64))
    return sum(int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in parts)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB; infinite when they are equal. With
    ``alpha``, uint8 [height, width], each pixel counts as much as it shows; infinite when none does."""
    import numpy as np

    if alpha is None:
        squares, samples = squared_error(a, b), a.size
    else:
        rows = ((a[k], b[k], alpha[k]) for k in range(len(a)))  # one at a time, for memory
        squares = sum(int((np.square(x.astype(np.int64) - y).sum(1) * weight).sum()) for x, y, weight in rows)
        samples = a.shape[2] * int(alpha.sum(dtype=np.int64))
    return 10 * math.log10(255**2 * samples / squares) if squares else math.inf


def ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """MS-SSIM (Wang et al. 2003) of two uint8 pictures [height, width, 3], mean of R, G and B; None when a side is too
    short for its five scales. Raises MeasureError."""
    if min(a.shape[:2]) < MS_SSIM_SIDE:
        return None
    import torch

    try:
        from pytorch_msssim import ms_ssim as measure
    except ImportError as e:
        raise MeasureError("MS-SSIM needs pytorch-msssim (pip install 'compass_codec[bench]')") from e
    x, y = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() for p in (a, b))
    return float(measure(x, y, data_range=255))


def butteraugli(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float, float]:
    """Butteraugli distances of sRGB pictures, uint8 [height, width, 3], on a screen of 80 nits: the largest of the
    picture (max-norm) and the 3-norm. 0 when they are equal. Raises MeasureError."""
    told = _told("butteraugli_main", a, b)
    try:
        largest, norm = told.split("\n")[:2]
        return float(largest), float(norm.removeprefix("3-norm:"))
    except ValueError as e:
        raise MeasureError(f"butteraugli_main: said {told[:80]!r} instead of two distances") from e


def ssimulacra2(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """SSIMULACRA 2 of sRGB pictures, uint8 [height, width, 3]: 100 when they are equal. Raises MeasureError."""
    told = _told("ssimulacra2", a, b)
    try:
        return float(told)
    except ValueError as e:
        raise MeasureError(f"ssimulacra2: said {told[:80]!r} instead of a score") from e


def _told(program: str, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> str:
    """What a program of libjxl prints about two pictures."""
    import subprocess
    import tempfile

    from PIL import Image

    found = program_of(program)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("original.ppm", "coded.ppm")]
        for file, picture in zip(files, (a, b), strict=True):
            Image.fromarray(picture).save(file)
        done = subprocess.run([found, *files], capture_output=True, text=True)
    if done.returncode:
        raise MeasureError(f"{program}: failed: {(done.stderr.strip() or f'status {done.returncode}')[-200:]}")
    return done.stdout.strip()


def program_of(name: str) -> str:
    """The path of a program of libjxl. Raises MeasureError where it is not on the PATH."""
    import shutil

    if found := shutil.which(name):
        return found
    hint = "Debian: libjxl-devtools" if name == "butteraugli_main" else "libjxl 0.8 or newer, built with its devtools"
    raise MeasureError(f"there is no {name} on the PATH; it is a program of libjxl ({hint})")


@dataclass(frozen=True)
class Metric:
    """A measure of two pictures of one shape, uint8 [height, width, 3]. ``axis`` makes of its value a number that rises
    with quality, about as fast as the logarithm of the bits; ``value`` goes back. ``measure`` gives None for pictures
    that are too small."""

    title: str
    measure: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float | None]
    axis: Callable[[float], float] = float
    value: Callable[[float], float] = float
    unit: str = ""
    digits: int = 2
    program: str = ""  # of libjxl, that measures

    def of(self, a: NDArray[np.uint8], b: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> float:
        """Of what shows with ``alpha``, uint8 [height, width]. Raises MeasureError, also for pictures too small."""
        if alpha is not None and self.measure is psnr:
            return psnr(a, b, alpha)
        if alpha is not None:
            a, b = over_grey(a, alpha), over_grey(b, alpha)
        value = self.measure(a, b)
        if value is None:
            raise MeasureError(f"{a.shape[1]} x {a.shape[0]} pixels are too few for {self.title}")
        return value

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}{' ' * bool(self.unit)}{self.unit}"

    def asked(self, value: float) -> str:
        """A value in words, as a person gave it."""
        return f"{value:g} {self.unit}" if self.unit else f"{self.title} {value:g}"

    def identity(self) -> str:
        """What decides its values. Raises MeasureError where its program is missing."""
        return f"{self.title} {_hash(program_of(self.program))}" if self.program else self.title


def over_grey(picture: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What shows of a picture [height, width, 3] with ``alpha`` [height, width], on grey."""
    import numpy as np

    share = alpha[..., None].astype(np.float32) / 255
    shown: NDArray[np.uint8] = (GREY + share * (picture.astype(np.float32) - GREY)).round().astype(np.uint8)
    return shown


GREY = 128


@lru_cache
def _hash(file: str) -> str:
    import hashlib

    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


TINY = 1e-12  # of what lacks to 1, so that equal pictures have a place on the axis
NEAR = 1e-4  # the least distance that is told apart from none

METRICS = {
    "psnr": Metric("PSNR", psnr, unit="dB"),
    "ms-ssim": Metric(
        "MS-SSIM",
        ms_ssim,
        lambda value: -10 * math.log10(max(1 - value, TINY)),
        lambda decibels: 1 - 10 ** (-decibels / 10),
        digits=4,
    ),
    "butteraugli": Metric(
        "Butteraugli 3-norm",
        lambda a, b: butteraugli(a, b)[1],
        lambda distance: -math.log2(max(distance, NEAR)),
        lambda halvings: 2**-halvings,
        program="butteraugli_main",
    ),
    "butteraugli-max": Metric(
        "Butteraugli max-norm",
        lambda a, b: butteraugli(a, b)[0],
        lambda distance: -math.log2(max(distance, NEAR)),
        lambda halvings: 2**-halvings,
        program="butteraugli_main",
    ),
    "ssimulacra2": Metric("SSIMULACRA 2", ssimulacra2, digits=1, program="ssimulacra2"),
}
