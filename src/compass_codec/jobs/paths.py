"""Sources and targets: files, pipes, standard input and output."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from compass_codec import container
from compass_codec.errors import OptionError
from compass_codec.jobs.job import Options

if TYPE_CHECKING:
    from compass_codec.pictures import Source

STDIO = Path("-")


def mode_of(path: Path) -> int:
    """What a path leads to, for the functions of ``stat``; 0 where nothing is or nothing can be told."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def is_stream(path: Path) -> bool:
    """Standard input or output, or a pipe or device: it is read and written once, and has no age."""
    kind = mode_of(path)
    return path == STDIO or (kind != 0 and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind))


def beside(source: Path, ending: str) -> Path:
    """Where the output of a file lies unless a place for it is named: beside it, under its name with another ending.
    Raises OptionError for a pipe or device, whose name is no file's, and IsADirectoryError."""
    if is_stream(source):
        raise OptionError("is a pipe or device; name its output with -o")
    if source.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(source))
    return source.with_suffix(ending)


def standard(name: Literal["input", "output"]) -> BinaryIO:
    """Standard input or output. Raises OSError where it is closed."""
    stream = sys.stdin if name == "input" else sys.stdout
    if stream is None:
        raise OSError(errno.EBADF, "is closed", f"standard {name}")
    return stream.buffer


def check_target(path: Path, source: Path, options: Options) -> None:
    """Refuse early what could not be written after minutes of work. Raises OSError."""
    if path == STDIO:
        standard("output")
        return
    try:
        found: os.stat_result | None = path.stat()
    except FileNotFoundError:
        found = None  # any other error, as of links in a circle, is raised
    if found and source != STDIO and source.exists() and path.samefile(source):
        raise FileExistsError(errno.EEXIST, "the output would overwrite the input", str(path))
    if found and stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
    if found and not stat.S_ISREG(found.st_mode):  # a pipe or device is written as it is
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(path))
        return
    if found and not options.force:
        made = " and differs from what these options make" if options.batch else ""
        raise FileExistsError(errno.EEXIST, f"exists already{made}; --force overwrites it", str(path))
    folder = path.resolve().parent if path.is_symlink() else path.parent
    while options.batch and not path.is_symlink() and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "the directory cannot be written to", str(path))


def put(path: Path, data: bytes, make_folder: bool = False, not_before: int = 0) -> None:
    """Write the file whole or not at all, or to standard output, a pipe or a device. A file is not older than
    ``not_before`` (ns since 1970), the time of its source, which may lie in the future. Raises OSError naming
    ``path``."""
    from compass_codec.files import write_file

    name = "standard output" if path == STDIO else str(path)
    try:
        if path == STDIO:
            output = standard("output")
            output.write(data)
            output.flush()
        elif is_stream(path):
            path.write_bytes(data)
        else:
            if make_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
            if path.stat().st_mtime_ns < not_before:
                os.utime(path, ns=(not_before, not_before))
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), name) from e


def read_picture(path: Path) -> Source:
    """The picture in a file or on standard input. Raises PictureError or OSError."""
    from compass_codec import pictures

    return pictures.read(io.BytesIO(standard("input").read()) if path == STDIO else path)


def read_parts(
    path: Path, layer: int | None, max_pixels: int, metadata: bool = False
) -> tuple[bytes, container.Header, int, bytes]:
    """The part of a .cmps file that ``layer`` needs (default: the highest complete), its header, that layer, and with
    ``metadata`` what lies behind the layers. A pipe is read to its end, as it is read once. Raises CompassError or
    OSError."""
    with nullcontext(standard("input")) if path == STDIO else path.open("rb") as opened:
        file = io.BytesIO(opened.read()) if is_stream(path) else opened
        start = file.read(container.MAX_HEADER)
        header = container.read_header(start, max_pixels)
        last = container.pick(header, file.seek(0, io.SEEK_END), layer)
        file.seek(0)
        data, behind = file.read(header.layers[last].end), header.layers[-1].end
        file.seek(behind)
        return data, header, last, file.read(header.end - behind) if metadata else b""


def read_prefix(path: Path, layer: int | None, max_pixels: int) -> tuple[bytes, container.Header, int]:
    """As ``read_parts``, without metadata."""
    return read_parts(path, layer, max_pixels)[:3]


def changed_at(source: Path) -> int:
    """When a file was written, in ns since 1970, taken before it is read; 0 for what has no age."""
    return 0 if is_stream(source) else source.stat().st_mtime_ns
