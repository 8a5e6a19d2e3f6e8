"""``compass info``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compass_codec import container
from compass_codec.commands.common import Source, blame, table
from compass_codec.jobs.paths import STDIO, standard
from compass_codec.weights import profile_of


@click.command()
@click.argument("file", type=Source())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(file: Path | str, as_json: bool) -> None:
    """Show what FILE holds: sizes, scale factors, quality, alpha and metadata, and the bytes that each layer needs.

    FILE may be an address on the web; only the header is fetched.
    """
    with blame(file):
        if isinstance(file, str):
            header, size, states = fetch(file)
        else:
            data = standard("input").read() if file == STDIO else file.read_bytes()
            header = container.read_header(data, max_pixels=container.MAX_SIDE**2)
            size, states = len(data), container.states(header, data)
    profile = profile_of(header.model)
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
                "range": f"bytes=0-{e.end - 1}",
                "state": states[k],
            }
            for k, e in enumerate(header.layers)
        ]
        sections = [
            {
                "kind": container.KINDS[s.kind].field,
                "layer": s.layer if container.KINDS[s.kind].of_layer else None,
                "start": s.start,
                "length": s.length,
                "end": s.end,
                "state": state,
            }
            for s, state in zip(header.sections, states[len(layers) :], strict=True)
        ]
        facts = {
            "file": str(file),
            "size": size,
            "version": container.VERSION,
            "model": header.model,
            "profile": profile,
        }
        click.echo(json.dumps(facts | {"header": header.length, "layers": layers, "sections": sections}, indent=2))
        return
    named = f" ({profile})" if profile else ""
    length = "unknown" if size is None else size
    click.echo(f"{file}: compass version {container.VERSION}, {length} bytes, weights {header.model}{named}")
    rows = [["layer", "size", "scale", "quality", "bytes", "first N bytes", "HTTP range", ""]]
    for k, e in enumerate(header.layers):
        row = [str(k), f"{e.width} x {e.height}", f"{e.scale:g}", f"{e.quality:g}", str(e.length), str(e.end)]
        rows.append([*row, f"bytes=0-{e.end - 1}", shown(states[k])])
    show(rows)
    if header.sections:
        rows = [["section", "bytes", "start", "end", ""]]
        for s, state in zip(header.sections, states[len(header.layers) :], strict=True):
            rows.append([s.name, str(s.length), str(s.start), str(s.end), shown(state)])
        show(rows)


def fetch(url: str) -> tuple[container.Header, int | None, list[str]]:
    """The header of a file on a web server, the file's size if that is known, and the state of each layer and section
    as far as it shows without fetching them."""
    from compass_codec.remote import Remote

    with Remote(url) as remote:
        header = remote.header(max_pixels=container.MAX_SIDE**2)
    ends = [entry.end for entry in header.layers] + [section.end for section in header.sections]
    states = ["cut off" if remote.size is not None and end > remote.size else "not read" for end in ends]
    return header, remote.size, states


def shown(state: str) -> str:
    return "" if state in ("ok", "not read") else state


def show(rows: list[list[str]]) -> None:
    click.echo("\n".join(line.rstrip() for line in table(rows).splitlines()))
