"""``compass encode``."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click

from compass_codec import container
from compass_codec.commands.common import (
    STDIO,
    Scales,
    blame,
    check_target,
    device_option,
    force_option,
    put,
    quiet_option,
    table,
    weights_option,
)
from compass_codec.errors import CompassError


@click.command()
@click.argument("image", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-s", "--scales", type=Scales(), required=True, help="Size of each layer relative to the first.")
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), help="Default: IMAGE with .cmps.")
@click.option(
    "-q", "--quality", type=click.FloatRange(1, 100), default=60, show_default=True, help="1 (small) to 100 (good)."
)
@click.option("--verify", is_flag=True, help="Decode what was written and compare it with the encoder's pictures.")
@force_option
@device_option
@weights_option
@quiet_option
def encode(
    image: Path,
    scales: list[float],
    output: Path | None,
    quality: float,
    verify: bool,
    force: bool,
    device: str,
    weights: Path | None,
    quiet: bool,
) -> None:
    """Encode IMAGE once, as one layer for each scale factor; the last layer is the picture itself.

    \b
    compass encode photo.png --scales 1,2.0,3.2
    compass encode photo.jpg --scales 1,1.5,4 -q 80 -o web/photo.cmps
    """
    if output is None:
        output = STDIO if image == STDIO else image.with_suffix(".cmps")
    check_target(output, force, image)
    from compass_codec import pictures

    with blame(image):
        picture = pictures.read(io.BytesIO(sys.stdin.buffer.read()) if image == STDIO else image).image
    with blame(image):
        from compass_codec import codec

        loaded = codec.shared(device, weights)
        layers = pictures.pyramid(picture, codec.layer_sizes(picture.size, scales))
        result = loaded.encode_layers(layers, scales, quality)
    put(output, result.data)
    if verify:
        with blame(output):
            data = result.data if output == STDIO else output.read_bytes()
            header = container.read_header(data)
            for k, decoded in enumerate(loaded.decode_layers(data, header, len(scales) - 1)):
                if not (decoded == result.layers[k]).all():
                    raise CompassError(f"layer {k} does not decode to what the encoder reconstructed")
    if not quiet:
        header = container.read_header(result.data)
        rows = [["layer", "size", "scale", "bytes", "bpp", "acc. bytes", "acc. bpp", "PSNR"]]
        for k, entry in enumerate(header.layers):
            pixels, length = entry.width * entry.height, entry.end - (header.layers[k - 1].end if k else 0)
            row = [str(k), f"{entry.width} x {entry.height}", f"{entry.scale:g}", str(length)]
            row += [f"{8 * length / pixels:.3f}", str(entry.end), f"{8 * entry.end / pixels:.3f}"]
            rows.append([*row, f"{pictures.psnr(layers[k], result.layers[k]):.2f}"])
        note = ", verified" if verify else ""
        click.echo(f"{table(rows)}\n{output}: {len(result.data)} bytes, quality {quality:g}{note}", err=output == STDIO)
