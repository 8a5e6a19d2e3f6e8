"""One file's work from path to path: what the command line, its worker processes and a cluster all do."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from compass_codec import container
from compass_codec.errors import CompassError, DamagedError, OptionError, one_line
from compass_codec.rate import HIGHEST, LOWEST, SIZE_WINDOW, Target, search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.codec import Codec
    from compass_codec.pictures import Source
    from compass_codec.search import Coded

STDIO = Path("-")
CLEAR = "\r\x1b[K"  # of a terminal's line
HEADER_READ = 4096  # more than any header
ORIENTATION, ROTATED = 0x0112, {5, 6, 7, 8}  # the EXIF tag, and its values that swap width and height


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both directions need. ``batch`` makes missing folders, leaves alone what is up to date, and computes with
    one thread; ``strip`` drops ICC profile, EXIF and XMP; ``weights`` and ``model`` are those of weights.choose."""

    force: bool = False
    batch: bool = False
    strip: bool = False
    device: str = "auto"
    precision: str = "auto"
    weights: Path | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Options):
    """How to encode. Exactly one of ``scales``, ``sizes`` (width, height) and ``widths`` is given, smallest first;
    ``qualities`` holds one number or one for each layer and does not matter with a ``target``. ``effort``,
    ``time_budget`` (seconds) and ``layer_weights`` are those of Codec.encode_layers; ``progress`` writes to standard
    error how it goes."""

    scales: tuple[float, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    widths: tuple[int, ...] = ()
    upscale: bool = False
    qualities: tuple[float, ...] = (60.0,)
    target: Target | None = None
    effort: int = 0
    time_budget: float | None = None
    layer_weights: tuple[float, ...] | None = None
    progress: bool = False
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    """What to decode: one layer (None: the highest that is whole) or, with ``every``, all of them. ``numbered`` puts
    .layerK before the extension of the target."""

    layer: int | None = None
    every: bool = False
    best_effort: bool = False
    numbered: bool = True
    max_pixels: int = container.MAX_PIXELS


@dataclass(frozen=True)
class Job:
    """One file to encode or decode. One to decode may be on a web server, at ``url``; ``source`` is then its name."""

    source: Path
    target: Path
    options: EncodeOptions | DecodeOptions
    url: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """A layer: its place in the file as the header gives it, and the PSNR in dB if it was just encoded."""

    index: int
    width: int
    height: int
    scale: float
    quality: float
    bytes: int
    end: int
    psnr: float | None = None

    @property
    def bpp(self) -> float:
        """Bits of this layer for each of its pixels."""
        return 8 * self.bytes / (self.width * self.height)

    @property
    def end_bpp(self) -> float:
        """Bits of the file up to this layer for each of its pixels."""
        return 8 * self.end / (self.width * self.height)

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        facts: dict[str, Any] = {"layer": self.index, "width": self.width, "height": self.height, "scale": self.scale}
        facts |= {"quality": self.quality, "bytes": self.bytes, "bpp": round(self.bpp, 4)}
        facts |= {"end": self.end, "end_bpp": round(self.end_bpp, 4)}
        if self.psnr is not None:
            facts["psnr"] = round(self.psnr, 3) if math.isfinite(self.psnr) else None
        return facts


@dataclass(frozen=True)
class Report:
    """What became of a job. ``state`` is "encoded", "decoded", "up to date" or "failed"; ``outputs`` were written, and
    ``size`` is their bytes; ``encodes`` counts those of the search for a target; ``error`` is one line."""

    source: Path
    state: str
    outputs: tuple[Path, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    size: int = 0
    encodes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None

    def as_json(self) -> str:
        """One line for programs."""
        facts: dict[str, Any] = {
            "file": str(self.source),
            "state": self.state,
            "outputs": [str(p) for p in self.outputs],
        }
        facts |= {"size": self.size, "layers": [layer.facts() for layer in self.layers]}
        if self.encodes:
            facts["encodes"] = self.encodes
        facts |= {"seconds": round(self.seconds, 3), "notes": list(self.notes)}
        return json.dumps(facts | ({"error": self.error} if self.error else {}))


@dataclass(frozen=True)
class Plan:
    """The layers of one picture, smallest first."""

    sizes: list[tuple[int, int]]
    scales: list[float]
    qualities: list[float]
    weights: list[float]
    notes: list[str] = field(default_factory=list)


def run(job: Job) -> Report:
    """Do the work; whatever is raised over this file becomes a report of failure. Raises only what stops the whole
    process: KeyboardInterrupt, SystemExit, and BrokenPipeError of standard output."""
    started = time.perf_counter()
    try:
        if isinstance(job.options, EncodeOptions):
            report = encode(job.source, job.target, job.options)
        else:
            report = decode(job.source, job.target, job.options, job.url)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in a library that is written in Rust is no Exception
        if isinstance(e, BrokenPipeError) and job.target == STDIO:
            raise
        report = Report(job.source, "failed", error=reason(job.url or job.source, e))
    return replace(report, seconds=time.perf_counter() - started)


def reason(path: Path | str, error: BaseException) -> str:
    """An error as one line that begins with a file's name, ``path`` unless the error knows better."""
    name = "standard input" if path == STDIO else str(path)
    if isinstance(error, CompassError):
        line = f"{name}: {error}"
    elif isinstance(error, OSError):
        line = f"{error.filename or name}: {error.strerror or error}"
    # PyTorch has no error of its own for this on the CPU
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    ):
        line = f"{name}: not enough memory"
    else:
        line = f"{name}: unexpected {type(error).__name__}: {error}"
    return one_line(line)


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
        raise OptionError("is a pipe or device; -o says where its output goes")
    if source.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(source))
    return source.with_suffix(ending)


def standard(name: Literal["input", "output"]) -> BinaryIO:
    """Standard input or output. Raises OSError where it is closed."""
    stream = sys.stdin if name == "input" else sys.stdout
    if stream is None:
        raise OSError(errno.EBADF, "is closed", f"standard {name}")
    return stream.buffer


def encode(source: Path, target: Path, options: EncodeOptions) -> Report:
    """Encode the picture ``source`` into the file ``target``. Raises CompassError, OSError or MemoryError."""
    changed = _changed(source)
    if options.batch and not options.force and target.is_file() and _encoded_alike(source, target, options):
        if target.stat().st_mtime_ns >= changed:
            return Report(source, "up to date", (target,))
    else:
        check_target(target, source, options)
    from compass_codec import colour, metrics, pictures

    picture = read_picture(source)
    if options.strip and picture.icc:
        picture = replace(picture, image=colour.to_srgb(picture.image, picture.icc, picture.notes, "--strip"))
    plan = plan_layers(picture.image.size, options)
    loaded = load(options)
    layers, alphas = pictures.pyramid_alpha(picture, plan.sizes)
    sections = container.Sections(alpha={k: pictures.alpha_to_bytes(alpha) for k, alpha in enumerate(alphas)})
    if not options.strip:
        sections = replace(sections, icc=picture.icc, exif=picture.exif, xmp=picture.xmp)
    notes, encodes = [*picture.notes, *plan.notes], 0
    del picture  # Pillow's copy of a large picture is not needed any more

    def attempt(quality: float | Sequence[float]) -> tuple[bytes, list[NDArray[np.uint8]]]:
        show = _show_effort if options.progress else None
        result = loaded.encode_layers(
            layers, plan.scales, quality, options.effort, options.time_budget, show, plan.weights
        )
        return container.attach(result.data, sections), result.layers

    def measured(seen: Sequence[NDArray[np.uint8]]) -> list[float]:
        """PSNR of each layer, of what shows."""
        shows: list[NDArray[np.uint8] | None] = [*alphas] or [None] * len(layers)
        return [metrics.psnr(*layer) for layer in zip(layers, seen, shows, strict=True)]

    if options.target is None:
        data, reconstructed = attempt(plan.qualities)
    else:
        pixels = layers[-1].shape[0] * layers[-1].shape[1]
        found = search(options.target, pixels, attempt, lambda e: (len(e[0]), measured(e[1])[-1]))
        (data, reconstructed), encodes = found.result, found.encodes
        if not (found.reached and found.near):
            gives = f"{len(data)} bytes, {8 * len(data) / pixels:.3f} bpp, {found.psnr:.2f} dB"
            why = "lies between two steps of quality" if found.reached else "is out of reach"
            notes.append(f"{options.target} {why}; quality {found.quality:g} gives {gives}")
    if options.progress:
        print(end=CLEAR, file=sys.stderr, flush=True)
    put(target, data, options.batch, changed)
    if options.verify:
        _verify(loaded, data if is_stream(target) else target.read_bytes(), reconstructed, sections, target)
    header = container.read_header(data)
    reports = tuple(_layer_report(header, k, value) for k, value in enumerate(measured(reconstructed)))
    return Report(source, "encoded", (target,), reports, len(data), encodes, notes=tuple(notes))


def decode(source: Path, target: Path, options: DecodeOptions, url: str | None = None) -> Report:
    """Decode layers of ``source`` into pictures named after ``target``. Raises CompassError, OSError or MemoryError."""
    notes: list[str] = []
    changed = 0 if url else _changed(source)
    if url is None:
        data, header, last, tail = read_parts(source, options.layer, options.max_pixels, metadata=not options.strip)
    else:
        from compass_codec import remote

        found = remote.read_prefix(url, options.layer, options.max_pixels, metadata=not options.strip)
        data, header, last, tail = found.data, found.header, found.layer, found.tail
        notes = [f"{found.fetched} bytes fetched" + (f" of {found.size}" if found.size is not None else "")]
    if options.best_effort:
        sound = [state == "ok" for state in container.states(header, data)[: len(header.layers)]]
        last = min(last, [*sound, False].index(False) - 1)
        if last < 0:
            raise DamagedError("layer 0 is damaged; nothing decodes")
    wanted = {
        k: target.with_name(f"{target.stem}.layer{k}{target.suffix}") if options.numbered else target
        for k in (range(last + 1) if options.every else [last])
    }
    from compass_codec import colour, pictures

    formats = {k: Path("x.png") if is_stream(p) and not p.suffix else p for k, p in wanted.items()}
    for name in formats.values():
        pictures.check_format(name)
    outputs = tuple(wanted.values())
    if options.batch and not options.force and all(_decoded_alike(p, header.layers[k]) for k, p in wanted.items()):
        if all(p.stat().st_mtime_ns >= changed for p in outputs):
            return Report(source, "up to date", outputs)
    else:
        for output in outputs:
            check_target(output, source, options)
    sections = container.sections(header, data, last, tail, options.best_effort)
    alphas = {
        k: pictures.alpha_from_bytes(coded, (header.layers[k].width, header.layers[k].height))
        for k, coded in sections.alpha.items()
        if k in wanted
    }
    decoded = load(options, header.model).decode_layers(data, header, last)
    size = 0
    for k, picture in [(k, picture) for k, picture in enumerate(decoded) if k in wanted]:
        image = pictures.with_alpha(picture, alphas.get(k))
        if options.strip and sections.icc:
            image = colour.to_srgb(image, sections.icc, notes, "--strip")
        encoded = pictures.to_bytes(image, formats[k], None if options.strip else sections, notes)
        put(wanted[k], encoded, options.batch, changed)
        size += len(encoded)
    return Report(
        source,
        "decoded",
        outputs,
        tuple(_layer_report(header, k) for k in wanted),
        size,
        notes=tuple(dict.fromkeys(notes)),
    )


def load(options: Options, model: str | None = None) -> Codec:
    """The codec of the set ``model``, or of that in the options, loaded once in a process. A batch computes with one
    thread: how many there are shows in the last bits of sums, and so in the bytes of a file, which must not depend on
    the number of workers."""
    import torch

    from compass_codec import codec

    if options.batch:
        torch.set_num_threads(1)
    return codec.shared(options.device, options.weights, options.precision, model or options.model)


def plan_layers(size: tuple[int, int], options: EncodeOptions) -> Plan:
    """The layers of a picture of ``size`` (width, height). With ``sizes`` and ``widths``, what is larger than the
    picture becomes its size unless ``upscale``; of equal layers the last stays. Scale factors are then those of the
    widths. Raises OptionError."""
    count = len(options.scales or options.sizes or options.widths)
    if len(options.qualities) not in (1, count):
        raise OptionError(f"{len(options.qualities)} qualities for {count} layers")
    qualities = list(options.qualities) * (count if len(options.qualities) == 1 else 1)
    weights = list(options.layer_weights or [1.0] * count)
    if options.scales:
        from compass_codec.codec import layer_sizes

        return Plan(layer_sizes(size, options.scales), container.check_scales(options.scales), qualities, weights)
    wanted = options.sizes or [(width, max(1, round(width * size[1] / size[0]))) for width in options.widths]
    fitted = [s if options.upscale else (min(s[0], size[0]), min(s[1], size[1])) for s in wanted]
    layers = dict(zip(fitted, zip(qualities, weights, strict=True), strict=True))
    sizes, notes = list(layers), []
    if large := [f"{w} x {h}" for (w, h), fit in zip(wanted, fitted, strict=True) if (w, h) != fit]:
        notes.append(f"{', '.join(large)}: not enlarged beyond the picture's {size[0]} x {size[1]} without --upscale")
    if dropped := count - len(sizes):
        notes.append(f"{dropped} of {count} layers dropped, as large as another")
    scales = container.check_scales([width / sizes[0][0] for width, _ in sizes])
    return Plan(sizes, scales, [q for q, _ in layers.values()], [w for _, w in layers.values()], notes)


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
        start = file.read(HEADER_READ)
        header = container.read_header(start, max_pixels)
        last = container.pick(header, file.seek(0, io.SEEK_END), layer)
        file.seek(0)
        data, behind = file.read(header.layers[last].end), header.layers[-1].end
        file.seek(behind)
        return data, header, last, file.read(header.end - behind) if metadata else b""


def read_prefix(path: Path, layer: int | None, max_pixels: int) -> tuple[bytes, container.Header, int]:
    """As ``read_parts``, without metadata."""
    return read_parts(path, layer, max_pixels)[:3]


def identity(options: Options) -> str:
    """The identity of the weights that ``options`` encode with. Raises WeightsError."""
    from compass_codec import weights

    return weights.identity(options.weights, options.model)


def _layer_report(header: container.Header, k: int, psnr: float | None = None) -> LayerReport:
    entry = header.layers[k]
    length = entry.end - (header.layers[k - 1].end if k else 0)
    return LayerReport(k, entry.width, entry.height, entry.scale, entry.quality, length, entry.end, psnr)


def _show_effort(effort: int, gain: float, layers: list[Coded]) -> None:
    print(
        f"{CLEAR}effort {effort}: {100 * gain:.2f} % of rate and distortion saved", end="", file=sys.stderr, flush=True
    )


def _verify(
    loaded: Codec, data: bytes, layers: Sequence[NDArray[np.uint8]], sections: container.Sections, path: Path
) -> None:
    header = container.read_header(data)
    if container.sections(header, data) != sections:
        raise DamagedError(f"alpha or metadata in {path} are not what was written")
    for k, decoded in enumerate(loaded.decode_layers(data, header, len(layers) - 1)):
        if not (decoded == layers[k]).all():
            raise DamagedError(f"layer {k} in {path} does not decode to what the encoder reconstructed")


def _changed(source: Path) -> int:
    """When a file was written, in ns since 1970, taken before it is read; 0 for what has no age."""
    return 0 if is_stream(source) else source.stat().st_mtime_ns


def _encoded_alike(source: Path, target: Path, options: EncodeOptions) -> bool:
    """Is ``target`` what ``options`` make of a picture of this size, as far as its header tells?

    Which PSNR was aimed at, it does not tell.
    """
    if is_stream(source):
        return False
    try:
        with target.open("rb") as file:
            header = container.read_header(file.read(HEADER_READ), container.MAX_SIDE**2)
    except CompassError:
        return False
    return any(_made_alike(header, target, size, options) for size in _picture_sizes(source))


def _made_alike(header: container.Header, target: Path, size: tuple[int, int], options: EncodeOptions) -> bool:
    """The same for one (width, height) that the picture may have."""
    entries = header.layers
    if options.scales:  # from which, and from the last, all other sizes follow
        sizes, scales, qualities = [size], list(options.scales), list(options.qualities)
    else:
        plan = plan_layers(size, options)
        sizes, scales, qualities = plan.sizes, plan.scales, plan.qualities
    if (
        header.model != identity(options)
        or [(e.width, e.height) for e in entries][-len(sizes) :] != sizes
        or [e.scale for e in entries] != scales
        or target.stat().st_size != header.end
        or (options.strip and any(not container.KINDS[s.kind].of_layer for s in header.sections))
    ):
        return False
    if options.target is None:
        wanted = qualities * (len(entries) if len(qualities) == 1 else 1)
        return [e.quality for e in entries] == [round(q, 2) for q in wanted]
    quality = entries[0].quality
    if any(e.quality != quality for e in entries):
        return False
    if options.target.kind == "psnr":
        return True
    length, most = header.end, options.target.most_bytes(entries[-1].width * entries[-1].height)
    return quality == LOWEST if length > most else length >= (1 - SIZE_WINDOW) * most or quality == HIGHEST


def _decoded_alike(path: Path, entry: container.Layer) -> bool:
    """Is there a picture of this layer's size? What Pillow writes and does not read, such as PDF, is known by its first
    bytes alone."""
    from PIL import Image

    from compass_codec import pictures

    if not path.is_file():
        return False
    size = (entry.width, entry.height)
    try:
        if pictures.check_format(path) in Image.OPEN:
            with Image.open(path) as image:
                return image.size == size
        blank = pictures.to_bytes(Image.new("RGB", size), path)
        with path.open("rb") as file:
            return file.read(8) == blank[:8]
    except Exception:  # whatever Pillow says of a broken file, it is no such picture
        return False


def _picture_sizes(path: Path) -> Iterator[tuple[int, int]]:
    """(width, height) of a picture once it is upright: what its head says, where that can be told, then what its pixels
    say. The two differ for formats that Pillow turns or enlarges by itself. Raises PictureError."""
    from PIL import Image

    from compass_codec import pictures

    try:
        with Image.open(path) as image:
            width, height = image.size
            size = (height, width) if image.getexif().get(ORIENTATION) in ROTATED else (width, height)
    except Exception:  # Pillow has no error of its own for bad EXIF; read() says what is wrong, or that nothing is
        size = None
    if size:
        yield size
    yield pictures.read(path).image.size
