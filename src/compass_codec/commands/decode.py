"""``compass decode``."""

from __future__ import annotations

from pathlib import Path

import click

from compass_codec import container
from compass_codec.commands.common import (
    STDIO,
    blame,
    check_target,
    device_option,
    force_option,
    pixels_option,
    put,
    quiet_option,
    read_prefix,
    weights_option,
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-l", "--layer", type=click.IntRange(0), help="Which layer; default: the highest that the file holds.")
@click.option("--all", "every", is_flag=True, help="Write every layer that the file holds.")
@click.option("--best-effort", is_flag=True, help="From a damaged file, take the highest layer that is sound.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Default: FILE with .layerK.png. With --all, .layerK goes before the extension.",
)
@force_option
@device_option
@weights_option
@pixels_option
@quiet_option
def decode(
    file: Path,
    layer: int | None,
    every: bool,
    best_effort: bool,
    output: Path | None,
    force: bool,
    device: str,
    weights: Path | None,
    max_pixels: int,
    quiet: bool,
) -> None:
    """Decode a layer of FILE to a picture; only the part of the file up to that layer is read.

    \b
    compass decode photo.cmps                     the largest layer, to photo.layer2.png
    compass decode photo.cmps --layer 0 -o thumb.jpg
    compass decode photo.cmps --all
    """
    if every and layer is not None:
        raise click.UsageError("--all and --layer exclude each other")
    if every and output == STDIO:
        raise click.UsageError("--all cannot write to standard output")
    data, header, last = read_prefix(file, layer, max_pixels)
    if best_effort:
        sound = [state == "ok" for state in container.states(header, data)]
        last = min(last, [*sound, False].index(False) - 1)
        if last < 0:
            raise click.ClickException(f"{file}: layer 0 is damaged; nothing decodes")
    name = output or (Path("decoded.png") if file == STDIO else file.with_suffix(".png"))
    wanted = {
        k: name if output and not every else name.with_name(f"{name.stem}.layer{k}{name.suffix}")
        for k in (range(last + 1) if every else [last])
    }
    from compass_codec import pictures

    for target in wanted.values():
        if target != STDIO:
            with blame(target):
                pictures.check_format(target)
        check_target(target, force, file)
    from PIL import Image

    with blame(file):
        from compass_codec import codec

        decoded = codec.shared(device, weights).decode_layers(data, header, last)
        kept = [(k, picture) for k, picture in enumerate(decoded) if k in wanted]
    for k, picture in kept:
        target = wanted[k]
        with blame(target):
            encoded = pictures.to_bytes(Image.fromarray(picture), Path("x.png") if target == STDIO else target)
        put(target, encoded)
        if not quiet and target != STDIO:
            click.echo(f"{target}: layer {k}, {picture.shape[1]} x {picture.shape[0]}")
