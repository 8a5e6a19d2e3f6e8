"""``compass web-assets``."""

from __future__ import annotations

from pathlib import Path

import click

from compass_codec.commands.common import one_line, weights_option
from compass_codec.weights import DEFAULT


@click.command("web-assets")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@weights_option
@click.option("--model", help=f"Profile of weights (compass models lists them); default: {DEFAULT}.")
def web_assets(folder: Path, weights: Path | None, model: str | None) -> None:
    """Write what decodes .cmps files in browsers to FOLDER: scripts, a WebAssembly module and the set's weights.

    \b
    <script type="module" src="compass.js"></script>
    <img data-cmps="photo.cmps">              smallest layer first, then larger ones
    <img src="photo.cmps?w=640">              from the smallest layer that is 640 wide or more

    Pictures lie in FOLDER or below it. Any web server that answers Range requests will do.
    """
    from compass_codec import web
    from compass_codec.files import write_file
    from compass_codec.weights import choose

    with one_line():
        found = choose(weights, model)
        parts = {name: web.script(name) for name in web.SCRIPTS}
        parts[web.weights_name(found.identity)] = web.weights_of(found)
        for name, data in parts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
    size = sum(map(len, parts.values()))
    click.echo(f"{folder}: {len(parts)} files, {size} bytes, weights {found.identity} ({found.profile})")
