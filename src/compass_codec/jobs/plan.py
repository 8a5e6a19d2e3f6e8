"""The layers that options make of a picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from compass_codec import container
from compass_codec.errors import OptionError
from compass_codec.jobs.job import EncodeOptions


@dataclass(frozen=True)
class Plan:
    """The layers of one picture, smallest first."""

    sizes: list[tuple[int, int]]
    scales: list[float]
    qualities: list[float]
    weights: list[float]
    notes: list[str] = field(default_factory=list)


def plan_layers(size: tuple[int, int], options: EncodeOptions) -> Plan:
    """The layers of a picture of ``size`` (width, height). With ``sizes`` and ``widths``, what is larger than the
    picture becomes its size unless ``upscale``; of equal layers the last stays. Scale factors are then those of the
    widths. Raises OptionError."""
    count = len(options.scales or options.sizes or options.widths)
    if len(options.qualities) not in (1, count):
        raise OptionError(f"{len(options.qualities)} qualities for {count} layers")
    qualities = list(options.qualities) * (count if len(options.qualities) == 1 else 1)
    weights = list(options.layer_weights or [1.0] * count)
    if options.scales:
        from compass_codec.codec import layer_sizes

        return Plan(layer_sizes(size, options.scales), container.check_scales(options.scales), qualities, weights)
    wanted = options.sizes or [(width, max(1, round(width * size[1] / size[0]))) for width in options.widths]
    fitted = [s if options.upscale else (min(s[0], size[0]), min(s[1], size[1])) for s in wanted]
    layers = dict(zip(fitted, zip(qualities, weights, strict=True), strict=True))
    sizes, notes = list(layers), []
    if large := [f"{w} x {h}" for (w, h), fit in zip(wanted, fitted, strict=True) if (w, h) != fit]:
        notes.append(f"{', '.join(large)}: not enlarged beyond the picture's {size[0]} x {size[1]} without --upscale")
    if dropped := count - len(sizes):
        notes.append(f"{dropped} of {count} layers dropped, as large as another")
    scales = container.check_scales([width / sizes[0][0] for width, _ in sizes])
    return Plan(sizes, scales, [q for q, _ in layers.values()], [w for _, w in layers.values()], notes)
