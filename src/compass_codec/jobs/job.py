"""Jobs: the options, and one file to encode or decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compass_codec import container
from compass_codec.jobs.targets import Target


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of both directions. ``batch`` makes missing folders, leaves alone what is up to date, and computes with
    one thread; ``strip`` drops ICC profile, EXIF and XMP; ``weights`` and ``model`` are those of weights.choose."""

    force: bool = False
    batch: bool = False
    strip: bool = False
    device: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    weights: Path | None = None
    model: str | None = None

    def identity(self) -> str:
        """The identity of the weights that encode. Raises WeightsError."""
        from compass_codec import weights

        return weights.identity(self.weights, self.model)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Options):
    """How to encode. Exactly one of ``scales``, ``sizes`` (width, height) and ``widths`` is given, smallest first;
    ``qualities`` holds one number or one for each layer and does not matter with a ``target``. ``effort``,
    ``time_budget`` (seconds) and ``layer_weights`` are those of Codec.encode_layers; ``progress`` writes to standard
    error how it goes."""

    scales: tuple[float, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    widths: tuple[int, ...] = ()
    upscale: bool = False
    qualities: tuple[float, ...] = (60.0,)
    target: Target | None = None
    effort: int = 0
    time_budget: float | None = None
    layer_weights: tuple[float, ...] | None = None
    progress: bool = False
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    """Options of decoding: one layer (None: the highest that is whole) or, with ``every``, all of them. ``numbered``
    puts .layerK before the extension of the target."""

    layer: int | None = None
    every: bool = False
    best_effort: bool = False
    numbered: bool = True
    max_pixels: int = container.MAX_PIXELS


@dataclass(frozen=True)
class Job:
    """One file to encode or decode. One to decode may be on a web server, at ``url``; ``source`` is then its name."""

    source: Path
    target: Path
    options: EncodeOptions | DecodeOptions
    url: str | None = None
