"""One file's work from path to path: what the command line, its worker processes and a cluster all do."""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compass_codec import container
from compass_codec.errors import DamagedError
from compass_codec.jobs.fresh import decoded_alike, encoded_alike
from compass_codec.jobs.job import DecodeOptions, EncodeOptions, Job, Options
from compass_codec.jobs.paths import STDIO, changed_at, check_target, is_stream, put, read_parts, read_picture
from compass_codec.jobs.plan import plan_layers
from compass_codec.jobs.report import LayerReport, Report, reason
from compass_codec.jobs.targets import search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.codec import Codec, Encoded
    from compass_codec.search import Coded

SMALL = 2**18  # pixels of a layer up to which starting threads costs more than they save
CLEAR = "\r\x1b[K"  # of a terminal's line


def run(job: Job) -> Report:
    """Do the work; any error with this file becomes a report of failure. Raises only what stops the whole
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


def encode(source: Path, target: Path, options: EncodeOptions) -> Report:
    """Encode the picture ``source`` into the file ``target``. Raises CompassError, OSError or MemoryError."""
    changed = changed_at(source)
    if options.batch and not options.force and target.is_file() and encoded_alike(source, target, options):
        if target.stat().st_mtime_ns >= changed:
            return Report(source, "up to date", (target,))
    else:
        check_target(target, source, options)
    from compass_codec import colour, metrics, pictures

    metric = None if options.target is None or options.target.of_size else metrics.METRICS[options.target.kind]
    if metric:
        metric.identity()  # or what is missing is said before the work
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

    def attempt(quality: float | Sequence[float]) -> Encoded:
        show = _show_effort if options.progress else None
        return loaded.encode_layers(
            layers, plan.scales, quality, options.effort, options.time_budget, show, plan.weights, sections
        )

    shows: list[NDArray[np.uint8] | None] = [*alphas] or [None] * len(layers)

    if options.target is None:
        encoded = attempt(plan.qualities)
    else:
        pixels = layers[-1].shape[0] * layers[-1].shape[1]

        def measured(e: Encoded) -> tuple[int, float]:
            return len(e.data), metric.of(layers[-1], e.layers[-1], shows[-1]) if metric else math.nan

        found = search(options.target, pixels, attempt, measured)
        encoded, encodes = found.result, found.encodes
        if not (found.reached and found.near):
            gives = f"{len(encoded.data)} bytes, {8 * len(encoded.data) / pixels:.3f} bpp"
            if metric:
                told = metric.text(found.value)
                gives += f", {told}" if metric.unit else f", {metric.title} {told}"
            why = "lies between two steps of quality" if found.reached else "is beyond the quality scale"
            notes.append(f"{options.target} {why}; quality {found.quality:g} gives {gives}")
    if options.progress:
        print(end=CLEAR, file=sys.stderr, flush=True)
    put(target, data := encoded.data, options.batch, changed)
    decibels: list[float | None] = [None] * len(layers)
    if options.verify:
        _verify(loaded, data if is_stream(target) else target.read_bytes(), encoded.layers, sections, target)
    if options.verify or metric:  # to reconstruct the top layer takes as long as to decode it
        decibels = [metrics.psnr(*layer) for layer in zip(layers, encoded.layers, shows, strict=True)]
    header = container.read_header(data)
    reports = tuple(_layer_report(header, k, value) for k, value in enumerate(decibels))
    return Report(source, "encoded", (target,), reports, len(data), encodes, notes=tuple(notes))


def decode(source: Path, target: Path, options: DecodeOptions, url: str | None = None) -> Report:
    """Decode layers of ``source`` into pictures named after ``target``. Raises CompassError, OSError or MemoryError."""
    notes: list[str] = []
    changed = 0 if url else changed_at(source)
    asked = None if options.best_effort else options.layer
    if url is None:
        data, header, last, tail = read_parts(source, asked, options.max_pixels, metadata=not options.strip)
    else:
        from compass_codec import remote

        found = remote.read_prefix(url, asked, options.max_pixels, metadata=not options.strip)
        data, header, last, tail = found.data, found.header, found.layer, found.tail
        notes = [f"{found.fetched} bytes fetched" + (f" of {found.size}" if found.size is not None else "")]
    top = container.pick(header, header.end, options.layer)
    if options.best_effort:
        last = container.soundest(header, data, min(last, top))
    if last < top:
        notes.append(f"layer {last} of 0 to {len(header.layers) - 1} is the highest that is there whole")
    wanted = {
        k: target.with_name(f"{target.stem}.layer{k}{target.suffix}") if options.numbered else target
        for k in (range(last + 1) if options.every else [last])
    }
    from compass_codec import colour, pictures

    formats = {k: Path("x.png") if is_stream(p) and not p.suffix else p for k, p in wanted.items()}
    for path, name in zip(wanted.values(), formats.values(), strict=True):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        pictures.check_format(name)
    outputs = tuple(wanted.values())
    if options.batch and not options.force and all(decoded_alike(p, header.layers[k]) for k, p in wanted.items()):
        if all(p.stat().st_mtime_ns >= changed for p in outputs):
            return Report(source, "up to date", outputs)
    else:
        for output in outputs:
            check_target(output, source, options)
    known = container.without_metadata(header) if options.strip else header
    sections = container.sections(known, data, wanted, tail, options.best_effort, notes)
    alphas = {
        k: pictures.alpha_from_bytes(coded, (header.layers[k].width, header.layers[k].height))
        for k, coded in sections.alpha.items()
    }
    small = header.layers[last].width * header.layers[last].height <= SMALL
    decoded = load(options, header.model, small).decode_layers(data, header, last)
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


def load(options: Options, model: str | None = None, small: bool = False) -> Codec:
    """The codec of the set ``model``, or of that in the options, loaded once in a process. A batch computes with one
    thread: how many there are shows in the last bits of sums, and so in the bytes of a file, which must not depend on
    the number of workers. So does what decodes one ``small`` picture."""
    from compass_codec import codec
    from compass_codec.engines import threads

    if options.batch or small:
        threads.use_one()
    return codec.shared(options.device, options.weights, options.precision, model or options.model, options.engine)


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
