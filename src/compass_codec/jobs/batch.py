"""Batches: finding the files, and processes that share the work."""

from __future__ import annotations

import codecs
import os
import signal
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

from compass_codec import engines
from compass_codec.engines.threads import cores
from compass_codec.errors import OptionError
from compass_codec.jobs import paths, single
from compass_codec.jobs.job import DecodeOptions, EncodeOptions, Job
from compass_codec.jobs.report import Report, reason

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

# formats that Pillow recognises and does not decode by itself
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
NAMED_KINDS = 5  # of what a walk left out
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
DIED = "its process died, possibly out of memory; try a smaller -j"
PATIENCE = 10  # seconds that a worker has to clean up once its parent is gone
# Processes that share a GPU: while one codes symbols on its core, a tenth of a second for 1920 x 1080, the networks of
# the others run. Each may take so many bytes of the GPU's memory. Both are estimates, not measured on a GPU.
GPU_WORKERS, GPU_SHARE = 8, 4 << 30


def picture_suffixes() -> frozenset[str]:
    """Extensions, in lower case, of the formats that Pillow reads."""
    from PIL import Image

    from compass_codec.pictures import register

    register()
    formats = Image.registered_extensions().items()
    known = Image.OPEN.keys() | {"MPO"}  # which the plugin for JPEG opens
    return frozenset(s.lower() for s, name in formats if name in known and name not in UNREADABLE)


def missing(suffix: str) -> str:
    """In brackets, the package that reads pictures of this extension; empty if there is none."""
    from compass_codec.pictures import HEIC_SUFFIXES, NEEDS_HEIF

    return f" ({NEEDS_HEIF})" if suffix in HEIC_SUFFIXES else ""


@dataclass
class Found:
    """A batch: its jobs, reports of those that failed already, and the number of names left out for each reason."""

    jobs: list[Job] = field(default_factory=list)
    failed: list[Report] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def note(self) -> str:
        """The names left out, in words; empty if there are none."""
        kinds = self.left_out.most_common()
        words = [f"{count} {kind}" for kind, count in kinds[:NAMED_KINDS]]
        if others := sum(count for _, count in kinds[NAMED_KINDS:]):
            words.append(f"{others} others")
        return f"left out: {', '.join(words)}" if words else ""


def read_list(path: Path) -> list[Path]:
    """The names in a file, or on standard input for ``-``: one on each line, or ended by NUL. A byte order mark at the
    start of lines is no part of the first name; UTF-16 is known by its mark. Raises OSError and OptionError."""
    data = paths.standard("input").read() if path == paths.STDIO else path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeError as e:
            raise OptionError(f"{path}: begins as UTF-16 and is not") from e
    names = data.split(b"\0") if b"\0" in data else data.removeprefix(codecs.BOM_UTF8).splitlines()
    return [Path(os.fsdecode(name)) for name in names if name]


def make_jobs(
    named: Iterable[Path],
    listed: Iterable[Path],
    out_dir: Path | None,
    suffixes: Callable[[], frozenset[str]],
    extension: str,
    options: EncodeOptions | DecodeOptions,
) -> Found:
    """A job for every file: ``named`` go to ``out_dir`` by their last name, relative names in a list (``listed``) with
    their folders, and what lies below a folder and has one of ``suffixes`` with its place in it. A folder that cannot
    be read is one failure, and so is a pipe where there is no ``out_dir``. Without that, outputs lie beside their
    sources, and folders are refused. Raises OptionError when two files would be written to one."""
    found, jobs_of = Found(), dict[str, Job]()
    places = [(path, Path(path.name)) for path in named]
    for path in listed:
        place = Path(path.name) if path.is_absolute() or ".." in path.parts else path
        # in a list, - is a file of that name
        places.append((path.absolute() if path == paths.STDIO else path, place))
    for path, place in places:
        below = stat.S_ISDIR(paths.mode_of(path))
        if below and out_dir is None:
            raise OptionError(f"{path}: is a directory; --out-dir takes what is in it")
        for source in _walk(path, suffixes(), found) if below else [path]:
            name = source.relative_to(path) if below else place
            try:
                target = (out_dir / name).with_suffix(extension) if out_dir else paths.beside(source, extension)
            except OptionError as e:
                found.failed.append(Report(source, "failed", error=reason(source, e)))
                continue
            key = os.path.abspath(target)  # noqa: PTH100 (resolve() would follow links)
            if key in jobs_of and not _same(jobs_of[key].source, source):
                raise OptionError(f"{jobs_of[key].source} and {source} would both be written to {target}")
            jobs_of.setdefault(key, Job(source, target, options))
    found.jobs = list(jobs_of.values())
    return found


def _same(a: Path, b: Path) -> bool:
    try:
        return a == b or a.samefile(b)
    except OSError:
        return False


def _walk(folder: Path, suffixes: frozenset[str], found: Found) -> Iterator[Path]:
    """The files below a folder that have one of the suffixes, sorted. ``found`` gets what cannot be read and what is
    left out: names that begin with a dot, links to folders, other extensions, pipes and devices."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as e:
        found.failed.append(Report(folder, "failed", error=reason(folder, e)))
        return
    for entry in entries:
        path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
        kind = paths.mode_of(path)  # 0, where it cannot be told, is left to the job, which says why
        if entry.name.startswith("."):
            found.left_out["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path, suffixes, found)
        elif stat.S_ISDIR(kind):
            found.left_out["links to folders"] += 1
        elif suffix not in suffixes:
            why = missing(suffix) if len(suffixes) > 1 else ""  # one: of .cmps files
            found.left_out[f"{suffix or 'without extension'}{why}"] += 1
        elif kind and not stat.S_ISREG(kind):
            found.left_out["pipes and devices"] += 1
        else:
            yield path


def run(work: Sequence[Job], workers: int | None = None) -> Generator[Report, None, None]:
    """Reports as jobs get done, in ``workers`` processes; one is this process. By default there is one for each core,
    as a batch computes with one thread in each, but no more than share a GPU well where one computes.

    A process that dies is the failure of the file that it worked on, and another takes its place. When the caller
    stops, so do they. Raises WeightsError and OptionError.
    """
    if any(job.options.batch for job in work):
        work[0].options.identity()  # what is wrong for every file is said once
        workers = workers or _default_workers(work[0].options.device, work[0].options.engine)
    if any(paths.is_stream(path) for job in work for path in (job.source, job.target)):
        workers = 1  # /dev/fd/63 is this process's alone
    workers = min(workers or 1, len(work))
    with stopped_by_exception():
        if workers <= 1:
            yield from map(single.run, work)
            return
        # not before: what starts processes takes longer to import than a small file to decode
        import multiprocessing
        from concurrent.futures import ThreadPoolExecutor, as_completed

        # a thread for each process, which does one job at a time: so it is known over which file one dies
        lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(workers):
            lanes.put(Lane())

        def do(job: Job) -> Report:
            lane = lanes.get()
            try:
                return lane.do(job)
            finally:
                lanes.put(lane)

        threads = ThreadPoolExecutor(workers, initializer=_leave_interrupts_to_the_main_thread)
        try:
            for done in as_completed([threads.submit(do, job) for job in work]):
                yield done.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            # again until all have ended, as one may just be starting; one that does not end is killed
            late = time.monotonic() + PATIENCE
            while lanes.qsize() < workers:
                for process in multiprocessing.active_children():
                    process.kill() if time.monotonic() > late else process.terminate()
                time.sleep(0.05)
            raise
        finally:
            threads.shutdown()
            for _ in range(workers):
                lanes.get().close()


def attempt(do: Callable[[Job], Report], job: Job) -> Report:
    """The report of ``do`` for a job; any error is the failure of this job."""
    started = time.perf_counter()
    try:
        return do(job)
    except Exception as e:
        error = reason(job.source, e)
        return Report(job.source, "failed", seconds=time.perf_counter() - started, error=error)


class Lane:
    """One worker process, started by the first job, and anew by the one after its death."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def do(self, job: Job) -> Report:
        """The report of a job; one of failure whatever happens to the process."""
        return attempt(self._work, job)

    def _work(self, job: Job) -> Report:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool

        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
            _leave_interrupts_to_the_main_thread()  # again: starting its resource tracker lets them through
        try:
            return self.pool.submit(_run, job).result()
        except BrokenProcessPool as e:
            self.close()
            raise OptionError(DIED) from e

    def close(self) -> None:
        """End the process."""
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def _leave_interrupts_to_the_main_thread() -> None:
    """Block Ctrl-C in this thread and in the processes that it starts: the main process decides when they stop."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def stopped_by_exception() -> Iterator[None]:
    """SIGTERM, and the SIGHUP of a terminal that is closed, raise SystemExit, which cleans up. What the caller handles
    or ignores, as under nohup, stays as it is."""
    before = {number: signal.getsignal(number) for number in STOPS}
    main = threading.current_thread() is threading.main_thread()  # no other may
    ours = [number for number in STOPS if main and before[number] == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _default_workers(device: str, engine: str) -> int:
    if engine != "onnx" and (device == "cuda" or (device == "auto" and engines.may_have_gpu())):
        from compass_codec.codec import choose_device

        if choose_device(device).type != "cpu":
            import torch

            room = torch.cuda.get_device_properties(0).total_memory // GPU_SHARE
            return max(1, min(cores(), room, GPU_WORKERS))
    return cores()


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # nothing interrupts what cleans up
    sys.exit(128 + number)


def _start() -> None:
    """In a new worker: stop by an exception, which cleans up; and when the parent is gone, killed perhaps."""
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()


def _outlive_no_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)


def _run(job: Job) -> Report:
    try:
        return single.run(job)
    except SystemExit as e:
        # by now nothing half-written is left; the pool would hand this on as a result and go on with the next job
        os._exit(int(e.code or 0))
