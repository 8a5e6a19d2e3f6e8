"""Many files: which they are, and processes that share the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType

from compass_codec import jobs
from compass_codec.errors import OptionError
from compass_codec.jobs import DecodeOptions, EncodeOptions, Job, Report

# formats that Pillow recognises and does not decode by itself
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Processes that share a GPU: while one codes symbols on its core, a tenth of a second for 1920 x 1080, the networks of
# the others run. Each may take so many bytes of the GPU's memory. Both are estimates, not measured on a GPU.
GPU_WORKERS, GPU_SHARE = 8, 4 << 30
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, under Windows


def picture_suffixes() -> frozenset[str]:
    """Extensions, in lower case, of the formats that Pillow reads."""
    from PIL import Image

    from compass_codec.pictures import register

    register()
    formats = Image.registered_extensions().items()
    return frozenset(s.lower() for s, name in formats if name in Image.OPEN and name not in UNREADABLE)


def read_list(path: Path) -> list[Path]:
    """The names in a file, or on standard input for ``-``: one on each line, or ended by NUL. Raises OSError."""
    data = sys.stdin.buffer.read() if path == jobs.STDIO else path.read_bytes()
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [Path(os.fsdecode(name)) for name in names if name]


def make_jobs(
    named: Iterable[Path],
    listed: Iterable[Path],
    out_dir: Path | None,
    suffixes: Callable[[], frozenset[str]],
    extension: str,
    options: EncodeOptions | DecodeOptions,
) -> list[Job]:
    """A job for every file: ``named`` go to ``out_dir`` by their last name, relative names in a list (``listed``) with
    their folders, and what lies below a folder and has one of ``suffixes`` with its place in it. Without ``out_dir``
    outputs lie beside their sources, and folders are refused. Raises OptionError when two files would be written to
    one, and OSError."""
    found: dict[str, Job] = {}
    places = [(path, Path(path.name)) for path in named]
    places += [(p, Path(p.name) if p.is_absolute() or ".." in p.parts else p) for p in listed]
    for path, place in places:
        if path.is_dir() and out_dir is None:
            raise OptionError(f"{path}: is a directory; --out-dir takes what is in it")
        below = path.is_dir()
        for source in _walk(path, suffixes()) if below else [path]:
            name = source.relative_to(path) if below else place
            target = (out_dir / name if out_dir else source).with_suffix(extension)
            key = os.path.abspath(target)  # noqa: PTH100 (resolve() would follow links)
            if key in found and not _same(found[key].source, source):
                raise OptionError(f"{found[key].source} and {source} would both be written to {target}")
            found.setdefault(key, Job(source, target, options))
    return list(found.values())


def _same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """The files below a folder that have one of the suffixes, sorted; names that begin with a dot are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from _walk(path, suffixes)
        elif path.suffix.lower() in suffixes:
            yield path


def run(work: Sequence[Job], workers: int | None = None) -> Generator[Report, None, None]:
    """Reports as jobs get done, in ``workers`` processes; one is this process. By default there is one for each core,
    as a batch computes with one thread in each, but no more than share a GPU well where one computes.

    When the caller stops, so do they. Raises WeightsError and OptionError, also when a process dies.
    """
    if any(job.options.batch for job in work):
        jobs.identity(work[0].options)  # what is wrong for every file is said once
        workers = workers or _default_workers(work[0].options.device)
    workers = min(workers or 1, len(work))
    if workers <= 1:
        yield from map(jobs.run, work)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    # the processes inherit that they ignore Ctrl-C: this one alone decides when they stop
    interrupt, terminate = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, _stop)
    try:
        waiting = [pool.submit(_run, job) for job in work]
        signal.signal(signal.SIGINT, interrupt)
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool as e:
        raise OptionError("a worker process died, perhaps for want of memory; fewer of them (-j) need less") from e
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def _default_workers(device: str) -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # where there is certainly no GPU, PyTorch need not be loaded to hear so
    may_have_gpu = sys.platform != "linux" or any(Path(path).exists() for path in GPU_DRIVERS)
    if device == "cuda" or (device == "auto" and may_have_gpu):
        from compass_codec.codec import choose_device

        if choose_device(device).type != "cpu":
            import torch

            room = torch.cuda.get_device_properties(0).total_memory // GPU_SHARE
            return max(1, min(cores, room, GPU_WORKERS))
    return cores


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _start() -> None:
    """In a new worker: stop by an exception, which cleans up."""
    signal.signal(signal.SIGTERM, _stop)


def _run(job: Job) -> Report:
    try:
        return jobs.run(job)
    except SystemExit as e:
        # by now nothing half-written is left; the pool would hand this on as a result and go on with the next job
        os._exit(int(e.code or 0))
