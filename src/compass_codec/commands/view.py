"""``compass view``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from compass_codec import container
from compass_codec.commands.common import (
    File,
    Source,
    blame,
    device_option,
    engine_option,
    force_option,
    pixels_option,
    precision_option,
    quiet_option,
    weights_option,
)
from compass_codec.errors import PictureError
from compass_codec.jobs import paths
from compass_codec.jobs.job import Options
from compass_codec.jobs.paths import STDIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@click.command()
@click.argument("file", type=Source())
@click.option(
    "--source",
    type=File(),
    help="Original picture, to show beside the layers and to measure PSNR against.",
)
@click.option("-o", "--output", type=File(), help="Output file. Default: FILE with the extension .html.")
@force_option
@device_option
@engine_option
@precision_option
@weights_option
@pixels_option
@quiet_option
def view(
    file: Path | str,
    source: Path | None,
    output: Path | None,
    force: bool,
    device: str,
    engine: str,
    precision: str,
    weights: Path | None,
    max_pixels: int,
    quiet: bool,
) -> None:
    """Write an HTML page that shows the layers of FILE side by side. The page needs no network.

    \b
    compass view photo.cmps                       to photo.html
    compass view photo.cmps --source photo.png    with PSNR
    compass view - < photo.cmps > photo.html

    FILE may be an address on the web.
    """
    if file == source == STDIO:
        raise click.UsageError("standard input is for one of FILE and --source")
    with blame(file):
        if isinstance(file, str):
            from compass_codec import remote

            name, path = remote.file_name(file), STDIO
        else:
            name = path = file
        target = output or (STDIO if file == STDIO else paths.beside(name, ".html"))
        paths.check_target(target, path, Options(force=force))
        if isinstance(file, str):
            fetched = remote.read_prefix(file, None, max_pixels)
            data, header, last = fetched.data, fetched.header, fetched.layer
        else:
            data, header, last = paths.read_prefix(file, None, max_pixels)
    layers = header.layers[: last + 1]
    from compass_codec import metrics, page, pictures

    original = None
    if source is not None:
        with blame(source):
            original = paths.read_picture(source)
            top = header.layers[-1]
            if original.image.size != (top.width, top.height):
                found = "{} x {}".format(*original.image.size)
                raise PictureError(f"{found}; the picture in {file} has {top.width} x {top.height}")
    with blame(file):
        from compass_codec import codec

        decoded = list(codec.shared(device, weights, precision, header.model, engine).decode_layers(data, header, last))
        alpha = container.sections(header, data, range(last + 1)).alpha
        sizes = [(entry.width, entry.height) for entry in layers]
        shown = [
            pictures.with_alpha(picture, pictures.alpha_from_bytes(alpha[k], sizes[k]) if k in alpha else None)
            for k, picture in enumerate(decoded)
        ]
    psnr: list[str] = []
    if original is not None:
        reduced, alphas = pictures.pyramid_alpha(original, sizes)
        shows: list[NDArray[np.uint8] | None] = [*alphas] or [None] * len(sizes)
        psnr = [f"{metrics.psnr(*layer):.2f}" for layer in zip(reduced, decoded, shows, strict=True)]
    heads = ["layer", "size", "scale", "quality", "bytes", "bpp", "acc. bytes", "acc. bpp"]
    rows = [heads + ["PSNR, dB"] * bool(psnr)]
    panes = []
    for k, entry in enumerate(layers):
        pixels, length = entry.width * entry.height, entry.end - (layers[k - 1].end if k else 0)
        size, bpp = f"{entry.width} x {entry.height}", f"{8 * entry.end / pixels:.3f}"
        row = [str(k), size, f"{entry.scale:g}", f"{entry.quality:g}", str(length), f"{8 * length / pixels:.3f}"]
        rows.append([*row, str(entry.end), bpp, *psnr[k : k + 1]])
        about = f"{size}, {entry.end} bytes, {bpp} bpp" + (f", {psnr[k]} dB" if psnr else "")
        panes.append(page.Pane(f"Layer {k}", about, shown[k]))
    if original is not None:
        if original.alpha is not None:
            original.image.putalpha(original.alpha)
        panes.append(page.Pane("Source", source.name if source else "", original.image))
    summary = f"{len(layers)} layers in {layers[-1].end} bytes: each is decoded from the first bytes of one file."
    if last + 1 < len(header.layers):
        summary += f" The file is cut off; it should have {len(header.layers)} layers."
    with blame(target):
        paths.put(target, page.view(name.name, summary, panes, rows).encode())
    if not quiet and target != STDIO:
        click.echo(f"{target}: {len(layers)} layer{'s' * (len(layers) > 1)}")
