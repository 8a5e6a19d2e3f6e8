"""The same jobs on a Ray cluster, by way of Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compass_codec.errors import OptionError
from compass_codec.jobs import batch, paths, single
from compass_codec.jobs.job import Job
from compass_codec.jobs.report import Report, reason
from compass_codec.weights import PATH, places


class Worker:
    """Does jobs in a process of the cluster, with one codec that is loaded when it starts. ``models`` is what
    COMPASS_MODELS is there."""

    def __init__(self, work: Sequence[Job], models: str) -> None:
        os.environ[PATH] = models
        single.load(work[0].options)  # single.run() will find it
        self.work = work

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"job": rows["job"], "report": [batch.attempt(single.run, self.work[k]) for k in rows["job"]]}


def run(work: Sequence[Job], workers: int | None = None) -> Generator[Report, None, None]:
    """Reports as jobs get done, on the cluster that RAY_ADDRESS or a running ``ray start`` names, else on this machine.

    Every machine must have this package and see the files under the same paths. A worker takes a GPU where the cluster
    has any, else a core; there are ``workers`` of them, by default as many as there is room for. One that dies is the
    failure of the file that it worked on. Raises OptionError when Ray is missing or fails.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise OptionError(f'--ray needs Ray: pip install "compass_codec[ray]" ({e})') from e
    if any(paths.is_stream(path) for job in work for path in (job.source, job.target)):
        raise OptionError("--ray cannot use standard input or output, pipes and devices")
    if not work:
        return
    started = not ray.is_initialized()
    with batch.stopped_by_exception():
        try:
            if started:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a lost block is told as a failure
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.max_errored_blocks = -1  # a block is one job: what kills its worker must not stop the others
            count, place = _places(ray.nodes(), workers, len(work))
            rows = ray.data.from_items([{"job": k} for k in range(len(work))], override_num_blocks=len(work))
            done = rows.map_batches(
                Worker,
                # a worker may have another current directory and another environment
                fn_constructor_args=[
                    [_anywhere(job) for job in work],
                    os.pathsep.join(str(_absolute(place)) for place in places()[1:]),
                ],
                batch_size=1,
                # one job at a time and once: another that waits for the same worker would die with it
                compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
                max_task_retries=0,
                **place,
            )
            missing = dict(enumerate(work))
            for row in done.iter_rows():
                report, job = row["report"], missing.pop(row["job"])
                outputs = tuple(job.target.with_name(path.name) for path in report.outputs)
                yield replace(report, source=job.source, outputs=outputs)
            for job in missing.values():
                yield Report(job.source, "failed", error=reason(job.source, OptionError(batch.DIED)))
        except (ray.exceptions.RayError, ConnectionError) as e:
            raise OptionError(f"Ray: {str(e).strip().splitlines()[-1]}") from e
        finally:
            if started:
                ray.shutdown()


def _places(nodes: list[dict[str, Any]], workers: int | None, most: int) -> tuple[int, dict[str, Any]]:
    """How many workers there will be, and what each takes of its machine."""
    kind = "GPU" if any(node["Resources"].get("GPU") for node in nodes) else "CPU"
    places = int(sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"]))
    return min(workers or places, places, most), {f"num_{kind.lower()}s": 1}


def _anywhere(job: Job) -> Job:
    """The same job for another current directory."""
    options = job.options
    if options.weights is not None:
        options = replace(options, weights=_absolute(options.weights))
    return replace(job, source=_absolute(job.source), target=_absolute(job.target), options=options)


def _absolute(path: Path) -> Path:
    return Path.cwd() / path
