"""What ``compass encode --effort`` brings and takes: ``python -m compass_codec.measure.effort --images DIR --quick N``.

Everything is of real files: their bytes, and the PSNR of what they decode to.
"""

from __future__ import annotations

import resource
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

QUALITIES = (1, 30, 60, 100)
LAYERS = {1: [1.0], 3: [1.0, 2.0, 4.0]}


def measure(task: tuple[list[Path], int, int, int]) -> tuple[list[list[tuple[float, float]]], float, float]:
    """(pictures, side of the crop, layers, effort) to (bits a pixel, PSNR) of the top layer by picture and quality,
    processor seconds of encoding a megapixel, and the peak memory of this process in MiB."""
    import numpy as np
    import torch
    from PIL import Image

    from compass_codec import pictures
    from compass_codec.codec import Codec, layer_sizes

    files, side, count, effort = task
    torch.set_num_threads(1)
    codec, scales = Codec.load("cpu"), LAYERS[count]
    points, spent, pixels = [], 0.0, 0
    for file in files:
        image = Image.open(file).convert("RGB")
        left, top = max(0, image.width - side) // 2, max(0, image.height - side) // 2
        image = image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))
        layers = pictures.pyramid(image, layer_sizes(image.size, scales))
        curve = []
        for quality in QUALITIES:
            started = time.process_time()
            data = codec.encode_layers(layers, scales, quality, effort).data
            spent += time.process_time() - started
            pixels += image.width * image.height
            psnr = pictures.psnr(layers[-1], np.asarray(codec.decode(data)))
            curve.append((8 * len(data) / (image.width * image.height), psnr))
        points.append(curve)
    return points, spent / pixels * 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gain(plain: list[list[tuple[float, float]]], found: list[list[tuple[float, float]]]) -> float:
    """Mean over the pictures of the BD-rate in percent."""
    from compass_codec.measure.bd_rate import bd_rate

    def both(points: list[tuple[float, float]]) -> Any:
        return tuple(zip(*points, strict=True))

    values = [bd_rate(*both(a), *both(b)).percent for a, b in zip(plain, found, strict=True)]
    return sum(values) / len(values)


@click.command()
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--quick", type=click.IntRange(1), help="So many of the pictures, evenly chosen; default: all.")
@click.option(
    "--side", type=click.IntRange(16), default=128, show_default=True, help="Side of the middle that is used."
)
@click.option("--layers", type=click.Choice(["1", "3"]), multiple=True, default=("1", "3"), show_default=True)
@click.option("--effort", "efforts", type=click.IntRange(1, 9), multiple=True, default=tuple(range(1, 10)))
def main(images: Path, quick: int | None, side: int, layers: tuple[str, ...], efforts: tuple[int, ...]) -> None:
    """Print a table of BD-rate against effort 0 at qualities 1, 30, 60 and 100, time and memory."""
    from compass_codec.batch import picture_suffixes

    files = sorted(p for p in images.iterdir() if p.suffix.lower() in picture_suffixes())
    if not files:
        raise click.ClickException(f"{images}: no pictures in it")
    if quick:
        files = [files[i * len(files) // quick] for i in range(min(quick, len(files)))]
    click.echo("| layers | effort | BD-rate | processor time a megapixel | peak memory |\n|---|---|---|---|---|")
    # a process for each, as the peak of memory is that of a process
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in map(int, layers):
            plain: list[list[tuple[float, float]]] = []
            for effort in (0, *sorted(efforts)):
                points, seconds, memory = pool.apply(measure, ((files, side, count, effort),))
                plain = plain or points
                change = f"{gain(plain, points):+.1f} %" if effort else "0"
                click.echo(f"| {count} | {effort} | {change} | {seconds:.0f} s | {memory:.0f} MiB |")


if __name__ == "__main__":
    main()
