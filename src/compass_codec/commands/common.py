"""What the commands share: options, tables, checked targets, and errors that name the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from compass_codec import container
from compass_codec.errors import CompassError, OptionError

STDIO = Path("-")
HEADER_READ = 4096  # more than any header


class Scales(click.ParamType):
    """Scale factors separated by commas."""

    name = "S0,S1,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return container.check_scales([float(part) for part in str(value).split(",")])
        except OptionError as e:
            self.fail(f"{value}: {e}", param, ctx)
        except ValueError:
            self.fail(f"{value}: not numbers separated by commas", param, ctx)


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """What goes wrong inside is reported as one line that begins with the file's name."""
    name = "standard input" if path == STDIO else str(path)
    try:
        yield
    except CompassError as e:
        raise click.ClickException(f"{name}: {e}") from e
    except BrokenPipeError:
        raise
    except OSError as e:
        raise click.ClickException(f"{e.filename or name}: {e.strerror or e}") from e
    except (MemoryError, RuntimeError) as e:
        # PyTorch has no error of its own for this on the CPU
        if isinstance(e, RuntimeError) and "allocate memory" not in str(e) and "out of memory" not in str(e):
            raise
        raise click.ClickException(f"{name}: not enough memory") from e


def check_target(path: Path, force: bool, source: Path) -> None:
    """Refuse early what could not be written after minutes of work."""
    if path == STDIO:
        return
    if source != STDIO and path.exists() and source.exists() and path.samefile(source):
        raise click.ClickException(f"{path}: the output would overwrite the input")
    if path.is_dir():
        raise click.ClickException(f"{path}: is a directory")
    if path.is_file() and not force:
        raise click.ClickException(f"{path}: exists already; --force overwrites it")
    if not path.parent.is_dir():
        raise click.ClickException(f"{path}: no such directory")
    if not os.access(path.parent, os.W_OK):
        raise click.ClickException(f"{path}: the directory cannot be written to")


def put(path: Path, data: bytes) -> None:
    """Write the file whole or not at all, or to standard output."""
    from compass_codec.pictures import write_file

    with blame(path):
        if path == STDIO:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            write_file(path, data)


def read_prefix(path: Path, layer: int | None, max_pixels: int) -> tuple[bytes, container.Header, int]:
    """The part of a .cmps file that ``layer`` needs (default: the highest complete), its header and that layer."""
    with blame(path):
        if path == STDIO:
            data = sys.stdin.buffer.read()
            header = container.read_header(data, max_pixels)
            return data, header, container.pick(header, len(data), layer)
        with path.open("rb") as file:
            data = file.read(HEADER_READ)
            header = container.read_header(data, max_pixels)
            last = container.pick(header, os.fstat(file.fileno()).st_size, layer)
            end = header.layers[last].end
            return data[:end] + file.read(max(0, end - len(data))), header, last


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first row as their heads, aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite the output if it exists.")
quiet_option = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=container.MAX_PIXELS,
    show_default=True,
    help="Refuse files whose largest layer has more pixels.",
)
weights_option = click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False), help="Folder of other weights than the installed."
)
