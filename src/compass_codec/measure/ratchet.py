"""The ratchet: real encodes with old weights and new; new ones pass only when they need fewer bits everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image

from compass_codec.commands import values
from compass_codec.errors import CompassError
from compass_codec.measure.bd_rate import FEWEST
from compass_codec.measure.protocol import (
    FULL,
    PUBLISHED,
    Curve,
    Scales,
    layers_of,
    pictures_in,
    published,
    rows,
    sizes_of,
    title,
)
from compass_codec.metrics import psnr

if TYPE_CHECKING:
    from compass_codec.codec import Codec

SINGLE: Scales = (FULL,)  # one layer at full size
DECIDING: tuple[Scales, ...] = (SINGLE, (1.0, 2.0, 4.0), (1.0, 2.0, 3.2))
QUALITIES = (1.0, 34.0, 67.0, 100.0)


class Measurement:
    """Encodes of one set of weights; what was encoded once is not encoded again.

    ``cache`` maps "weights picture scales quality" to [bytes, PSNR]; it is kept in ``file``, so that a comparison
    that was cut short goes on where it stopped.
    """

    def __init__(
        self,
        codec: Codec,
        images: Sequence[Path],
        qualities: Sequence[float],
        cache: dict[str, Any],
        file: Path | None = None,
    ) -> None:
        self.codec, self.images, self.qualities, self.cache, self.file = codec, images, qualities, cache, file

    def point(self, image: Path, scales: Scales, quality: float) -> tuple[float, int, float]:
        """(bits of the file, pixels of its top layer, PSNR of its top layer in dB) of one picture."""
        key = f"{self.codec.model} {image.name} {','.join(map(str, scales))} {quality:g}"
        with Image.open(image) as picture:
            if key not in self.cache:
                layers = layers_of(picture, scales)
                encoded = self.codec.encode_layers(layers, [s / scales[0] for s in scales], quality)
                self.cache[key] = [len(encoded.data), psnr(layers[-1], encoded.layers[-1])]
                if self.file:
                    self.file.write_text(json.dumps(self.cache, indent=0))
            width, height = sizes_of(picture.size, scales)[-1]
        return 8 * self.cache[key][0], width * height, self.cache[key][1]

    def _mean(self, points: Iterable[Sequence[tuple[float, float]]]) -> Curve:
        curve = Curve()
        for column in points:
            bpp, quality = np.mean(column, axis=0)
            curve.bpp.append(float(bpp))
            curve.psnr.append(float(quality))
        return curve

    def curve(self, scales: Scales) -> Curve:
        """One layered file of every picture, at every quality."""

        def one(image: Path, quality: float) -> tuple[float, float]:
            bits, pixels, decibels = self.point(image, scales, quality)
            return bits / pixels, decibels

        return self._mean([one(image, q) for image in self.images] for q in self.qualities)


class Incomparable(click.ClickException):
    """The comparison could not be made, which is neither yes nor no."""

    exit_code = 2


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of PNG pictures, such as Kodak.")
@click.option("--quick", type=click.IntRange(0), default=0, help="Only this many pictures.")
@click.option("--qualities", type=values.RISING, default=QUALITIES, show_default=True, help="Qualities of the curves.")
@click.option("--curves", type=click.Path(path_type=Path), help="JSON of published curves; unused with --quick.")
@click.option("--cache", type=click.Path(path_type=Path), help="JSON file of earlier encodes by the same code.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
def main(
    old: Path,
    new: Path,
    images: Path,
    quick: int,
    qualities: tuple[float, ...],
    curves: Path | None,
    cache: Path | None,
    device: str,
) -> None:
    """Compare the weights in folder NEW with those in folder OLD by real encodes of pictures.

    Exit code 0 when NEW needs fewer bits for a single layer and for three layers, 1 when it does not, 2 when the
    comparison could not be made.
    """
    from compass_codec.codec import Codec

    try:
        if len(qualities) < FEWEST:
            raise ValueError(f"a rate-distortion curve needs at least {FEWEST} qualities")
        pictures = pictures_in(images, quick)
        # A published curve is the mean over all pictures: it says nothing about some of them.
        anchor = published(curves, PUBLISHED) if curves and not quick else None
        known: dict[str, Any] = json.loads(cache.read_text()) if cache and cache.exists() else {}
        sets = {
            name: Measurement(Codec.load(device, path, engine="torch"), pictures, qualities, known, cache)
            for name, path in (("old", old), ("new", new))
        }
        better = compare(sets, anchor)
    except (CompassError, OSError, ValueError) as error:
        raise Incomparable(" ".join(str(error).split())) from error
    sys.exit(0 if better else 1)


def compare(sets: Mapping[str, Measurement], anchor: Curve | None) -> bool:
    """Measure the "old" and the "new" weights and print the tables; whether the new ones pass. ``anchor`` is the
    published single-layer curve PUBLISHED."""
    images, qualities = sets["new"].images, sets["new"].qualities
    points, rates = [], []
    better = True

    def rate(name: str, tested: Curve, base: Curve) -> float:
        found = tested.against(base)
        rates.append([name, f"{found.percent:+.2f} %", f"{found.low:.2f} to {found.high:.2f} dB"])
        return found.percent

    for layers in DECIDING:
        measured = {}
        for name, measurement in sets.items():
            click.echo(f"{title(layers)}, {name} weights: {len(qualities) * len(images)} files", err=True)
            measured[name] = measurement.curve(layers)
        for i, quality in enumerate(qualities):
            numbers = [f"{c.bpp[i]:.4f} | {c.psnr[i]:.3f}" for c in measured.values()]
            points.append([title(layers), f"{quality:g}", *numbers])
        better &= rate(f"{title(layers)}: new against old", measured["new"], measured["old"]) < 0
        if layers == SINGLE and anchor:
            rate(f"{title(layers)}: new against {PUBLISHED}", measured["new"], anchor)

    old, new = (sets[name].codec.model for name in ("old", "new"))
    click.echo(f"{len(images)} pictures; old weights {old}, new weights {new}\n")
    click.echo(rows(["layers", "quality", "old bpp", "old PSNR", "new bpp", "new PSNR"], points) + "\n")
    click.echo(rows(["BD-rate", "fewer bits below 0", "over PSNR"], rates) + "\n")
    click.echo("The new weights need fewer bits." if better else "The new weights do not need fewer bits everywhere.")
    return better


if __name__ == "__main__":
    main()
