"""What the numbers of the quality scale mean: ``python -m compass_codec.measure.quality --images DIR``.

Prints a page: for qualities 1 to 100 in words, bits and distances, and the numbers of other formats whose pictures are
as near to the original by Butteraugli's 3-norm. Pictures are single layers at full size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compass_codec.commands import values
from compass_codec.commands.common import one_line
from compass_codec.measure.protocol import FULL, OURS, pictures_in, rows

if TYPE_CHECKING:
    from compass_codec.measure.runner import Runner
    from compass_codec.measure.task import Original

METRICS = ("psnr", "butteraugli", "butteraugli-max")
PEERS = {  # what is measured of the other formats, from few bytes to many
    "avif": (10, 25, 40, 50, 60, 70, 80, 90, 97),
    "jxl": (5, 20, 40, 60, 75, 85, 92, 97),
    "webp": (1, 10, 30, 50, 70, 85, 95, 100),
}
# From the largest distance of a picture, max-norm, in steps of two: at 1 it cannot be told from the original.
WORDS = {
    1.25: "as the original, to the eye",
    2.5: "differs where one looks closely",
    5.0: "differs visibly side by side",
    8.0: "visibly coded",
    math.inf: "for previews: plainly coded",
}
NONE = "–"  # noqa: RUF001, a cell without a figure
COMMAND = "python -m compass_codec.measure.quality"


def in_words(largest: float) -> str:
    """A distance by the max-norm."""
    return next(words for most, words in WORDS.items() if largest <= most)


def number_of(distance: float, curve: Sequence[tuple[float, float]]) -> str:
    """The setting whose distance is ``distance``, of points (setting, distance) with rising settings: between two by
    the logarithm of their distances; beyond the ends only that."""
    (first, most), (last, least) = curve[0], curve[-1]
    if distance > most:
        return f"< {first:g}"
    if distance < least:
        return f"> {last:g}"
    for (low, far), (high, near) in pairwise(curve):
        if near <= distance <= far:
            share = math.log(far / distance) / math.log(far / near) if far > near > 0 else 0.0
            return f"{low + share * (high - low):.0f}"
    return NONE


def means(runner: Runner, sources: Sequence[Original], method: str, setting: float) -> tuple[float, ...]:
    """Bits per pixel and METRICS over the pictures: PSNR by its mean, distances by that of their logarithms. Raises Gap
    where a picture could not be measured."""
    from compass_codec import metrics
    from compass_codec.measure.peers import Gap
    from compass_codec.measure.task import Task

    found = []
    for source in sources:
        record = runner.records[Task(source, method, (FULL,), setting)]
        if "gap" in record:
            raise Gap(record["gap"])
        (layer,) = record["layers"]
        bpp = 8 * layer["bytes"] / (source.size[0] * source.size[1])
        found.append((bpp, *(metrics.METRICS[name].axis(layer[name]) for name in METRICS)))
    bpp, *axes = (sum(each) / len(found) for each in zip(*found, strict=True))
    return bpp, *(metrics.METRICS[name].value(axis) for name, axis in zip(METRICS, axes, strict=True))


def page(ours: Mapping[float, tuple[float, ...]], peers: Mapping[str, Sequence[tuple[float, float]]], of: str) -> str:
    """Markdown, of means by quality and of points (setting, distance) by the peer's title; ``of`` says of what."""
    head = ["quality", "", "bpp", "PSNR", "3-norm", "max-norm", *peers]
    body = []
    for quality, (bpp, decibels, distance, largest) in ours.items():
        cells = [f"{quality:g}", in_words(largest), f"{bpp:.2f}", f"{decibels:.1f} dB", f"{distance:.2f}"]
        body.append([*cells, f"{largest:.2f}", *(number_of(distance, curve) for curve in peers.values())])
    return f"""# The quality scale

What a quality of 1 to 100 gives, of {of}.
Each picture is a single layer at full size.
3-norm and max-norm are Butteraugli's distances by libjxl's `butteraugli_main`: the smaller the better.
The words follow the max-norm: at 1, people hardly tell the pictures apart side by side. The last columns are the
quality numbers of other formats (Pillow's defaults) with the same 3-norm.

{rows(head, body)}

Made by `{COMMAND}` (`make quality`). Means are over the pictures, of distances geometric ones.
"""


@click.command()
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of PNG pictures, such as Kodak.")
@click.option("--quick", type=click.IntRange(0), default=0, help="Only this many pictures.")
@click.option("--qualities", type=values.RISING, default="1,10,20,30,40,50,60,70,80,90,100", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/quality"),
    show_default=True,
    help="Folder that keeps what was measured, so that a run that was stopped goes on.",
)
@click.option("-j", "--jobs", type=click.IntRange(1), help="Processes of one thread each; default: one for each core.")
@click.option("--weights", type=click.Path(path_type=Path), help="Folder of weights; default: the installed ones.")
@click.option("--model", help="Profile of weights (compass models lists them).")
def main(
    images: Path,
    quick: int,
    qualities: tuple[float, ...],
    out: Path,
    jobs: int | None,
    weights: Path | None,
    model: str | None,
) -> None:
    """Print the table of the quality scale, as a page of Markdown."""
    from compass_codec import metrics
    from compass_codec.engines.threads import cores
    from compass_codec.measure import peers
    from compass_codec.measure.runner import Runner
    from compass_codec.measure.task import Original, Settings, Task
    from compass_codec.weights import choose

    if not 1 <= qualities[0] <= qualities[-1] <= 100:
        raise click.UsageError("qualities go from 1 to 100")
    with one_line():
        metrics.METRICS["butteraugli"].identity()
        chosen = choose(weights, model)
        sources = [Original.of(path) for path in pictures_in(images, quick)]
        out.mkdir(parents=True, exist_ok=True)
    runner = Runner(Settings(out / "measured.jsonl", chosen.folder, "cpu", METRICS), jobs or cores())
    wanted = {OURS: qualities, **PEERS}
    work = [
        Task(source, method, (FULL,), setting) for method in wanted for setting in wanted[method] for source in sources
    ]
    with click.progressbar(length=len(work), label="measuring", file=sys.stderr) as bar:
        runner.run(work, lambda _: bar.update(1))
    try:
        ours = {quality: means(runner, sources, OURS, quality) for quality in qualities}
    except peers.Gap as e:
        raise click.ClickException(str(e)) from e
    curves = {}
    for name in PEERS:
        try:
            curves[peers.PEERS[name].title] = [(s, means(runner, sources, name, s)[2]) for s in PEERS[name]]
        except peers.Gap as e:
            click.echo(f"note: without {peers.PEERS[name].title}: {e}", err=True)
    names = f"{sources[0].path.name} to {sources[-1].path.name}" if len(sources) > 1 else sources[0].path.name
    count = f"{len(sources)} picture{'s' * (len(sources) > 1)}"
    of = f"`{chosen.profile}` (weights {chosen.identity}) on {count} ({names})"
    click.echo(page(ours, curves, of), nl=False)


if __name__ == "__main__":
    main()
