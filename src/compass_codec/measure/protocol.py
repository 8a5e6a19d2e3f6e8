"""The protocol that every measurement follows: layers, curves, and the tables they are printed in.

A layer of scale s is the original reduced (Pillow's BICUBIC) to int(width * 0.25 * s) by int(height * 0.25 * s). Bits
are those of the whole file, PSNR is that of 8-bit RGB; both are taken for each picture and then averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compass_codec.measure.bd_rate import BDRate, bd_rate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Scales = tuple[float, ...]
FULL = 4.0  # the scale of the original itself
OURS, LEVELS = "compass", "jpeg2000-levels"
PUBLISHED = "compressai-mbt2018-mean_mse_cuda"


def other_set(model: str) -> str:
    """The method that codes as ours does, with the set of weights ``model`` instead of the run's."""
    return f"{OURS}:{model}"


def kind_of(method: str) -> str:
    """A method without the name of its set of weights."""
    return method.partition(":")[0]


def model_of(method: str) -> str | None:
    """The set of weights that a method names."""
    return method.partition(":")[2] or None


def sets_of(method: str) -> Sequence[str | None]:
    """The same, of two that it names as FIRST+SECOND both: SECOND is for layers above the first enhancement layer."""
    model = model_of(method)
    return model.split("+", 1) if model else [None]


def title(scales: Scales) -> str:
    return "single layer" if scales == (FULL,) else ", ".join(f"{s:g}x" for s in scales)


def sizes_of(size: tuple[int, int], scales: Scales) -> list[tuple[int, int]]:
    """(width, height) of the layers of a picture of ``size``."""
    return [(max(1, int(size[0] * 0.25 * s)), max(1, int(size[1] * 0.25 * s))) for s in scales]


def layers_of(picture: Image.Image, scales: Scales) -> list[NDArray[np.uint8]]:
    """The layers of one picture, uint8 [height, width, 3], smallest first."""
    import numpy as np
    from PIL import Image

    sizes = sizes_of(picture.size, scales)
    rgb = picture.convert("RGB")
    return [np.array(rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BICUBIC)) for size in sizes]


def pictures_in(folder: Path, quick: int) -> list[Path]:
    """The PNG files of ``folder``, or ``quick`` of them spread evenly. Raises ValueError when there are none."""
    images = sorted(folder.glob("*.png"))
    if not images:
        raise ValueError(f"{folder}: no PNG pictures")
    if 0 < quick < len(images):
        images = [images[i * len(images) // quick] for i in range(quick)]
    return images


@dataclass
class Curve:
    """Mean bits per pixel of the top layer and mean PSNR in dB, a point for each quality; or, in the place of PSNR,
    another metric on its axis."""

    bpp: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def against(self, anchor: Curve) -> BDRate:
        return bd_rate(anchor.bpp, anchor.psnr, self.bpp, self.psnr)


def published(file: Path, key: str) -> Curve:
    """A curve {"curves": {key: {"bpp": [...], "psnr_rgb": [...]}}} from a JSON file."""
    try:
        entry = json.loads(file.read_text())["curves"][key]
        return Curve(entry["bpp"], entry["psnr_rgb"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: has no rate-distortion curve named {key}") from error


def middle(picture: Image.Image, side: int | None) -> Image.Image:
    """The middle of a picture, ``side`` pixels on each side at most; all of it without ``side``."""
    if not side:
        return picture
    left, top = max(0, picture.width - side) // 2, max(0, picture.height - side) // 2
    return picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
