"""Rate-distortion curves and the bits of each layer, as pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compass_codec.measure.protocol import FULL, PUBLISHED, Curve, title
from compass_codec.measure.tables import TESTED, Column
from compass_codec.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3  # panels in a row
SHOWN = (PUBLISHED, "vtm", "av1", "bpg_444_x265_ycbcr", "paper-elic2022_mse")  # of the published single layers
MARGIN = 0.12  # of the range of our own curve around it; what lies beyond says nothing about it


def _curves(column: Column, metric: str) -> dict[str, Curve]:
    rows = {name: points.curve(metric=metric) for name, points in column.rows.items()}
    if metric != "psnr":
        return {name: curve for name, curve in rows.items() if not any(map(math.isnan, curve.psnr))}
    shown = {f"{name} (published)" for name in SHOWN}
    known = {n: c for n, c in column.curves.items() if len(column.scales) > 1 or n in shown}
    return rows | known


def rate_distortion(columns: Sequence[Column], file: Path, metric: str = "psnr") -> None:
    """A panel for each column: mean accumulated bpp of the final layer against its mean PSNR, or another metric on its
    axis, marked with its values. Up is better."""
    from matplotlib.figure import Figure

    rows = -(-len(columns) // COLUMNS)
    width = min(len(columns), COLUMNS)
    figure = Figure(figsize=(5.2 * width, 4.6 * rows), layout="constrained")
    colours: dict[str, str] = {}
    for i, column in enumerate(columns):
        axes = figure.add_subplot(rows, width, i + 1)
        curves = _curves(column, metric)
        for name, curve in curves.items():
            codec = name.removeprefix("simulcast ")
            colour = colours.setdefault(codec, "black" if name == TESTED else f"C{len(colours) % 10}")
            style = "-" if name == TESTED else "--" if name in column.curves else "-."
            weight = 2.4 if name == TESTED else 1.2
            axes.plot(curve.bpp, curve.psnr, style, color=colour, marker=".", linewidth=weight, label=name)
        if TESTED in curves:
            ours = curves[TESTED]
            margin = MARGIN * (max(ours.psnr) - min(ours.psnr))
            axes.set_xlim(0, 1.6 * max(ours.bpp))
            axes.set_ylim(min(ours.psnr) - margin, max(ours.psnr) + margin)
        axes.set_title(f"{title(column.scales)}, final layer" if len(column.scales) > 1 else f"single layer, {FULL:g}x")
        axes.set_xlabel("accumulated bits per pixel")
        axes.set_ylabel(f"{METRICS[metric].title}{f', {unit}' if (unit := METRICS[metric].unit) else ''}")
        axes.yaxis.set_major_formatter(lambda at, _: f"{METRICS[metric].value(at):.4g}")
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=6)
    _save(figure, file)


def bits_of_layers(column: Column, file: Path) -> None:
    """Bars of the mean bits of every layer alone, for each way of coding at the setting whose final layer comes nearest
    to the middle of COMPASS's PSNRs."""
    from matplotlib.figure import Figure

    ours = column.rows[TESTED].curve()
    wanted = ours.psnr[len(ours.psnr) // 2]
    figure = Figure(figsize=(8, 0.55 * len(column.rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for row, points in enumerate(reversed(column.rows.values())):
        psnr = points.curve().psnr
        i = min(range(len(psnr)), key=lambda k: abs(psnr[k] - wanted))
        left = 0.0
        for k, bits in enumerate(points.own_bits()[i]):
            # what has fewer layers than the column has its last ones
            layer = k + len(column.scales) - len(points.scales)
            axes.barh(row, bits / 1000, left=left, color=f"C{layer}", edgecolor="white")
            left += bits / 1000
        axes.text(left, row, f" {psnr[i]:.1f} dB", va="center", fontsize=8)
    axes.set_yticks(range(len(column.rows)), list(reversed(column.rows)))
    for k, scale in enumerate(column.scales):
        axes.barh(0, 0, color=f"C{k}", label=f"layer {k}, {scale:g}x")
    axes.set_xlabel(f"mean kbit of each layer, at the setting nearest to {wanted:.1f} dB at the final layer")
    axes.margins(x=0.12)
    axes.legend(fontsize=8)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """As PNG with a palette, a quarter of the bytes."""
    from PIL import Image

    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=110)
        with Image.open(buffer) as image:
            palette = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
            palette.save(file, optimize=True)
