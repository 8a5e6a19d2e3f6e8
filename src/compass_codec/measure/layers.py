"""What several qualities of one size cost: ``python -m compass_codec.measure.layers --images DIR -q 30,30,50,70``.

Bits are bytes of real files. Of every layer it is told how many bytes more all that it needs takes than, at the same
mean PSNR, a file of this size alone, and a file that holds each size once: of the smaller ones the best layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compass_codec.commands import values
from compass_codec.commands.common import one_line
from compass_codec.measure.protocol import middle, pictures_in, rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.codec import Codec

QUALITIES = (1.0, 20.0, 40.0, 60.0, 80.0, 100.0)  # of the files that are compared with
Points = list[tuple[float, float]]  # bytes of all pictures, mean PSNR in dB


def at(points: Points, psnr: float) -> float:
    """Bytes at which a curve has this PSNR, by PCHIP of their logarithm; NaN beyond its ends."""
    from scipy.interpolate import PchipInterpolator

    # of equal PSNRs the fewest bytes
    curve = {decibels: math.log(size) for size, decibels in sorted(points, reverse=True)}
    if not min(curve) <= psnr <= max(curve):
        return math.nan
    return math.exp(PchipInterpolator(sorted(curve), [curve[p] for p in sorted(curve)])(psnr))


def compared(size: float, other: float) -> str:
    """``size`` in percent of ``other`` more or less; of a PSNR that no other file has, nothing."""
    return "-" if math.isnan(other) else f"{100 * (size / other - 1):+.1f} %"


def once(scales: Sequence[float], k: int) -> list[int]:
    """The layers of a file of the sizes up to layer ``k``, each once: of a smaller size the best, which is its last."""
    return [j for j in range(k) if scales[j] < scales[k] and scales[j + 1] > scales[j]] + [k]


class Files:
    """Files of some pictures at one time, each measured once."""

    def __init__(self, codec: Codec, pictures: Sequence[list[NDArray[np.uint8]]], scales: Sequence[float]) -> None:
        self.codec, self.pictures, self.scales = codec, pictures, scales
        self.known: dict[tuple[tuple[float, ...], tuple[float, ...]], Points] = {}

    def measure(self, layers: Sequence[int], qualities: Sequence[float]) -> Points:
        """For each of ``layers``, in a file of these alone with ``qualities``: bytes of all that it needs, and PSNR."""
        import numpy as np

        from compass_codec import container, metrics

        scales = [self.scales[k] for k in layers]
        key = (tuple(scales), tuple(qualities))
        if key not in self.known:
            size, psnr = np.zeros((2, len(layers)))
            for source in self.pictures:
                chosen = [source[k] for k in layers]
                encoded = self.codec.encode_layers(chosen, scales, list(qualities))
                size += [entry.end for entry in container.read_header(encoded.data).layers]
                psnr += [metrics.psnr(*pair) for pair in zip(chosen, encoded.layers, strict=True)]
            self.known[key] = list(zip(size, psnr / len(self.pictures), strict=True))
            click.echo(".", err=True, nl=False)
        return self.known[key]


@click.command()
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of PNG pictures, such as Kodak.")
@click.option("--quick", type=click.IntRange(0), default=0, help="Only this many pictures.")
@click.option("--side", type=click.IntRange(16), help="Use only the middle of each picture, of this side in pixels.")
@click.option(
    "--scales", type=values.Value("F,F,...", values.scales), default="1,2,2,2", show_default=True, help="Scale factors."
)
@click.option(
    "-q",
    "--quality",
    type=values.Value("Q,Q,...", values.qualities),
    default="30,30,50,70",
    show_default=True,
    help="Quality of each layer.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="Folder of weights; default: the installed ones.")
def main(
    images: Path,
    quick: int,
    side: int | None,
    scales: tuple[float, ...],
    quality: tuple[float, ...],
    weights: Path | None,
) -> None:
    """Print what each layer of a file with repeated factors costs, next to files with fewer layers."""
    from PIL import Image

    from compass_codec.codec import Codec, layer_sizes
    from compass_codec.pictures import pyramid

    if len(quality) not in (1, len(scales)):
        raise click.UsageError(f"{len(quality)} qualities for {len(scales)} scale factors")
    quality = quality * len(scales) if len(quality) == 1 else quality
    with one_line():
        codec, found = Codec.load("cpu", weights, engine="torch"), pictures_in(images, quick)
    sources = []
    for file in found:
        with Image.open(file) as image:
            picture = middle(image.convert("RGB"), side)
        sources.append(pyramid(picture, layer_sizes(picture.size, scales)))
    files = Files(codec, sources, scales)
    body, separate = [], 0.0
    for k, (size, psnr) in enumerate(files.measure(range(len(scales)), quality)):
        alone = at([files.measure([k], [q])[0] for q in QUALITIES], psnr)
        separate += alone
        fewer = once(scales, k)
        without = at([files.measure(fewer, [quality[j] for j in fewer[:-1]] + [q])[-1] for q in QUALITIES], psnr)
        change = [compared(size, other) for other in (alone, without)]
        body.append([f"{k}", f"{scales[k]:g}", f"{quality[k]:g}", f"{size:.0f}", f"{psnr:.2f} dB", *change])
    click.echo(file=sys.stderr)
    click.echo(f"{len(sources)} pictures, weights {files.codec.model}, accumulated bytes\n")
    click.echo(rows(["layer", "scale", "quality", "bytes", "PSNR", "size alone", "each size once"], body) + "\n")
    whole = files.measure(range(len(scales)), quality)[-1][0]
    click.echo(f"All in one file against a file for each layer at its PSNR: {compared(whole, separate)}")


if __name__ == "__main__":
    main()
