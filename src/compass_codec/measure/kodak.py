"""Rate and distortion of the weights on a folder of pictures: layered files against one file for each size.

Bits are bytes of real files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from compass_codec.commands.common import one_line
from compass_codec.measure.bd_rate import FEWEST, BDRate
from compass_codec.measure.protocol import PUBLISHED, Curve, Numbers, layers_of, pictures_in, published, rows
from compass_codec.metrics import psnr

PEERS = (PUBLISHED, "jpeg", "webp", "jpeg2000")


@click.command()
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of PNG pictures, such as Kodak.")
@click.option(
    "--scales", type=Numbers(), default=(1.0, 2.0, 4.0), show_default=True, help="Scale factors of the layers."
)
@click.option(
    "--qualities",
    type=Numbers(),
    default=(1.0, 30.0, 60.0, 100.0),
    show_default=True,
    help="Qualities of the points of the curves.",
)
@click.option("--quick", type=click.IntRange(0), default=0, help="Only this many pictures.")
@click.option("--curves", type=click.Path(path_type=Path), help="JSON of published single-layer curves.")
@click.option("--weights", type=click.Path(path_type=Path), help="Folder of weights; default: the installed ones.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the numbers to this file too.")
def main(
    images: Path,
    scales: Sequence[float],
    qualities: Sequence[float],
    quick: int,
    curves: Path | None,
    weights: Path | None,
    report: Path | None,
) -> None:
    """Print bits and PSNR of a layered file, next to a separate file for each of its sizes."""
    from PIL import Image

    from compass_codec import container
    from compass_codec.codec import Codec

    with one_line():
        codec = Codec.load("cpu", weights, engine="torch")
        pictures = pictures_in(images, quick)
        peers = {name: published(curves, name) for name in PEERS} if curves else {}
    count = len(scales)
    # [quality, picture, layer]: accumulated bytes and PSNR of the layered file, bytes and PSNR of separate files
    shape = (len(qualities), len(pictures), count)
    acc, layered, alone, separate, pixels = np.zeros((5, *shape))
    work = [(i, j) for i in range(len(qualities)) for j in range(len(pictures))]
    with click.progressbar(work, label="encoding", file=sys.stderr) as bar:
        for i, j in bar:
            with Image.open(pictures[j]) as picture:
                sources = layers_of(picture, tuple(scales))
            result = codec.encode_layers(sources, [s / scales[0] for s in scales], qualities[i])
            header = container.read_header(result.data)
            for k, source in enumerate(sources):
                own = codec.encode_layers([source], [1], qualities[i])
                acc[i, j, k], layered[i, j, k] = header.layers[k].end, psnr(source, result.layers[k])
                alone[i, j, k], separate[i, j, k] = len(own.data), psnr(source, own.layers[0])
                pixels[i, j, k] = source.shape[0] * source.shape[1]
    body = []
    for i, quality in enumerate(qualities):
        bpp, decibels = (8 * acc[i] / pixels[i]).mean(0), layered[i].mean(0)
        cells = [f"{b:.3f} bpp, {d:.2f} dB" for b, d in zip(bpp, decibels, strict=True)]
        ratio = 100 * (acc[i, :, -1].sum() / alone[i].sum() - 1)
        body.append([f"{quality:g}", *cells, f"{acc[i, :, -1].sum():.0f}", f"{alone[i].sum():.0f}", f"{ratio:+.1f} %"])
    head = ["quality", *[f"layer {k} ({s:g}x)" for k, s in enumerate(scales)]]
    click.echo(f"{len(pictures)} pictures, weights {codec.model}, accumulated bits\n")
    click.echo(rows([*head, "bytes, one file", f"bytes, {count} files", "change"], body) + "\n")
    top = 8 / pixels[:, :, -1]
    curve = {
        "layered": Curve(list((acc[:, :, -1] * top).mean(1)), list(layered[:, :, -1].mean(1))),
        "simulcast": Curve(list((alone.sum(2) * top).mean(1)), list(separate[:, :, -1].mean(1))),
        "single layer": Curve(list((alone[:, :, -1] * top).mean(1)), list(separate[:, :, -1].mean(1))),
    }
    if len(qualities) >= FEWEST:
        found: list[tuple[str, BDRate]] = [
            ("layered against a file for each size", curve["layered"].against(curve["simulcast"])),
            ("layered against the top size alone", curve["layered"].against(curve["single layer"])),
        ]
        single = curve["single layer"]
        found += [(f"top size alone against {name}", single.against(peer)) for name, peer in peers.items()]
        body = [[name, f"{r.percent:+.1f} %", f"{r.low:.1f} to {r.high:.1f} dB"] for name, r in found]
        click.echo(rows(["BD-rate", "", "over PSNR"], body))
    if report:
        report.write_text(json.dumps({name: vars(c) for name, c in curve.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
