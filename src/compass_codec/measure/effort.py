"""What ``compass encode --effort`` brings and takes: ``python -m compass_codec.measure.effort --images DIR --quick N``.

Everything is of real files: their bytes, and the PSNR of what they decode to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.codec import Codec
    from compass_codec.search import Coded

QUALITIES = (1, 30, 60, 100)
LAYERS = {1: [1.0], 3: [1.0, 2.0, 4.0]}


@dataclass
class Found:
    """What an effort brings and takes: of each layer of each picture, (bits of the file up to it, PSNR) at every
    quality; processor seconds; and the peak of memory in MiB."""

    points: list[list[list[tuple[float, float]]]] = field(default_factory=list)
    seconds: float = 0.0
    memory: float = 0.0


def ladder(
    codec: Codec, layers: Sequence[NDArray[np.uint8]], scales: Sequence[float], quality: float, effort: int
) -> list[tuple[bytes, float, float]]:
    """The file of each effort up to this one, the processor seconds up to it, and the peak memory of what it adds to
    those below. An effort goes on from the one below it, so that two encodes tell of all."""
    from compass_codec import container
    from compass_codec.measure.cost import forget_peak, peak_mb

    sizes, steps = [(p.shape[1], p.shape[0]) for p in layers], []

    def note(data: bytes) -> None:
        steps.append((data, time.process_time() - started, peak_mb()))
        forget_peak()

    def heard(effort: int, gain: float, coded: list[Coded]) -> None:
        note(container.write(codec.model, sizes, scales, [quality] * len(layers), [data for data, _ in coded]))

    forget_peak()
    started = time.process_time()
    note(codec.encode_layers(layers, scales, quality).data)
    started = time.process_time()
    codec.encode_layers(layers, scales, quality, effort, progress=heard)
    return steps


def measure(task: tuple[list[Path], int | None, int, int]) -> tuple[list[Found], int]:
    """(pictures, side of a crop, layers, effort) to what efforts 0 to this one find, and the pixels encoded."""
    import torch
    from PIL import Image

    from compass_codec import container, metrics, pictures
    from compass_codec.codec import Codec, layer_sizes
    from compass_codec.measure.protocol import middle

    files, side, count, effort = task
    torch.set_num_threads(1)
    codec, scales = Codec.load("cpu", engine="torch"), LAYERS[count]
    found, pixels = [Found() for _ in range(effort + 1)], 0
    for file in files:
        image = middle(Image.open(file).convert("RGB"), side)
        layers = pictures.pyramid(image, layer_sizes(image.size, scales))
        for each in found:
            each.points.append([[] for _ in layers])
        for quality in QUALITIES:
            pixels += image.width * image.height
            for each, (data, seconds, memory) in zip(
                found, ladder(codec, layers, scales, quality, effort), strict=True
            ):
                header = container.read_header(data)
                decoded = codec.decode_layers(data, header, count - 1)
                for points, entry, layer, seen in zip(each.points[-1], header.layers, layers, decoded, strict=True):
                    points.append((8 * entry.end, metrics.psnr(layer, seen)))
                each.seconds += seconds
                each.memory = max(each.memory, memory)
    return found, pixels


def gains(plain: Found, found: Found) -> list[float]:
    """Of each layer, the mean over the pictures of the BD-rate in percent."""
    from compass_codec.measure.bd_rate import bd_rate

    def both(points: list[tuple[float, float]]) -> Any:
        return tuple(zip(*points, strict=True))

    values = [
        [bd_rate(*both(a), *both(b)).percent for a, b in zip(*pair, strict=True)]
        for pair in zip(plain.points, found.points, strict=True)
    ]
    return [sum(layer) / len(layer) for layer in zip(*values, strict=True)]


@click.command()
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="Folder of pictures."
)
@click.option("--quick", type=click.IntRange(1), help="Only this many of the pictures, evenly chosen. Default: all.")
@click.option(
    "--side",
    type=click.IntRange(16),
    help="Side of the middle of each picture that is used. Default: all.",
)
@click.option(
    "--layers",
    type=click.Choice(["1", "3"]),
    multiple=True,
    default=("1", "3"),
    show_default=True,
    help="Number of layers; can be given twice.",
)
@click.option(
    "--effort", type=click.IntRange(1, 9), default=9, show_default=True, help="Highest effort that is measured."
)
def main(images: Path, quick: int | None, side: int | None, layers: tuple[str, ...], effort: int) -> None:
    """Print a table of BD-rate against effort 0 at qualities 1, 30, 60 and 100, of each layer from the smallest to the
    largest with the bits of the file up to it; of time; and of memory."""
    from compass_codec.commands.common import one_line
    from compass_codec.measure.protocol import pictures_in

    with one_line():
        files = pictures_in(images, quick or 0)
    click.echo("| layers | effort | BD-rate | processor time a megapixel | peak memory |\n|---|---|---|---|---|")
    # a process for each, as the peak of memory is that of a process
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in map(int, layers):
            found, pixels = pool.apply(measure, ((files, side, count, effort),))
            for number, each in enumerate(found):
                change = ", ".join(f"{value:+.1f} %" for value in gains(found[0], each)) if number else "0"
                seconds = f"{each.seconds / pixels * 1e6:.2g} s"
                click.echo(f"| {count} | {number} | {change} | {seconds} | {each.memory:.0f} MiB |")


if __name__ == "__main__":
    main()
