"""``compass encode``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from compass_codec import DEFAULT_QUALITY
from compass_codec.commands import values
from compass_codec.commands.common import (
    File,
    batch_options,
    device_option,
    force_option,
    json_option,
    precision_option,
    quiet_option,
    select,
    strip_option,
    table,
    weights_option,
    work,
)
from compass_codec.jobs.job import EncodeOptions
from compass_codec.jobs.paths import STDIO
from compass_codec.jobs.report import Report
from compass_codec.jobs.targets import Target
from compass_codec.weights import DEFAULT, TUNES, tuned


@click.command()
@click.argument("images", nargs=-1, type=File())
@click.option(
    "-s", "--scales", type=values.Value("S0,S1,...", values.scales), help="Size of each layer relative to the first."
)
@click.option(
    "--sizes", type=values.Value("WxH,...", values.sizes), help="Size of each layer; the shape may change as well."
)
@click.option("--widths", type=values.Value("W,...", values.widths), help="Width of each layer, as in srcset.")
@click.option("--upscale", is_flag=True, help="With --sizes or --widths, enlarge smaller pictures.")
@click.option("-o", "--output", type=File(), help="Output file. Default: IMAGE with the extension .cmps.")
@click.option(
    "-q",
    "--quality",
    type=values.Value("Q[,Q...]", values.qualities),
    help=f"1 (small) to 100 (good), one for all layers or one for each. Default: {DEFAULT_QUALITY:g}.",
)
@click.option("--target-bpp", type=values.Value("BPP", values.positive), help="Maximum bits per pixel of the picture.")
@click.option(
    "--target-size",
    type=values.Value("BYTES", values.byte_count),
    help="Maximum bytes of the file: 90000, 90kB, 88KiB.",
)
@click.option(
    "--target-psnr",
    type=values.Value("DB", values.positive),
    help="Minimum PSNR of the largest layer, weighted by alpha; at most 0.1 dB more, or a note says why.",
)
@click.option(
    "--target-ms-ssim", type=values.Value("0..1", values.share), help="The same by MS-SSIM, with pytorch-msssim."
)
@click.option(
    "--target-butteraugli",
    type=values.Value("DISTANCE", values.positive),
    help="The same by Butteraugli's 3-norm, with libjxl's program butteraugli_main; 1 and less hardly shows.",
)
@click.option(
    "--target-ssimulacra2",
    type=values.Value("SCORE", values.positive),
    help="The same by SSIMULACRA 2, with libjxl's program ssimulacra2.",
)
@click.option(
    "--effort",
    type=click.IntRange(0, 9),
    default=0,
    show_default=True,
    help="How long to search for a better file, 0 (not at all) to 9; decoding takes the same time.",
)
@click.option(
    "--time-budget",
    type=values.Value("SECONDS", values.positive),
    help="Stop the search of each picture about this long after it began.",
)
@click.option(
    "--layer-weights",
    type=values.Value("W0,W1,...", values.layer_weights),
    help="Relative weight of each layer's cost in the search. Default: 1 for all.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Decode the written file, compare it with the encoder's reconstruction, and report PSNR.",
)
@strip_option
@batch_options
@force_option
@device_option
@precision_option
@weights_option
@click.option(
    "--tune",
    type=click.Choice(list(TUNES)),
    help="What the picture is made for, in place of --model: the least squared error, or what people see.",
)
@click.option("--model", help=f"Profile or identity of a set of weights, see compass models. Default: {DEFAULT}.")
@json_option
@quiet_option
def encode(
    images: tuple[Path, ...],
    scales: tuple[float, ...] | None,
    sizes: tuple[tuple[int, int], ...] | None,
    widths: tuple[int, ...] | None,
    upscale: bool,
    output: Path | None,
    quality: tuple[float, ...] | None,
    target_bpp: float | None,
    target_size: float | None,
    target_psnr: float | None,
    target_ms_ssim: float | None,
    target_butteraugli: float | None,
    target_ssimulacra2: float | None,
    effort: int,
    time_budget: float | None,
    layer_weights: tuple[float, ...] | None,
    verify: bool,
    strip: bool,
    out_dir: Path | None,
    files_from: Path | None,
    workers: int | None,
    ray: bool,
    engine: str,
    force: bool,
    device: str,
    precision: str,
    weights: Path | None,
    tune: str | None,
    model: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Encode each of IMAGES once, as layers of growing size in one file.

    With --scales the last layer is the picture itself. With --sizes or --widths, layers larger than the picture
    become its size. With a target instead of --quality, each picture is encoded a few times to meet it.

    \b
    One picture:
      compass encode photo.png --scales 1,2.0,3.2
      compass encode photo.jpg --scales 1,1.5,4 -q 80 -o web/photo.cmps
      compass encode - --scales 1,2 < photo.jpg > photo.cmps
    \b
    Sizes:
      compass encode photo.jpg --widths 480,960,1920
      compass encode photo.jpg --sizes 720x480,1280x720,1920x1080
    \b
    Quality or size:
      compass encode photo.jpg --scales 1,2,4 -q 50,60,70
      compass encode photo.jpg --scales 1,2,4 --target-size 200kB
      compass encode photo.jpg --scales 1,2,4 --target-psnr 34
      compass encode photo.jpg --scales 1,2,4 --target-butteraugli 1
      compass encode photo.jpg --scales 1,2,4 --effort 3
    \b
    Many pictures; outputs that are up to date are skipped:
      compass encode *.jpg photos/ --scales 1,2,4 --out-dir out -j 4
      find photos -name '*.png' -print0 | compass encode --files-from - --scales 1,2 --out-dir out
    \b
    On a Ray cluster:
      compass encode photos/ --scales 1,2,4 --out-dir /shared/out --ray

    In a batch, an output with the same sizes, quality and weights is kept, unless the picture is newer. An output
    made with other options is an error. --force makes everything anew.
    """
    if sum(given is not None for given in (scales, sizes, widths)) != 1:
        raise click.UsageError("one of --scales, --sizes and --widths must be given")
    if upscale and scales:
        raise click.UsageError("--upscale goes with --sizes or --widths")
    aims = {"bpp": target_bpp, "size": target_size, "psnr": target_psnr, "ms-ssim": target_ms_ssim}
    aims |= {"butteraugli": target_butteraugli, "ssimulacra2": target_ssimulacra2}
    targets = [Target(kind, value) for kind, value in aims.items() if value]
    if len(targets) + (quality is not None) > 1:
        raise click.UsageError(f"--quality and --target-{', --target-'.join(aims)} exclude each other")
    count = len(scales or sizes or widths or ())
    if quality and len(quality) not in (1, count):
        raise click.UsageError(f"--quality: {len(quality)} values for {count} layers")
    if time_budget and not effort:
        raise click.UsageError("--time-budget goes with --effort")
    if layer_weights and not effort:
        raise click.UsageError("--layer-weights goes with --effort")
    if layer_weights and len(layer_weights) != count:
        raise click.UsageError(f"--layer-weights: {len(layer_weights)} values for {count} layers")
    if time_budget and targets:
        raise click.UsageError("--time-budget and a target exclude each other")
    if tune and (model or weights):
        raise click.UsageError("--tune excludes --model and --weights")
    if model and weights:
        raise click.UsageError("--model and --weights exclude each other")
    if output is None and images == (STDIO,):
        output = STDIO
    if as_json and output == STDIO:
        raise click.UsageError("--json and the file cannot both go to standard output")
    options = EncodeOptions(
        scales=scales or (),
        sizes=sizes or (),
        widths=widths or (),
        upscale=upscale,
        qualities=quality or (DEFAULT_QUALITY,),
        target=targets[0] if targets else None,
        effort=effort,
        time_budget=time_budget,
        layer_weights=layer_weights,
        verify=verify,
        strip=strip,
        force=force,
        device=device,
        precision=precision,
        engine=engine,
        weights=weights,
        model=tuned(tune, model),
    )
    from compass_codec.jobs.batch import picture_suffixes

    todo = select(images, files_from, out_dir, output, options, picture_suffixes, ".cmps")
    if effort and not quiet and sys.stderr.isatty():
        shown = replace(options, progress=True)
        todo.jobs = [job if job.options.batch else replace(job, options=shown) for job in todo.jobs]
    ending = ", verified" if verify else ""
    work(todo, ray, workers, as_json, quiet, _line, lambda report: _table(report) + ending)


def _quality(report: Report) -> str:
    values = [f"{layer.quality:g}" for layer in report.layers]
    words = f"quality {values[0]}" if len(set(values)) == 1 else f"qualities {','.join(values)}"
    return f"{words}, {report.encodes} encodes" if report.encodes else words


def _table(report: Report) -> str:
    rows = [["layer", "size", "scale", "bytes", "bpp", "acc. bytes", "acc. bpp"]]
    for e in report.layers:
        row = [str(e.index), f"{e.width} x {e.height}", f"{e.scale:g}", str(e.bytes)]
        rows.append([*row, f"{e.bpp:.3f}", str(e.end), f"{e.end_bpp:.3f}"])
        if e.psnr is not None:
            rows[-1].append(f"{e.psnr:.2f}")
    rows[0] += ["PSNR"] * (len(rows[-1]) - len(rows[0]))
    return f"{table(rows)}\n{report.outputs[0]}: {report.size} bytes, {_quality(report)}"


def _line(report: Report) -> str:
    if report.state == "up to date":
        return f"{report.outputs[0]}: up to date"
    top = report.layers[-1]
    measured = f"{report.size} bytes, {top.end_bpp:.3f} bpp" + ("" if top.psnr is None else f", {top.psnr:.2f} dB")
    return f"{report.outputs[0]}: {top.width} x {top.height}, {measured}, {_quality(report)}, {report.seconds:.1f} s"
