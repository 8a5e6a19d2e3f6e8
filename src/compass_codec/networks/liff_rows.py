"""Rows of what LIFF predicts, a tile and some rows at a time, whatever computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from compass_codec.networks.arrays import Array, cast, channels_last, in_unit, space
from compass_codec.networks.places import as_matrix, bicubic_taps, nearest
from compass_codec.networks.strips import Device, spans

# Pixels in hand at a time: of the lower layer on a side of a tile, and of the target in a strip within it. On the CPU a
# strip's arrays then stay below what malloc maps and unmaps anew each time (32 MB); a GPU wants few launches.
TILE = {"cpu": 384, "cuda": 1024}
STRIP_PIXELS = {"cpu": 2**13, "cuda": 2**20}

Span = tuple[int, int]  # first, last + 1


class Parts(Protocol):
    """What an engine computes of a LIFF."""

    @property
    def device(self) -> Device: ...

    @property
    def reach(self) -> int:
        """Pixels that a feature sees to every side."""
        ...

    def array(self, x: NDArray[Any]) -> Array: ...

    def interpolated(self, down: Array, x: Array, across: Array) -> Array:
        """x [B, 3, h, w] interpolated by matrices [H, h] along columns and [w, W] along rows."""
        ...

    def maps(self, x: Array, rows: Span, columns: Span, cell: tuple[float, float]) -> Array:
        """What depends on the lower resolution alone, of ``rows`` and ``columns`` of a part [B, 3, h, w] in 0..1:
        [B, rows, columns, K]. ``cell`` is the height and width of a target pixel."""
        ...

    def query(self, maps: Array, row: Array, column: Array, dy: Array, dx: Array) -> Array:
        """The filtered picture [B, H, W, 3] at nearest rows [H] and columns [W] of ``maps`` and offsets from these."""
        ...


def dimensions(weights: Mapping[str, Any]) -> dict[str, int]:
    """The arguments with which a LIFF is made that fits ``weights``."""

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

    return {
        "channels": weights["extractor.first.weight"].shape[0],
        "hidden": weights["mlp_first.weight"].shape[0],
        "depth": count("mlp_hidden.") + 1,
        "growth": weights["extractor.blocks.0.convs.0.weight"].shape[0],
        "blocks": count("extractor.blocks."),
        "convs": count("extractor.blocks.0.convs."),
    }


def predict(parts: Parts, low: Array, size: tuple[int, int], rows: Span) -> Array:
    """Rows ``rows`` of the prediction of a layer of ``size`` from the one below, ``low`` [B, 3, h, w], uint8 or in
    0..1: float32 [B, 3, rows, W]."""
    columns = spans(size[1], max(1, TILE[parts.device.type] * size[1] // low.shape[-1]))
    tiles = [tile(parts, low, size, rows, each) for each in columns]
    return tiles[0] if len(tiles) == 1 else space(tiles[0]).concatenate(tiles, 3)


def tile(parts: Parts, low: Array, size: tuple[int, int], rows: Span, columns: Span) -> Array:
    """``predict`` at target ``rows`` and ``columns``."""
    axes = []
    for low_side, high, span in ((low.shape[-2], size[0], rows), (low.shape[-1], size[1], columns)):
        # the samples that are looked up, known without asking the device, and what their features see
        first, last = ((2 * i + 1) * low_side // (2 * high) for i in (span[0], span[1] - 1))
        reach = parts.reach + 1
        axes.append((first, last + 1, max(0, first - reach), min(low_side, last + 1 + reach), low_side, high, span))
    (top, bottom, y0, y1, *_), (left, right, x0, x1, *_) = axes
    part = channels_last(in_unit(low[..., y0:y1, x0:x1]))
    down, across = (as_matrix(bicubic_taps(*a[4:]), a[2], a[3]) for a in axes)
    interpolated = parts.interpolated(parts.array(down), part, parts.array(across.T))
    cell = (2 * low.shape[-2] / size[0], 2 * low.shape[-1] / size[1])
    maps = parts.maps(part, (top - y0, bottom - y0), (left - x0, right - x0), cell)
    (row, dy), (column, dx) = ([parts.array(x) for x in nearest(*a[4:])] for a in axes)
    step = max(1, STRIP_PIXELS[parts.device.type] // ((columns[1] - columns[0]) * len(part)))
    found = [
        parts.query(maps, row[i : i + step] - top, column - left, dy[i : i + step], dx)
        for i in range(0, rows[1] - rows[0], step)
    ]
    added = space(part).moveaxis(space(part).concatenate(found, 1), 3, 1)
    return cast(added, "float32") + interpolated
