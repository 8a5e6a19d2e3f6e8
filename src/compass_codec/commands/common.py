"""What the commands share: options, tables, errors that name the file, and the way through many files."""

from __future__ import annotations

import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from compass_codec import container, engines, errors
from compass_codec.errors import CompassError, told
from compass_codec.jobs import paths
from compass_codec.jobs.job import DecodeOptions, EncodeOptions, Job
from compass_codec.jobs.paths import STDIO
from compass_codec.jobs.report import Report, reason

if TYPE_CHECKING:
    from compass_codec.jobs import batch


class File(click.Path):
    """A path. ``-``, /dev/stdin and /dev/stdout are standard input or output; ./- is a file. Addresses are refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(value)):
            self.fail(f"{value}: is an address on the web; this takes files", param, ctx)
        if str(value) in ("/dev/stdin", "/dev/stdout"):
            return STDIO
        path = super().convert(value, param, ctx)
        return path.absolute() if path == STDIO and str(value) != "-" else path


class Source(File):
    """A file, or as text the address of one on a web server."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        try:
            urlsplit(value)
        except ValueError as e:
            self.fail(f"{value}: {e}", param, ctx)
        return value


@contextmanager
def one_line() -> Iterator[None]:
    """Turn an error in the user's input into click's one-line error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(told(error)) from error


@contextmanager
def blame(path: Path | str) -> Iterator[None]:
    """Report an error inside as one line that begins with the file's name."""
    try:
        yield
    except (BrokenPipeError, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as e:
        raise click.ClickException(reason(path, e)) from e


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first row as their heads, aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def select(
    files: Sequence[Path],
    files_from: Path | None,
    out_dir: Path | None,
    target: Path | None,
    options: EncodeOptions | DecodeOptions,
    suffixes: Callable[[], frozenset[str]],
    extension: str,
) -> batch.Found:
    """The jobs that the arguments ask for: one, to ``target`` if that is given, or a batch."""
    from compass_codec.jobs import batch

    if not files and files_from is None:
        raise click.UsageError("no files are named; name some or use --files-from")
    if files_from is None and out_dir is None and len(files) == 1:
        if stat.S_ISDIR(paths.mode_of(files[0])):
            raise click.ClickException(f"{files[0]}: is a directory; --out-dir takes what is in it")
        with blame(files[0]):
            return batch.Found([Job(files[0], target or paths.beside(files[0], extension), options)])
    if STDIO in files:
        raise click.UsageError("standard input is for one file alone, without --out-dir")
    if target:
        raise click.UsageError("--output is for one file; use --out-dir")
    listed: list[Path] = []
    if files_from:
        with blame(files_from):
            listed = batch.read_list(files_from)
    options = replace(options, batch=True)
    try:
        found = batch.make_jobs(files, listed, out_dir, suffixes, extension, options)
    except CompassError as e:
        raise click.ClickException(str(e)) from e
    if files and not (found.jobs or found.failed):
        left = f" ({found.note()})" if found.left_out else ""
        raise click.ClickException(f"{', '.join(map(str, files))}: no file of a known kind in it{left}")
    return found


def work(
    todo: batch.Found,
    ray: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
    show: Callable[[Report], str],
    show_one: Callable[[Report], str],
) -> None:
    """Do the jobs and print the result of each; the exit code is 1 if any failed."""
    if ray:
        from compass_codec.jobs.cluster import run
    else:
        from compass_codec.jobs.batch import run
    many = not todo.jobs or todo.jobs[0].options.batch
    bar: Any = None
    if many and not quiet and sys.stderr.isatty():
        bar = click.progressbar(
            length=len(todo.jobs) + len(todo.failed), show_pos=True, item_show_func=lambda text: text, file=sys.stderr
        )

    def say(text: str, err: bool = False) -> None:
        over_bar = bar and (err or sys.stdout.isatty())
        click.echo(f"\r\x1b[K{text}" if over_bar else text, err=err)

    started, states, size = time.perf_counter(), Counter[str](), 0
    try:
        with bar or nullcontext(), closing(run(todo.jobs, workers)) as reports:
            for report in chain(todo.failed, reports):
                states[report.state] += 1
                size += report.size
                for note in report.notes if not quiet else ():
                    say(errors.one_line(f"note: {report.source}: {note}"), err=True)
                if as_json:
                    say(report.as_json())
                if report.error:
                    say(f"compass: {report.error}", err=True)
                elif not quiet and not as_json and not (bar and sys.stdout.isatty()):
                    to_stdout = STDIO in report.outputs
                    say(show(report) if many else show_one(report), err=to_stdout)
                if bar:
                    bar.update(1, f"{sum(states.values()) / (time.perf_counter() - started):.2f} files/s")
    except CompassError as e:
        raise click.ClickException(str(e)) from e
    bar = None
    if many and not quiet:
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "nothing to do"
        seconds = time.perf_counter() - started
        left = f"; {todo.note()}" if todo.left_out else ""
        say(f"{counts}; {size} bytes written in {seconds:.1f} s{left}", err=as_json)
    if states["failed"]:
        click.get_current_context().exit(1)


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
ENGINE_HELP = "torch: PyTorch; onnx: ONNX Runtime, on a CPU; auto: onnx where it can do it, as it starts sooner."
engine_option = click.option(
    "--engine", type=click.Choice(engines.ENGINES), default="auto", show_default=True, help=ENGINE_HELP
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "float16"]),
    default="auto",
    show_default=True,
    help="Number format of the networks above the base layer; auto is the fastest here. Any decodes every file.",
)
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite outputs that exist.")
strip_option = click.option("--strip", is_flag=True, help="Drop ICC profile, EXIF and XMP; they are kept otherwise.")
quiet_option = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=container.MAX_PIXELS,
    show_default=True,
    help="Refuse files whose largest layer has more pixels.",
)
weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of a set of weights; it is looked up before those installed.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each file.")
BATCH = (
    click.option(
        "--out-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder for outputs, made if missing. Folders among the arguments keep their shape below it.",
    ),
    click.option(
        "--files-from",
        type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
        help="Read file names from a file, or from standard input with -: one a line, or as find -print0 writes them.",
    ),
    click.option(
        "-j",
        "--jobs",
        "workers",
        type=click.IntRange(1),
        help="Processes for a batch, with one thread each. Default: one per core; with a GPU at most 8.",
    ),
    click.option("--ray", is_flag=True, help="Run a batch on a Ray cluster, whose machines must see the same files."),
    engine_option,
)


def batch_options(command: Any) -> Any:
    """Adds the options of a command that takes many files."""
    for option in reversed(BATCH):
        command = option(command)
    return command
