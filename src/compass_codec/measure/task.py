"""What is measured: one picture coded in one way, and the settings that a run shares."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compass_codec.measure.protocol import OURS, Scales, kind_of, sizes_of

if TYPE_CHECKING:
    from PIL import Image

Record = dict[str, Any]
LAYOUT = 2  # of a record; new measures or another meaning take a new number
# Seconds of one core for a megapixel with COMPASS, for the progress bar alone.
SECONDS = 2.5


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share; ``metrics`` are names in metrics.METRICS."""

    cache: Path
    weights: Path | None = None
    device: str = "cpu"
    metrics: tuple[str, ...] = ("psnr", "ms-ssim")


@dataclass(frozen=True)
class Original:
    """A picture, its size and the SHA-256 of its samples."""

    path: Path
    size: tuple[int, int]
    digest: str

    @classmethod
    def of(cls, path: Path) -> Original:
        picture = load(path)
        return cls(path, picture.size, hashlib.sha256(picture.tobytes()).hexdigest())


@dataclass(frozen=True)
class Task:
    """One picture coded in one way. With a ``box`` (left, top, width, height in the top layer) the record holds that
    crop too; with ``target``, the setting is then the one that comes nearest to so many bytes."""

    source: Original
    method: str
    scales: Scales
    setting: float = 0
    box: tuple[int, int, int, int] | None = None
    target: int = 0

    def key(self, identity: str) -> str:
        """What the record depends on, and nothing else: not the name or place of the picture."""
        parts = {"layout": LAYOUT, "identity": identity, "picture": self.source.digest} | asdict(self)
        del parts["source"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def seconds(self) -> float:
        """About how long it takes on one core."""
        sizes = [w * h / 1e6 for w, h in sizes_of(self.source.size, self.scales)]
        ours = kind_of(self.method) == OURS
        layered, first = (SECONDS if ours else 1.0) * sum(sizes[1:]), sizes[0] * (3.0 if ours else 1.0)
        return (layered + first) * (8 if self.target else 2 if self.box else 1) + 0.02


@lru_cache(maxsize=1)
def load(path: Path) -> Image.Image:
    """The picture as the protocol takes it."""
    from compass_codec import pictures

    return pictures.read(path).image
