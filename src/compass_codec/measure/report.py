"""The Markdown document: tables as in the paper with its figures beside ours, and what COMPASS loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compass_codec.measure import paper
from compass_codec.measure.cost import Cost
from compass_codec.measure.peers import J2K, PEERS
from compass_codec.measure.protocol import PUBLISHED, rows, title
from compass_codec.measure.tables import TESTED, Column, Comparison, Points
from compass_codec.metrics import METRICS

NONE = "–"  # noqa: RUF001, a cell without a figure


@dataclass
class Report:
    """All that a run found."""

    facts: dict[str, Any]
    two: list[Column] = field(default_factory=list)
    three: list[Column] = field(default_factory=list)
    single: Column | None = None
    cost_scales: tuple[float, ...] = ()
    costs: dict[str, tuple[float, Cost]] = field(default_factory=dict)
    cost_gaps: dict[str, str] = field(default_factory=dict)

    def columns(self) -> list[Column]:
        return [*self.two, *self.three, *([self.single] if self.single else [])]

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **self.facts,
            "two": [c.report() for c in self.two],
            "three": [c.report() for c in self.three],
            "single": self.single and self.single.report(),
            "cost": {name: {"setting": setting, **vars(c)} for name, (setting, c) in self.costs.items()},
            "cost_gaps": self.cost_gaps,
        }

    def markdown(self) -> str:
        parts = [*self._head(), *self._losses()]
        if self.two:
            parts += self._layered("Two layers (the paper's table 2)", self.two, paper.TWO, paper.TWO_SCALES)
        if self.three:
            head = "Three layers, the middle one 2x (the paper's table 3)"
            parts += self._layered(head, self.three, paper.THREE, paper.THREE_SCALES)
        if self.single:
            parts += self._single(self.single)
        if self.two or self.three:
            parts += self._layers()
        if self.costs:
            parts += self._costs()
        return "\n\n".join([*parts, *self._gaps(), *self._how()]) + "\n"

    def _head(self) -> Iterator[str]:
        f = self.facts
        count = len(f["pictures"])
        yield "# Results"
        yield (
            f"Made by `compass bench` (`make tables`), version {f['version']}, weights {f['weights']}, layers "
            f"above the first in {f['precision']}, on {count} picture{'s' * (count != 1)} at qualities "
            f"{', '.join(f'{q:g}' for q in f['qualities'])}. "
            "BD-rates are those of COMPASS against the codec of the row, at the final layer, over the PSNRs that both "
            "reach: **below zero COMPASS needs fewer bits**. Bits are accumulated, headers included; PSNR is that of "
            "8-bit RGB; both are means over the pictures. In brackets is the 95 % interval when the pictures are drawn "
            "again at random."
        )
        if count != 24:
            yield "**Not the 24 Kodak pictures of the paper**: read the figures as a check that everything runs."
        yield "![Rate-distortion curves](rd.png)"
        for metric in self._others():
            yield f"![Rate-distortion curves by {METRICS[metric].title}](rd-{metric}.png)"

    def _losses(self) -> Iterator[str]:
        yield "## Where COMPASS loses"
        lost = [
            f"- {title(c.scales)}: {name}, {r.bd_rate:+.1f} %"
            for c in self.columns()
            for name, r in sorted(c.against.items(), key=lambda item: -item[1].bd_rate)
            if r.bd_rate > 0
        ]
        yield "\n".join(lost) if lost else "At no setting that was measured here, by bits."
        if TESTED in self.costs:
            _, ours = self.costs[TESTED]
            others = [cost for name, (_, cost) in self.costs.items() if not name.startswith(TESTED)]
            if others:
                quick = max(others, key=lambda c: ours.decode_seconds / c.decode_seconds)
                slow = min(others, key=lambda c: ours.decode_seconds / c.decode_seconds)
                yield (
                    f"By time, decoding all layers takes {ours.decode_seconds / slow.decode_seconds:.0f} to "
                    f"{ours.decode_seconds / quick.decode_seconds:.0f} times as long as with the other formats, "
                    f"and {ours.decode_mb:.0f} MB."
                )

    def _layered(
        self, head: str, columns: Sequence[Column], printed: paper.Rows, scales: Sequence[float]
    ) -> Iterator[str]:
        names = _names(columns)
        yield f"## {head}"
        body = []
        shown = [f"{c.scales[-1]:g}x" for c in columns]

        def of_paper(name: str, figures: Sequence[float]) -> list[str]:
            known = dict(zip(scales, figures, strict=True))
            cells = [f"{known[c.scales[-1]]:+.1f} %" if c.scales[-1] in known else NONE for c in columns]
            return [f"*the paper: {name}*", *cells]

        for name in names:
            body.append([name, *[_rate(c.against.get(name)) for c in columns]])
            body += [of_paper(theirs, figures) for ours, theirs, figures in printed if ours == name]
        body += [of_paper(theirs, figures) for ours, theirs, figures in printed if ours not in names]
        yield rows(["COMPASS against", *shown], body)
        yield "The PSNRs in common, and BD-PSNR (above zero COMPASS is better):"
        yield rows(["COMPASS against", *shown], [[n, *[_more(c.against.get(n)) for c in columns]] for n in names])
        for metric in self._others():
            yield f"BD-rate by {METRICS[metric].title}, over what both reach:"
            yield rows(
                ["COMPASS against", *shown], [[n, *[_by(c.against.get(n), metric) for c in columns]] for n in names]
            )

    def _single(self, column: Column) -> Iterator[str]:
        yield "## A single layer at full size"
        yield "The base codec alone, as COMPASS with one layer. Published curves have no pictures, and so no interval."
        body = [
            [
                name,
                _rate(r),
                f"{r.low:.1f} to {r.high:.1f} dB",
                _signed(r.bd_psnr, "dB", 2),
                *[_by(r, metric) for metric in self._others()],
            ]
            for name, r in sorted(column.against.items(), key=lambda item: -item[1].bd_rate)
        ]
        others = [f"BD-rate, {METRICS[metric].title}" for metric in self._others()]
        yield rows(["COMPASS against", "BD-rate", "over PSNR", "BD-PSNR", *others], body)

    def _others(self) -> list[str]:
        """The metrics beside PSNR."""
        return [metric for metric in self.facts["metrics"] if metric != "psnr"]

    def _layers(self) -> Iterator[str]:
        yield "## Every layer"
        titles = ", ".join(METRICS[metric].title for metric in self.facts["metrics"])
        yield f"Mean bits of each layer alone, and accumulated bpp at that layer; {titles}, where defined."
        yield "![Bits of each layer](bits.png)"
        for column in [*self.two, *self.three]:
            if TESTED not in column.rows:
                continue
            body: list[list[str]] = []
            for name in (TESTED, paper.SIMULCAST):
                if name in column.rows:
                    body += _points(name, column.rows[name])
            yield rows(["codec", "quality", *[f"layer {k}, {s:g}x" for k, s in enumerate(column.scales)]], body)
            if len(column.scales) > 2:
                lower = [[n, *[_rate(r) for r in found]] for n, found in column.lower.items()]
                yield rows(["BD-rate of COMPASS at", *[f"layer {k}" for k in range(len(column.scales) - 1)]], lower)

    def _costs(self) -> Iterator[str]:
        yield f"## Time and memory, layers {title(self.cost_scales)}"
        ours = self.costs[TESTED][1] if TESTED in self.costs else None
        body = []
        for name, (setting, c) in self.costs.items():
            cells = []
            for what, unit in (
                ("encode_seconds", "s"),
                ("decode_seconds", "s"),
                ("encode_mb", "MB"),
                ("decode_mb", "MB"),
            ):
                value = getattr(c, what)
                ratio = f" ({_ratio(value / getattr(ours, what))})" if ours and name != TESTED else ""
                cells.append(f"{value:.3g} {unit}{ratio}" if unit == "s" else f"{value:.0f} {unit}{ratio}")
            body.append([name, f"{setting:g}", *cells])
        yield rows(["", "setting", "encode", "decode", "memory, encode", "memory, decode"], body)
        yield (
            f"One picture ({self.facts['cost_picture']}), all layers, one process for each figure, one after the "
            f"other on a machine with {self.facts['cores']} cores ({self.facts['processor']}); in parentheses the "
            "ratio to COMPASS. Settings are those whose final layer comes nearest to COMPASS in PSNR. Weights and "
            "libraries are loaded before the clock starts; memory is the peak of the process, with Python and "
            "libraries in it."
        )

    def _gaps(self) -> Iterator[str]:
        where = [(title(c.scales), c.gaps) for c in self.columns()]
        where += [("time and memory", self.cost_gaps), ("metrics", self.facts["metric_gaps"])]
        names: dict[tuple[str, str], list[str]] = {}
        for place, gaps in where:
            for name, reason in gaps.items():
                names.setdefault((place, reason), []).append(name)
        found = [f"- {place}: {', '.join(some)}: {reason}" for (place, reason), some in names.items()]
        if found:
            yield "## What is missing, and why"
            yield "\n".join(found)

    def _how(self) -> Iterator[str]:
        yield "## How the others were run"
        yield "Through Pillow, by its defaults but for what is named. Simulcast: a file for each layer at one setting."
        peers = self.facts["peers"]
        body = [[PEERS[p].title, identity, _settings(p)] for p, identity in peers.items()]
        if body:
            yield rows(["codec", "version", "settings"], body)
        yield (
            "Pillow's defaults subsample chroma (4:2:0) in AVIF, HEIC, JPEG and WebP, and AVIF, JPEG XL, HEIC and "
            "WebP are tuned for the eye: by RGB PSNR all of them look worse than they do to people. JPEG 2000 with "
            "its resolution levels is one file; its reduced resolutions are wavelet low-passes, measured against "
            "the bicubic reductions that everything else codes, which limits their PSNR whatever the bits; they "
            "exist only for halves, quarters and so on. Published curves are of single layers at full size and of "
            "all 24 Kodak pictures. MS-SSIM needs sides of 161 samples. BD-rates by MS-SSIM are over its decibels, "
            "-10 log10(1 - x), those by Butteraugli over the logarithm of its distance, where lower is better. "
            "Butteraugli and SSIMULACRA 2 are measured by the programs of libjxl, butteraugli_main and ssimulacra2: "
            "the Python package ssimulacra2 (0.3.0) does not give the reference's scores (grey 128 against 148, "
            "64 x 64 samples: 94.7 instead of 56.1)."
        )
        if self.facts["published"]:
            yield f"Curves from {', '.join(self.facts['published'])}; {PUBLISHED} is CompressAI's mean-scale model."


def _names(columns: Sequence[Column]) -> list[str]:
    """Rows that at least one column has, or could not have."""
    names: dict[str, None] = {}
    for column in columns:
        names |= dict.fromkeys([*column.rows, *column.curves, *column.gaps])
    # in the order of the column with most rows
    longest = max(columns, key=lambda c: len(c.against) + len(c.gaps))
    order = [*longest.rows, *longest.curves, *longest.gaps]
    names.pop(TESTED, None)
    return sorted(names, key=lambda n: (not n.endswith("base codec"), order.index(n) if n in order else len(order)))


def _rate(r: Comparison | None) -> str:
    if r is None:
        return NONE
    interval = f" [{r.interval[0]:+.1f}, {r.interval[1]:+.1f}]" if r.interval else ""
    return f"{r.bd_rate:+.1f} %{interval}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value > 0.5 else f"1/{1 / value:.0f}"


def _signed(value: float | None, unit: str = "%", digits: int = 1) -> str:
    return NONE if value is None else f"{value:+.{digits}f} {unit}"


def _more(r: Comparison | None) -> str:
    if r is None:
        return NONE
    return f"{r.low:.1f} to {r.high:.1f} dB, {_signed(r.bd_psnr, 'dB', 2)}"


def _by(r: Comparison | None, metric: str) -> str:
    """BD-rate over another metric, and the values from worse to better that it covers."""
    if r is None or metric not in r.by:
        return NONE
    rate, measure = r.by[metric], METRICS[metric]
    return f"{rate.percent:+.1f} %, {measure.text(rate.low)} to {measure.text(rate.high)}"


def _points(name: str, points: Points) -> Iterator[list[str]]:
    report = points.report()
    for i, setting in enumerate(points.settings):
        cells = []
        for k in range(len(points.scales)):
            bits, bpp = (report[x][k][i] for x in ("bits_of_layer", "accumulated_bpp"))
            values = {metric: report[metric][k][i] for metric in points.values}
            known = [METRICS[metric].text(value) for metric, value in values.items() if value is not None]
            cells.append(", ".join([f"{bits:.0f} bit", f"{bpp:.3f} bpp", *known]))
        yield [name, f"{setting:g}", *cells]


def _settings(peer: str) -> str:
    values = ", ".join(f"{s:g}" for s in PEERS[peer].settings)
    return f"irreversible, mct=1, rates {values}" if peer == J2K else f"quality {values}"


def cost_settings(column: Column, methods: Mapping[str, str]) -> dict[str, float]:
    """For each row of ``column`` that is in ``methods``, the setting that comes nearest to the PSNR of COMPASS at the
    higher of its two middle qualities."""
    if TESTED not in column.rows:
        return {}
    psnr = column.rows[TESTED].curve().psnr
    wanted = psnr[len(psnr) // 2]
    found = {}
    for name in methods:
        if name in column.rows:
            points = column.rows[name]
            values = points.curve().psnr
            found[name] = points.settings[min(range(len(values)), key=lambda i: abs(values[i] - wanted))]
    return found
