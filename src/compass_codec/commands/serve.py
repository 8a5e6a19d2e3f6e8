"""``compass serve``."""

from __future__ import annotations

import importlib.util
import logging
import socket
import sys
from pathlib import Path

import click

from compass_codec.commands.common import (
    blame,
    device_option,
    engine_option,
    precision_option,
    quiet_option,
    weights_option,
)

MIB = 2**20


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@click.option(
    "--cache", type=click.IntRange(0), default=256, show_default=True, help="MiB of decoded layers to keep in memory."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=16_000_000,
    show_default=True,
    help="Refuse requests that need a layer of more pixels.",
)
@click.option(
    "--decodes", type=click.IntRange(1), default=1, show_default=True, help="Layers decoded at the same time."
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Layers that may wait to be decoded; further requests get 503.",
)
@click.option(
    "--max-age",
    type=click.IntRange(0),
    default=3600,
    show_default=True,
    help="Seconds that clients may cache an answer.",
)
@device_option
@engine_option
@precision_option
@weights_option
@quiet_option
def serve(
    folder: Path,
    host: str,
    port: int,
    cache: int,
    max_pixels: int,
    decodes: int,
    queue: int,
    max_age: int,
    device: str,
    engine: str,
    precision: str,
    weights: Path | None,
    quiet: bool,
) -> None:
    """Serve the .cmps files in FOLDER over HTTP, in any size and as AVIF, WebP, JPEG or PNG.

    \b
    /                   a page that shows every picture
    /photo.png?w=640    from the smallest layer that is 640 wide or more
    /photo?w=640        in the type that the client likes best
    /photo.cmps         the file without EXIF and XMP, with Range requests
    /app/               a page that shows every picture, decoded in the browser
    """
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise click.ClickException("serve needs Starlette and uvicorn: pip install 'compass_codec[serve]'")
    import uvicorn

    from compass_codec import codec
    from compass_codec.server import Settings, make_app

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as e:
        raise click.ClickException(f"{host}:{port}: {e.strerror or e}") from e
    with listening, blame(folder):
        loaded = codec.shared(device, weights, precision, engine=engine)
        app = make_app(folder, loaded, Settings(cache * MIB, max_pixels, decodes, queue, max_age, weights))
        if not quiet:
            log = logging.getLogger("uvicorn.access")
            log.setLevel(logging.INFO)
            log.addHandler(logging.StreamHandler(sys.stderr))
            name = f"[{host}]" if ":" in host else host
            click.echo(f"{folder}: http://{name}:{listening.getsockname()[1]}/ (Ctrl-C stops)")
        config = uvicorn.Config(app, log_config=None, access_log=not quiet, timeout_graceful_shutdown=2, lifespan="off")
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            if not quiet:
                click.echo("stopped", err=True)
