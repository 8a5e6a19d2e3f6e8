"""The ``compass`` command: finds the subcommand, and turns errors into one line."""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from compass_codec import __version__

# name of the command: module that holds it under the same name
COMMANDS = {
    "encode": "compass_codec.commands.encode",
    "decode": "compass_codec.commands.decode",
    "info": "compass_codec.commands.info",
    "bench": "compass_codec.measure.bench",
    "extract": "compass_codec.commands.extract",
    "models": "compass_codec.commands.models",
    "view": "compass_codec.commands.view",
    "serve": "compass_codec.commands.serve",
    "web-assets": "compass_codec.commands.web_assets",
    "train": "compass_codec.training.command",
}


class Lazy(click.Group):
    """Imports a command when it is asked for, so that none waits for what another needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return getattr(importlib.import_module(COMMANDS[name]), name.replace("-", "_")) if name in COMMANDS else None


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="compass %(version)s")
def cli() -> None:
    """One picture, many sizes, one file: layered image compression with learned codecs."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command; every error is one line on stderr, exit code 1, or 2 for wrong usage."""
    _open_streams()
    try:
        sys.exit(cli.main(args, standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as e:
        click.echo(f"compass: {' '.join(e.format_message().split())}", err=True)
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("compass: stopped", err=True)
        sys.exit(130)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] in ("", "compass_codec"):
            raise
        click.echo(f"compass: this needs {e.name}, which is not installed (pip install {e.name})", err=True)
        sys.exit(1)
    except OSError as e:  # commands catch their own: this one is of what they print
        if not isinstance(e, BrokenPipeError):
            click.echo(f"compass: {e.filename or 'standard output'}: {e.strerror or e}", err=True)
        if sys.stdout is not None:  # what it still holds would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run() -> NoReturn:
    """``main`` as a process: it ends without freeing one by one what the system takes back at once, which would take an
    eighth of the time of decoding a small picture."""
    gc.set_threshold(10_000)  # imports make many objects that stay; to look through them often takes long too
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                code = code or 1
    os._exit(code)


def _open_streams() -> None:
    """Standard streams that were closed stay None, but no file that is opened later may get their number. Any name can
    be printed, also one that is not UTF-8."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 (as long as the process)
