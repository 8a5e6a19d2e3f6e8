"""From records to figures: curves over the pictures, BD-rates with their intervals, and what they are printed as."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compass_codec.measure import paper
from compass_codec.measure.bd_rate import BDRate, bd_psnr
from compass_codec.measure.peers import J2K, PEERS, Gap
from compass_codec.measure.protocol import (
    FULL,
    LEVELS,
    OURS,
    PUBLISHED,
    Curve,
    Scales,
    other_set,
    sizes_of,
)
from compass_codec.measure.task import Original, Record, Task
from compass_codec.metrics import METRICS

RESAMPLES = 200  # of the pictures, for an interval
KODAK = {f"kodim{i:02d}.png" for i in range(1, 25)}


@dataclass
class Points:
    """What one way of coding gave: arrays [settings, pictures, layers]; ``bits`` are accumulated, ``values`` are those
    of each metric, NaN where a layer is too small for it. ``pixels`` is [pictures, layers]."""

    settings: tuple[float, ...]
    scales: Scales
    bits: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    pixels: NDArray[np.float64]

    @property
    def bpp(self) -> NDArray[np.float64]:
        bpp: NDArray[np.float64] = self.bits / self.pixels
        return bpp

    def curve(self, layer: int = -1, chosen: Sequence[int] | slice = slice(None), metric: str = "psnr") -> Curve:
        """Means over the ``chosen`` pictures, of the metric on its axis."""
        found, axis = self.values[metric][:, chosen, layer], METRICS[metric].axis
        values = np.array([[axis(value) for value in row] for row in found])
        return Curve(self.bpp[:, chosen, layer].mean(1).tolist(), values.mean(1).tolist())

    def own_bits(self) -> NDArray[np.float64]:
        """Mean bits of each layer alone, [settings, layers]; the header counts to the first."""
        return np.diff(self.bits.mean(1), axis=1, prepend=0)

    def report(self) -> dict[str, Any]:
        """The means, for JSON: a value for each setting, a list for each layer."""
        count = range(len(self.scales))
        return {
            "settings": list(self.settings),
            "scales": list(self.scales),
            "bits_of_layer": self.own_bits().T.tolist(),
            "accumulated_bpp": [self.curve(k).bpp for k in count],
            **{
                metric: [[None if math.isnan(v) else v for v in values[:, :, k].mean(1).tolist()] for k in count]
                for metric, values in self.values.items()
            },
        }


class Results:
    """Records of a run, by the way of coding."""

    def __init__(self, sources: Sequence[Original], qualities: Sequence[float], records: Mapping[Task, Record]) -> None:
        self.sources, self.qualities, self.records = sources, tuple(qualities), records

    def settings(self, method: str) -> tuple[float, ...]:
        if method in PEERS or method == LEVELS:
            return PEERS[J2K if method == LEVELS else method].settings
        return self.qualities

    def jobs(self, method: str, scales: Scales) -> list[Task]:
        return [Task(source, method, scales, s) for s in self.settings(method) for source in self.sources]

    def points(self, method: str, scales: Scales) -> Points:
        """One file with all layers. Raises Gap when a picture could not be measured."""
        found: list[list[list[dict[str, Any]]]] = []
        for setting in self.settings(method):
            found.append([])
            for source in self.sources:
                record = self.records[Task(source, method, scales, setting)]
                if "gap" in record:
                    raise Gap(record["gap"])
                found[-1].append(record["layers"])
        values = {
            key: np.array([[[layer[key] for layer in layers] for layers in row] for row in found], float)
            for key in found[0][0][0]
        }
        pixels = np.array([[w * h for w, h in sizes_of(s.size, scales)] for s in self.sources], float)
        return Points(self.settings(method), scales, np.multiply(8, values.pop("bytes")), values, pixels)

    def simulcast(self, method: str, scales: Scales) -> Points:
        """A file for each layer, at the same setting."""
        single = [self.points(method, (s,)) for s in scales]
        bits = np.concatenate([p.bits for p in single], axis=2)
        values = {key: np.concatenate([p.values[key] for p in single], axis=2) for key in single[0].values}
        pixels = np.concatenate([p.pixels for p in single], axis=1)
        return Points(single[0].settings, scales, bits.cumsum(2), values, pixels)


@dataclass
class Comparison:
    """One codec against another at one layer; ``interval`` is the 95 % bootstrap interval over the pictures, ``by`` has
    BD-rates over other metrics, with the values, from worse to better, that both reach."""

    bd_rate: float
    low: float
    high: float
    bd_psnr: float | None = None
    interval: tuple[float, float] | None = None
    by: dict[str, BDRate] = field(default_factory=dict)


def compare(tested: Points, anchor: Points | Curve, layer: int = -1, resamples: int = RESAMPLES) -> Comparison:
    """``tested`` against ``anchor``. Curves that were published have no pictures to resample, and so no interval.
    Raises Gap when the curves have no PSNR in common."""
    ours, theirs = tested.curve(layer), anchor if isinstance(anchor, Curve) else anchor.curve(layer)
    try:
        rate = ours.against(theirs)
    except ValueError as e:
        raise Gap(str(e)) from e
    found = Comparison(rate.percent, rate.low, rate.high)
    with suppress(ValueError):
        found.bd_psnr = bd_psnr(theirs.bpp, theirs.psnr, ours.bpp, ours.psnr)
    if isinstance(anchor, Curve):
        return found
    count = tested.bits.shape[1]
    draws = np.random.default_rng(0).integers(0, count, (resamples, count))
    percent = []
    for chosen in draws if count > 1 else []:
        with suppress(ValueError):
            percent.append(tested.curve(layer, chosen).against(anchor.curve(layer, chosen)).percent)
    if percent:
        low, high = np.percentile(percent, [2.5, 97.5])
        found.interval = (float(low), float(high))
    for metric in tested.values:
        first, second = anchor.curve(layer, metric=metric), tested.curve(layer, metric=metric)
        if metric != "psnr" and not np.isnan([*first.psnr, *second.psnr]).any():
            with suppress(ValueError):
                rate, value = second.against(first), METRICS[metric].value
                found.by[metric] = BDRate(rate.percent, value(rate.low), value(rate.high))
    return found


@dataclass
class Published:
    """Curves from files: of single layers at full size, by name, and of layered codecs, by name and scales."""

    single: dict[str, Curve] = field(default_factory=dict)
    layered: dict[str, dict[Scales, Curve]] = field(default_factory=dict)

    def read(self, file: Path) -> None:
        """Add a file's curves: {"curves": {name: {"bpp", "psnr_rgb"}}}, or {"1.0x2.0x4.0": [{"acc_bpp_final_layer",
        "psnr_rgb_per_layer"}, ...], ...} which is named by the file's name up to the first _, in capitals. Raises
        ValueError for anything else."""
        try:
            data = json.loads(file.read_text())
            if "curves" in data:
                self.single |= {k: Curve(v["bpp"], v["psnr_rgb"]) for k, v in data["curves"].items()}
                return
            layered = {}
            for key, points in data.items():
                scales = tuple(float(s) for s in key.split("x"))
                rate = [p["acc_bpp_final_layer"] for p in points]
                layered[scales] = Curve(rate, [p["psnr_rgb_per_layer"][-1] for p in points])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file}: holds no rate-distortion curves that are understood") from e
        self.layered[file.name.split("_")[0].upper()] = layered


@dataclass
class Column:
    """A set of layers: what every way of coding gave, how COMPASS compares, and why something is missing."""

    scales: Scales
    rows: dict[str, Points] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    against: dict[str, Comparison] = field(default_factory=dict)
    lower: dict[str, list[Comparison | None]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Points | Curve]) -> None:
        """Make a row and compare the first with it, or note why it is missing."""
        try:
            row = make()
            if isinstance(row, Curve):
                self.curves[name] = row
            else:
                self.rows[name] = row
            if name != TESTED and TESTED in self.rows:
                self.against[name] = compare(self.rows[TESTED], row)
        except Gap as e:
            self.gaps[name] = str(e)
            return
        if name != TESTED and isinstance(row, Points) and row.scales == self.scales and TESTED in self.rows:
            self.lower[name] = [self._at(row, k) for k in range(len(self.scales) - 1)]

    def _at(self, row: Points, layer: int) -> Comparison | None:
        try:
            return compare(self.rows[TESTED], row, layer, resamples=0)
        except Gap:
            return None

    def report(self) -> dict[str, Any]:
        return {
            "scales": list(self.scales),
            "rows": {name: points.report() for name, points in self.rows.items()},
            "published": {name: asdict(curve) for name, curve in self.curves.items()},
            "compass_against": {name: asdict(c) for name, c in self.against.items()},
            "compass_against_at_lower_layers": {n: [c and asdict(c) for c in found] for n, found in self.lower.items()},
            "gaps": self.gaps,
        }


TESTED = "COMPASS"
LEVELS_TITLE = "JPEG 2000, its resolution levels"


def _published(found: Curve | None, sources: Sequence[Original]) -> Curve:
    if found is None:
        raise Gap("not in the curves given")
    if {s.path.name for s in sources} != KODAK:
        raise Gap("published for the 24 Kodak pictures together")
    return found


def set_title(model: str) -> str:
    """The row of COMPASS with another set of weights."""
    return f"{TESTED} with {model}"


def layered_column(
    results: Results,
    scales: Scales,
    peers: Sequence[str],
    published: Published,
    models: Sequence[str] = (),
    bases: Sequence[str] = (),
) -> Column:
    """A column of the paper's tables 2 and 3: COMPASS in layers of ``scales`` against everything else. Those of
    ``models`` that are in ``bases`` have a base codec of their own."""
    column = Column(scales)
    column.add(TESTED, partial(results.points, OURS, scales))
    column.add(paper.SIMULCAST, partial(results.simulcast, OURS, scales))
    column.add(paper.SINGLE, partial(results.points, OURS, scales[-1:]))
    for model in models:
        other = other_set(model)
        column.add(set_title(model), partial(results.points, other, scales))
        if model in bases:
            column.add(f"simulcast, base codec of {model}", partial(results.simulcast, other, scales))
            column.add(f"single layer, base codec of {model}", partial(results.points, other, scales[-1:]))
    for name, curves in published.layered.items():
        column.add(name, partial(_published, curves.get(scales), results.sources))
    for peer in peers:
        column.add(f"simulcast {PEERS[peer].title}", partial(results.simulcast, peer, scales))
    if J2K in peers:
        column.add(LEVELS_TITLE, partial(results.points, LEVELS, scales))
    if scales[-1] == FULL and PUBLISHED in published.single:
        column.add(f"single layer {PUBLISHED}", partial(_published, published.single[PUBLISHED], results.sources))
    return column


def single_column(results: Results, peers: Sequence[str], published: Published, bases: Sequence[str] = ()) -> Column:
    """One layer at full size: our base codec, as COMPASS with one layer, against everything else."""
    column = Column((FULL,))
    column.add(TESTED, partial(results.points, OURS, (FULL,)))
    for model in bases:
        column.add(set_title(model), partial(results.points, other_set(model), (FULL,)))
    for peer in peers:
        column.add(PEERS[peer].title, partial(results.points, peer, (FULL,)))
    for name, curve in published.single.items():
        column.add(f"{name} (published)", partial(_published, curve, results.sources))
    return column
