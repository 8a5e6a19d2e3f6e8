"""``compass info``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from compass_codec import container
from compass_codec.commands.common import STDIO, blame, table


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(file: Path, as_json: bool) -> None:
    """Show what FILE holds: sizes, scale factors, quality, and the bytes that each layer needs."""
    with blame(file):
        data = sys.stdin.buffer.read() if file == STDIO else file.read_bytes()
        header = container.read_header(data, max_pixels=container.MAX_SIDE**2)
        states = container.states(header, data)
    if as_json:
        layers = [
            {
                "layer": k,
                "width": e.width,
                "height": e.height,
                "scale": e.scale,
                "quality": e.quality,
                "start": e.start,
                "length": e.length,
                "end": e.end,
                "state": states[k],
            }
            for k, e in enumerate(header.layers)
        ]
        facts = {"file": str(file), "size": len(data), "version": container.VERSION, "model": header.model}
        click.echo(json.dumps(facts | {"header": header.length, "layers": layers}, indent=2))
        return
    click.echo(f"{file}: compass version {container.VERSION}, {len(data)} bytes, weights {header.model}")
    rows = [["layer", "size", "scale", "quality", "bytes", "first N bytes", ""]]
    for k, e in enumerate(header.layers):
        state = "" if states[k] == "ok" else states[k]
        row = [str(k), f"{e.width} x {e.height}", f"{e.scale:g}", f"{e.quality:g}", str(e.length), str(e.end), state]
        rows.append(row)
    click.echo("\n".join(line.rstrip() for line in table(rows).splitlines()))
