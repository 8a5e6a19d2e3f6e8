"""``compass bench``: the codec measured as the paper measures it, next to what people would pick instead."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compass_codec.commands import values
from compass_codec.errors import MeasureError, told
from compass_codec.measure.bd_rate import FEWEST
from compass_codec.measure.peers import J2K, PEERS, Gap
from compass_codec.measure.protocol import FULL, LEVELS, OURS, Scales, other_set, pictures_in, sets_of
from compass_codec.metrics import METRICS

if TYPE_CHECKING:
    from compass_codec.measure.report import Report
    from compass_codec.measure.runner import Runner
    from compass_codec.measure.tables import Column, Published, Results
    from compass_codec.measure.task import Task

TABLES = ("two", "three", "single")
MIDDLE = 2.0  # the scale of the first enhancement layer of three
QUICK = 5
WHERE = "the Kodak pictures, kodim01.png to kodim24.png, are at https://r0k.us/graphics/kodak/"


Crop = tuple[str, tuple[float, float] | None]


def _crop(text: str) -> Crop:
    """NAME or NAME:X,Y, a picture and the middle of a crop in parts of its sides. Raises ValueError."""
    name, colon, middle = text.rpartition(":") if ":" in text else (text, "", "")
    if not colon:
        return name, None
    try:
        x, y = map(float, middle.split(","))
    except ValueError:
        raise ValueError("not NAME:X,Y") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError("X and Y go from 0 to 1")
    return name, (x, y)


@click.command()
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of PNG pictures, such as Kodak.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option(
    "--tables", type=values.some_of(TABLES), default=TABLES, help=f"Tables to measure. Default: {','.join(TABLES)}."
)
@click.option(
    "--two",
    type=values.RISING,
    default="1.2,2,2.8",
    show_default=True,
    help="Scale of the last of two layers, one for each column. The paper has 1.2,1.6,2,2.4,2.8.",
)
@click.option(
    "--three",
    type=values.RISING,
    default="2.4,3.2,4",
    show_default=True,
    help="Scale of the last of three layers, above 1x and 2x. The paper has 2.4,2.8,3.2,3.6,4.",
)
@click.option("--qualities", type=values.RISING, default="1,30,60,100", show_default=True, help="Qualities of COMPASS.")
@click.option(
    "--peers", type=values.some_of(list(PEERS)), default=tuple(PEERS), help=f"Other codecs. Default: {','.join(PEERS)}."
)
@click.option(
    "--curves",
    type=click.Path(path_type=Path),
    multiple=True,
    help="JSON of published rate-distortion curves; may be given several times.",
)
@click.option(
    "--crop",
    "crops",
    type=values.Value("NAME[:X,Y]", _crop),
    multiple=True,
    help="Shown on the page: a picture, and the middle of the crop in parts of its width and height; may be given "
    "several times. Default: the middles of the first pictures.",
)
@click.option("--page/--no-page", default=True, help="Write the page of crops, which takes a while. Default: yes.")
@click.option("--quick", is_flag=True, help=f"Use only {QUICK} of the pictures.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Processes of one thread each; default: one for each core.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where COMPASS computes.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="Folder of weights; default: the installed ones.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Profile of weights (compass models lists them). Given several times, each after the first is one more row; "
    "FIRST+SECOND takes SECOND for layers above the first enhancement layer.",
)
@click.option(
    "--metrics",
    type=values.some_of(list(METRICS)),
    default=("psnr", "ms-ssim"),
    help=f"Of {','.join(METRICS)}; default: psnr,ms-ssim. PSNR is always measured. The last three need libjxl's "
    "programs butteraugli_main and ssimulacra2.",
)
def bench(
    images: Path,
    out: Path,
    tables: tuple[str, ...],
    two: Scales,
    three: Scales,
    qualities: tuple[float, ...],
    peers: tuple[str, ...],
    curves: tuple[Path, ...],
    crops: tuple[Crop, ...],
    page: bool,
    quick: bool,
    jobs: int | None,
    device: str,
    weights: Path | None,
    models: tuple[str, ...],
    metrics: tuple[str, ...],
) -> None:
    """Measure COMPASS and other codecs on pictures; write tables, plots and a page to look at.

    \b
    compass bench --images kodak --out out/bench --quick
    compass bench --images kodak --out out/bench --tables three --three 2.4,2.8,3.2,3.6,4
    compass bench --images kodak --out out/bench --tables single --metrics psnr,ms-ssim,butteraugli

    What was measured is kept in the folder, so that a run that was stopped goes on where it was.
    """
    from compass_codec.engines.threads import cores
    from compass_codec.measure.runner import Runner
    from compass_codec.measure.tables import Published, Results
    from compass_codec.measure.task import Original, Settings
    from compass_codec.weights import choose

    if len(qualities) < FEWEST:
        raise click.UsageError(f"a rate-distortion curve needs at least {FEWEST} qualities")
    if not 1 <= qualities[0] <= qualities[-1] <= 100:
        raise click.UsageError("qualities go from 1 to 100")
    if two[0] < 1 or three[0] < MIDDLE:
        raise click.UsageError(f"layers must not get smaller: --two from 1, --three from {MIDDLE:g}")
    if weights and models:
        raise click.UsageError("--weights and --model exclude each other")
    published = Published()
    try:
        for file in curves:
            published.read(file)
        pictures = pictures_in(images, QUICK if quick else 0)
        sources = [Original.of(path) for path in pictures]
        first = choose(None, models[0]).folder if models else weights
        bases = _base_codecs(first, models[1:])
        if unknown := {name for name, _ in crops} - {path.name for path in pictures}:
            raise ValueError(f"--crop {min(unknown)}: not among the pictures that are measured")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        missing = "" if images.is_dir() else f"; {WHERE}"
        raise click.ClickException(f"{told(e)}{missing}") from e
    measured, missing_metrics = _available(metrics)
    settings = Settings(out / "measured.jsonl", first, device, measured)
    runner = Runner(settings, jobs or cores())
    results = Results(sources, qualities, runner.records)
    wanted: dict[str, list[Scales]] = {
        "two": [(1.0, s) for s in two] if "two" in tables else [],
        "three": [(1.0, MIDDLE, s) for s in three] if "three" in tables else [],
    }
    layered = wanted["two"] + wanted["three"]
    sets = [other_set(model) for model in models[1:]]
    layered_methods = [OURS, *sets, *([LEVELS] if J2K in peers else [])]
    work = [job for scales in layered for method in layered_methods for job in results.jobs(method, scales)]
    singles = {s for scales in layered for s in scales} | ({FULL} if "single" in tables else set())
    work += [
        job
        for s in sorted(singles)
        for method in (OURS, *map(other_set, bases), *peers)
        for job in results.jobs(method, (s,))
    ]
    _run(runner, work, "measuring")
    report = _analyse(results, wanted, tables, peers, published, models[1:], bases)
    report.facts |= _facts(runner, results, peers, curves)
    report.facts |= {"metrics": list(measured), "metric_gaps": missing_metrics, "models": list(models), "page": page}
    shown = layered[-1] if layered else (FULL,)
    if page:
        _write_page(runner, results, shown, [*sets, *peers], out, crops)
    _measure_cost(report, results, settings, out)
    _write(report, out)


def _base_codecs(first: Path | None, models: Sequence[str]) -> list[str]:
    """Those of ``models`` whose base codec none before them has, nor the set in ``first``: what is coded as single
    layers depends on that alone. Raises WeightsError."""
    from compass_codec.weights import choose

    def base(folder: Path | None, model: str | None = None) -> tuple[str, str]:
        found = choose(folder, model)
        return found.spec["parts"].get("base", found.identity), json.dumps(found.spec.get("base"))

    seen = {base(first): ""}
    for model in models:
        bases = [base(None, name) for name in sets_of(other_set(model))]
        seen.setdefault(bases[0], model)
    return [model for model in seen.values() if model]


def _available(metrics: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """PSNR and those of ``metrics`` that can be measured here, in the order of METRICS; why others cannot, by title."""
    found, missing = [], {}
    for name in [name for name in METRICS if name == "psnr" or name in metrics]:
        try:
            METRICS[name].identity()
            found.append(name)
        except MeasureError as e:
            missing[METRICS[name].title] = str(e)
            click.echo(f"note: without {METRICS[name].title}: {e}", err=True)
    return tuple(found), missing


def _run(runner: Runner, work: Sequence[Task], label: str) -> None:
    """Run jobs under a progress bar that is as long as they are expected to take."""
    work = list(dict.fromkeys(work))
    total = sum(job.seconds() for job in work)
    with click.progressbar(length=1000, label=label, file=sys.stderr) as bar:
        done = 0.0

        def progress(seconds: float) -> None:
            nonlocal done
            done += seconds
            bar.update(round(1000 * done / total) - bar.pos)

        bar.update(0)
        runner.run(work, progress)


def _analyse(
    results: Results,
    wanted: dict[str, list[Scales]],
    tables: Sequence[str],
    peers: Sequence[str],
    published: Published,
    models: Sequence[str],
    bases: Sequence[str],
) -> Report:
    from compass_codec.measure.report import Report
    from compass_codec.measure.tables import layered_column, single_column

    report = Report({})
    columns: dict[str, list[Column]] = {
        name: [layered_column(results, scales, peers, published, models, bases) for scales in found]
        for name, found in wanted.items()
    }
    report.two, report.three = columns["two"], columns["three"]
    if "single" in tables:
        report.single = single_column(results, peers, published, bases)
    return report


def _facts(runner: Runner, results: Results, peers: Sequence[str], curves: Sequence[Path]) -> dict[str, Any]:
    from compass_codec import __version__
    from compass_codec.engines.threads import cores
    from compass_codec.measure.runner import precision
    from compass_codec.weights import identity

    return {
        "version": __version__,
        "weights": identity(runner.settings.weights),
        "precision": precision(runner.settings.device),
        "pictures": [source.path.name for source in results.sources],
        "qualities": list(results.qualities),
        "peers": {peer: PEERS[peer].identity() for peer in peers if peer not in runner.gaps},
        "published": [file.name for file in curves],
        "cores": cores(),
        "processor": _processor(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _write_page(
    runner: Runner, results: Results, scales: Scales, peers: Sequence[str], out: Path, crops: Sequence[Crop]
) -> None:
    from compass_codec.files import write_file
    from compass_codec.measure import page
    from compass_codec.measure.page import html, our_jobs, peer_jobs

    chosen = page.shown(results, scales, crops)
    ours = our_jobs(results, scales, chosen)
    _run(runner, ours, "the page, ours")
    _run(runner, peer_jobs(ours, results, peers), "the page, others")
    write_file(out / "compare.html", html(results, scales, peers, chosen).encode())


def _measure_cost(report: Report, results: Results, settings: Any, out: Path) -> None:
    """Of the column with the most layers, at its largest scale, on the first picture."""
    from compass_codec.measure.cost import cost
    from compass_codec.measure.report import cost_settings
    from compass_codec.measure.tables import LEVELS_TITLE, TESTED, set_title

    columns = report.columns()
    if not columns:
        return
    column = max(columns, key=lambda c: (len(c.scales), c.scales[-1]))
    prefix = "simulcast " if len(column.scales) > 1 else ""
    methods = {TESTED: OURS, LEVELS_TITLE: LEVELS}
    methods |= {set_title(model): other_set(model) for model in report.facts["models"][1:]}
    methods |= {prefix + peer.title: name for name, peer in PEERS.items()}
    picture = results.sources[0].path
    report.cost_scales, report.facts["cost_picture"] = column.scales, picture.name
    chosen = cost_settings(column, methods)
    with click.progressbar(chosen.items(), label="time and memory", file=sys.stderr) as bar:
        for name, setting in bar:
            try:
                found = cost(methods[name], picture, column.scales, setting, settings.weights, settings.device)
                report.costs[name] = setting, found
            except Gap as e:
                report.cost_gaps[name] = str(e)


def _write(report: Report, out: Path) -> None:
    from compass_codec.files import write_file
    from compass_codec.measure.plots import bits_of_layers, rate_distortion

    write_file(out / "results.json", (json.dumps(report.data(), indent=1) + "\n").encode())
    columns = report.columns()
    written = ["results.json", "results.md", *(["compare.html"] if report.facts["page"] else [])]
    if columns:
        for metric in report.facts["metrics"]:
            name = "rd.png" if metric == "psnr" else f"rd-{metric}.png"
            rate_distortion(columns, out / name, metric)
            written.append(name)
    layered = [column for column in [*report.two, *report.three] if column.rows]
    if layered:
        bits_of_layers(layered[-1], out / "bits.png")
        written.append("bits.png")
    write_file(out / "results.md", report.markdown().encode())
    click.echo(report.markdown())
    click.echo(f"{out}{os.sep}: {', '.join(written)}", err=True)
