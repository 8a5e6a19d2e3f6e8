"""``compass decode``."""

from __future__ import annotations

from pathlib import Path

import click

from compass_codec.commands import values
from compass_codec.commands.common import (
    File,
    Source,
    batch_options,
    device_option,
    force_option,
    json_option,
    pixels_option,
    precision_option,
    quiet_option,
    select,
    strip_option,
    weights_option,
    work,
)
from compass_codec.jobs.batch import Found
from compass_codec.jobs.job import DecodeOptions, Job
from compass_codec.jobs.paths import STDIO, is_stream
from compass_codec.jobs.report import Report


@click.command()
@click.argument("files", nargs=-1, type=Source())
@click.option(
    "-l", "--layer", type=click.IntRange(0), help="Layer to decode. Default: the highest that the file holds."
)
@click.option("--all", "every", is_flag=True, help="Write every layer that the file holds.")
@click.option("--best-effort", is_flag=True, help="Decode the highest undamaged layer of a damaged file.")
@click.option(
    "-o",
    "--output",
    type=File(),
    help="Output file. Default: FILE with .layerK.png. With --all, .layerK goes before the extension.",
)
@click.option(
    "--format",
    "extension",
    type=values.Value("EXT", values.extension),
    help="Extension of the output format: jpg, webp, ... Default: png.",
)
@strip_option
@batch_options
@force_option
@device_option
@precision_option
@weights_option
@pixels_option
@json_option
@quiet_option
def decode(
    files: tuple[Path | str, ...],
    layer: int | None,
    every: bool,
    best_effort: bool,
    output: Path | None,
    extension: str | None,
    strip: bool,
    out_dir: Path | None,
    files_from: Path | None,
    workers: int | None,
    ray: bool,
    engine: str,
    force: bool,
    device: str,
    precision: str,
    weights: Path | None,
    max_pixels: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Decode a layer of each of FILES to a picture; only the part of a file up to that layer is read.

    \b
    One file:
      compass decode photo.cmps                     the largest layer, to photo.layer2.png
      compass decode photo.cmps --layer 0 -o thumb.jpg
      compass decode photo.cmps --all
      compass decode - -o - < photo.cmps > photo.png
      compass decode https://example.org/photo.cmps --layer 1   fetches only what layer 1 needs
    \b
    Many files; outputs that are up to date are skipped:
      compass decode *.cmps --layer 1 --format webp --out-dir web -j 4
      compass decode archive/ --out-dir out
      find archive -name '*.cmps' -print0 | compass decode --files-from - --out-dir out
    \b
    On a Ray cluster:
      compass decode archive/ --out-dir /shared/out --ray

    In a batch, an output of the layer's size is kept, unless the file is newer. Another picture of that name is an
    error. --force makes everything anew.
    """
    if every and layer is not None:
        raise click.UsageError("--all and --layer exclude each other")
    if every and output and is_stream(output):
        raise click.UsageError("--all cannot write to standard output, a pipe or a device, which take one picture")
    if as_json and output == STDIO:
        raise click.UsageError("--json and the picture cannot both go to standard output")
    if output and extension:
        raise click.UsageError("--format and --output exclude each other")
    options = DecodeOptions(
        layer=layer,
        every=every,
        best_effort=best_effort,
        numbered=every or output is None,
        max_pixels=max_pixels,
        strip=strip,
        force=force,
        device=device,
        precision=precision,
        engine=engine,
        weights=weights,
    )
    extension = extension or ".png"
    if output is None and files == (STDIO,):
        output = Path(f"decoded{extension}")
    local = [file for file in files if isinstance(file, Path)]
    if len(local) == len(files):
        todo = select(local, files_from, out_dir, output, options, lambda: frozenset({".cmps"}), extension)
    else:
        if len(files) > 1 or files_from or out_dir or ray:
            raise click.UsageError("an address on the web is for one file alone")
        from compass_codec.remote import file_name

        name = file_name(str(files[0]))
        todo = Found([Job(name, output or name.with_suffix(extension), options, str(files[0]))])
    work(todo, ray, workers, as_json, quiet, _lines, _lines)


def _lines(report: Report) -> str:
    if report.state == "up to date":
        return "\n".join(f"{output}: up to date" for output in report.outputs)
    written = zip(report.outputs, report.layers, strict=True)
    return "\n".join(f"{output}: layer {e.index}, {e.width} x {e.height}" for output, e in written)
