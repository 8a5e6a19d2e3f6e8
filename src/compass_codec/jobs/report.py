"""The result of a job, for people and for programs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compass_codec.errors import CompassError, one_line
from compass_codec.jobs.paths import STDIO


@dataclass(frozen=True)
class LayerReport:
    """A layer: its place in the file as the header gives it, and the PSNR in dB if it was just encoded."""

    index: int
    width: int
    height: int
    scale: float
    quality: float
    bytes: int
    end: int
    psnr: float | None = None

    @property
    def bpp(self) -> float:
        """Bits of this layer for each of its pixels."""
        return 8 * self.bytes / (self.width * self.height)

    @property
    def end_bpp(self) -> float:
        """Bits of the file up to this layer for each of its pixels."""
        return 8 * self.end / (self.width * self.height)

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        facts: dict[str, Any] = {"layer": self.index, "width": self.width, "height": self.height, "scale": self.scale}
        facts |= {"quality": self.quality, "bytes": self.bytes, "bpp": round(self.bpp, 4)}
        facts |= {"end": self.end, "end_bpp": round(self.end_bpp, 4)}
        if self.psnr is not None:
            facts["psnr"] = round(self.psnr, 3) if math.isfinite(self.psnr) else None
        return facts


@dataclass(frozen=True)
class Report:
    """The result of a job. ``state`` is "encoded", "decoded", "up to date" or "failed"; ``outputs`` were written, and
    ``size`` is their bytes; ``encodes`` counts those of the search for a target; ``error`` is one line."""

    source: Path
    state: str
    outputs: tuple[Path, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    size: int = 0
    encodes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None

    def as_json(self) -> str:
        """One line for programs."""
        facts: dict[str, Any] = {
            "file": str(self.source),
            "state": self.state,
            "outputs": [str(p) for p in self.outputs],
        }
        facts |= {"size": self.size, "layers": [layer.facts() for layer in self.layers]}
        if self.encodes:
            facts["encodes"] = self.encodes
        facts |= {"seconds": round(self.seconds, 3), "notes": list(self.notes)}
        return json.dumps(facts | ({"error": self.error} if self.error else {}))


def reason(path: Path | str, error: BaseException) -> str:
    """An error as one line that begins with a file's name, ``path`` unless the error knows better."""
    name = "standard input" if path == STDIO else str(path)
    if isinstance(error, CompassError):
        line = f"{name}: {error}"
    elif isinstance(error, OSError):
        line = f"{error.filename or name}: {error.strerror or error}"
    # PyTorch has no error of its own for this on the CPU
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    ):
        line = f"{name}: not enough memory"
    else:
        line = f"{name}: unexpected {type(error).__name__}: {error}"
    return one_line(line)
