"""Runs measurements over processes, and keeps what was measured, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import compass_codec
from compass_codec.measure.peers import J2K, PEERS, Gap
from compass_codec.measure.protocol import LEVELS, OURS, kind_of, layers_of, sets_of
from compass_codec.measure.task import Original, Record, Settings, Task, load
from compass_codec.metrics import METRICS

# modules that decide what a file holds and decodes to
CODEC = ("codec", "colour", "container", "entropy", "pictures", "weights", "backbones/*", "engines/*", "networks/*")


def precision(device: str) -> str:
    """What the layers above the first are computed in there."""
    from compass_codec.codec import choose_device, fastest

    return fastest(choose_device(device))


def identity(method: str, settings: Settings) -> str:
    """Which code, weights and precision decide what ``method`` gives. Raises Gap when it is not installed."""
    measured = ", ".join(METRICS[metric].identity() for metric in settings.metrics)
    if kind_of(method) != OURS:
        return f"{method}: {PEERS[J2K if method == LEVELS else method].identity()}, {measured}"
    from compass_codec.weights import identity as weights_identity

    digest = hashlib.sha256()
    for pattern in CODEC:
        for path in sorted(Path(compass_codec.__file__).parent.glob(f"{pattern}.py")):
            digest.update(path.read_bytes())
    weights = " and ".join(weights_identity(settings.weights, model) for model in sets_of(method))
    code = f"code {digest.hexdigest()[:12]}, {precision(settings.device)}"
    return f"{kind_of(method)} {compass_codec.__version__}, weights {weights}, {code}, {measured}"


class Cache:
    """Records by key, a line of JSON each, in a file that any number of processes append to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    self.records[entry["key"]] = entry["record"]
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when a run was stopped

    @staticmethod
    def add(file: Path, key: str, record: Record) -> None:
        """One write, so that lines of several processes do not mix."""
        line = json.dumps({"key": key, "record": record}) + "\n"
        with file.open("ab", buffering=0) as f:
            f.write(line.encode())


def measure(job: Task, settings: Settings) -> Record:
    """Code the picture of ``job`` and measure every layer. Raises Gap for what cannot be measured."""
    from compass_codec.measure.methods import code

    layers = layers_of(load(job.source.path), job.scales)
    if job.box:
        from compass_codec.measure.page import crop

        return crop(job, layers, settings)
    record = []
    coded = code(job.method, layers, job.scales, job.setting, settings.weights, settings.device)
    for layer, (end, decoded) in zip(layers, coded, strict=True):
        if decoded.shape != layer.shape:
            raise Gap(f"decodes to {decoded.shape[1]} x {decoded.shape[0]}")
        record.append({"bytes": end} | {metric: METRICS[metric].measure(layer, decoded) for metric in settings.metrics})
    return {"layers": record}


def work(jobs: Sequence[tuple[str, Task]], settings: Settings) -> list[tuple[str, Record]]:
    """In a worker: measure ``jobs`` (key, job) in turn. What fails is a record that says why, and is not kept."""
    done = []
    for key, job in jobs:
        try:
            record = measure(job, settings)
            Cache.add(settings.cache, key, record)
        except Gap as e:
            record = {"gap": str(e)}
        except Exception as e:  # a codec that fails, in whatever way, must not stop the others
            record = {"gap": f"{type(e).__name__}: {' '.join(str(e).split())}"}
        done.append((key, record))
    return done


def start_worker() -> None:
    """Before anything else in a process. PyTorch reads the number of threads when it is imported; with one, what is
    measured does not depend on how many processes measure."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback


@dataclass
class Runner:
    """Runs jobs; ``records`` has what each of them gave, and ``gaps`` why a method cannot be run at all."""

    settings: Settings
    jobs: int = 1
    records: dict[Task, Record] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)

    def identities(self, methods: Sequence[str]) -> dict[str, str]:
        found = {}
        for method in methods:
            try:
                found[method] = identity(method, self.settings)
            except Gap as e:
                self.gaps[method] = str(e)
        return found

    def run(self, jobs: Sequence[Task], progress: Callable[[float], None]) -> None:
        """Run what the cache does not have. ``progress`` is told the estimated seconds of whatever is done."""
        cache = Cache(self.settings.cache)
        identities = self.identities(list(dict.fromkeys(job.method for job in jobs)))
        missing: dict[tuple[Original, str, float | None], list[tuple[str, Task]]] = {}
        alike: dict[str, list[Task]] = {}  # of pictures with the same pixels
        for job in dict.fromkeys(jobs):
            if job.method in self.gaps:
                self.records[job] = {"gap": self.gaps[job.method]}
            elif (key := job.key(identities[job.method])) in cache.records:
                self.records[job] = cache.records[key]
            else:
                alike.setdefault(key, []).append(job)
                if len(alike[key]) > 1:
                    continue
                # in one group, so that a picture is read once and a prediction shared between columns is made once
                group = (job.source, job.method, job.setting if job.method == OURS else None)
                missing.setdefault(group, []).append((key, job))
                continue
            progress(job.seconds())
        for done in self._spread(list(missing.values())):
            self.records.update((job, record) for key, record in done for job in alike[key])
            progress(sum(job.seconds() for key, _ in done for job in alike[key]))

    def _spread(self, groups: list[list[tuple[str, Task]]]) -> Iterator[list[tuple[str, Record]]]:
        """What each group gave, as they are done. The longest go first."""
        groups.sort(key=lambda group: -sum(job.seconds() for _, job in group))
        broken = []
        if groups:
            with self._pool(self.jobs) as pool:
                futures = {pool.submit(work, group, self.settings): group for group in groups}
                for future in as_completed(futures):
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        broken.append(futures[future])
        for group in broken:  # one of these killed its process: each gets a process of its own
            with self._pool(1) as pool:
                try:
                    done = pool.submit(work, group, self.settings).result()
                except BrokenProcessPool:
                    done = [(key, {"gap": "its process was killed (out of memory?)"}) for key, _ in group]
            yield done

    @contextmanager
    def _pool(self, jobs: int) -> Iterator[ProcessPoolExecutor]:
        context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
        pool = ProcessPoolExecutor(jobs, context, start_worker)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
