"""``compass extract``."""

from __future__ import annotations

from pathlib import Path

import click

from compass_codec import container
from compass_codec.commands.common import File, Source, blame, force_option, quiet_option, strip_option
from compass_codec.jobs import paths
from compass_codec.jobs.job import Options
from compass_codec.jobs.paths import STDIO


@click.command()
@click.argument("file", type=Source())
@click.option("-l", "--layer", type=click.IntRange(0), required=True, help="Highest layer to keep.")
@click.option("-o", "--output", type=File(), help="Output file. Default: FILE with .layerK.cmps.")
@strip_option
@force_option
@quiet_option
def extract(file: Path | str, layer: int, output: Path | None, strip: bool, force: bool, quiet: bool) -> None:
    """Copy FILE's layers up to --layer into a smaller file, without decoding them.

    FILE may be an address on the web; only the bytes needed are fetched.

    \b
    compass extract photo.cmps --layer 1            to photo.layer1.cmps
    compass extract - --layer 0 < photo.cmps > thumb.cmps
    """
    if isinstance(file, str):
        from compass_codec.remote import file_name

        name, source = file_name(file), STDIO
    else:
        name = source = file
    with blame(file):
        if output is None:
            output = STDIO if file == STDIO else paths.beside(name, f".layer{layer}.cmps")
        paths.check_target(output, source, Options(force=force))
        data, tail = read_parts(file, layer, strip)
        small = container.extract(data, layer, tail, strip)
        paths.put(output, small)
    if not quiet and output != STDIO:
        entry = container.read_header(small, container.MAX_SIDE**2).layers[layer]
        layers = f"layers 0 to {layer}" if layer else "layer 0"
        click.echo(f"{output}: {layers}, {entry.width} x {entry.height}, {len(small)} bytes")


def read_parts(path: Path | str, layer: int, strip: bool) -> tuple[bytes, bytes]:
    """The first part of a file, up to the end of ``layer``, and the metadata behind its last layer unless ``strip``."""
    if isinstance(path, str):
        from compass_codec.remote import read_prefix

        found = read_prefix(path, layer, container.MAX_SIDE**2, metadata=not strip)
        return found.data[: found.header.layers[layer].end], found.tail
    data, _, _, tail = paths.read_parts(path, layer, container.MAX_SIDE**2, metadata=not strip)
    return data, tail
