"""The order in which an entropy model codes the latent y: steps, each of which may see what was coded before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from compass_codec.networks.arrays import Array, space
from compass_codec.networks.numbers import ENTROPY, PHASES, POOLINGS, STEPS

Slices = tuple[slice, ...]


class Part(NamedTuple):
    """Symbols of a step: ``channels`` at every ``every``-th row and column of the step's grid, from ``row`` and
    ``column`` on. ``outputs``: what the context model's last convolution gives for them, scales and then means.
    ``marks``: the channels of marks that stand for ``channels``."""

    channels: slice
    row: int
    column: int
    every: int
    outputs: slice
    marks: slice = slice(0)

    def places(self, stride: int = 1, row: int = 0) -> tuple[slice, slice]:
        """Rows and columns in the step's grid, from its ``row`` on, or in y, where the grid has every ``stride``-th of
        either."""
        every = stride * self.every
        return slice((stride * self.row - row) % every, None, every), slice(stride * self.column, None, every)

    def of(self, stride: int = 1) -> Slices:
        """The same of a tensor [B, M, h, w]."""
        return slice(None), self.channels, *self.places(stride)


@dataclass(frozen=True)
class Step:
    """``parts`` are coded at once. A context model sees the grid of every ``stride``-th row and column of y, of which
    ``known`` is what was coded before. ``network`` says which of its networks. Without ``context``, all
    comes from the features of z.

    A network that several steps share also sees ``marks`` channels: of each set of channels, where it is known, and of
    each scale of the pyramid, whether it is this one, ``scale``."""

    parts: tuple[Part, ...]
    stride: int = 1
    known: tuple[Part, ...] = ()
    context: bool = False
    network: int = 0
    marks: int = 0
    scale: int = 0

    @property
    def grid(self) -> Slices:
        """The grid as a part of [B, C, h, w]."""
        return slice(None), slice(None), slice(None, None, self.stride), slice(None, None, self.stride)

    def marked(self, known: Array, value: float) -> list[Array]:
        """``known`` [B, M, h, w], latents of the grid, 0 where unknown; and marks [B, marks, h, w], 0 or ``value``."""
        if not self.marks:
            return [known]
        marks = space(known).concatenate([space(known).zeros_like(known[:, :1])] * self.marks, 1)
        for part in self.known:
            marks[(slice(None), part.marks, *part.places())] = value
        marks[:, self.marks - POOLINGS + self.scale] = value
        return [known, marks]


def order_of(entropy: str, m: int) -> tuple[Step, ...]:
    """The steps of an entropy model of numbers.ENTROPY for ``m`` channels of y; none without hyper networks."""
    model = ENTROPY[entropy]
    if not model.hyper:
        return ()
    return _pyramid(m, model.groups) if model.groups else _four_steps(m, model.networks > 0)


def _four_steps(m: int, context: bool) -> tuple[Step, ...]:
    """Each step covers every 2x2 square of places, a quarter of the channels at each."""
    quarter, found = m // STEPS, list[Step]()
    known: tuple[Part, ...] = ()
    for step in range(STEPS):
        parts = []
        for phase, (row, column) in enumerate(PHASES):
            first = (phase - step) % STEPS * quarter
            outputs = slice(2 * quarter * phase, 2 * quarter * (phase + 1))
            parts.append(Part(slice(first, first + quarter), row, column, 2, outputs))
        found.append(Step(tuple(parts), known=known, context=context and step > 0, network=step - 1))
        known += tuple(parts)
    return tuple(found)


def _pyramid(m: int, groups: int) -> tuple[Step, ...]:
    """y pooled by 2 to one of four places, POOLINGS times. The coarsest scale is the first step. Each finer one adds
    the other three places of every 2x2 square, in as many steps as there are ``groups`` of channels: in each step every
    place has another group."""
    bounds = [m * k // groups for k in range(groups + 1)]

    def part(first: int, last: int, row: int, column: int, every: int = 2) -> Part:
        outputs = slice(2 * bounds[first], 2 * bounds[last])
        return Part(slice(bounds[first], bounds[last]), row, column, every, outputs, slice(first, last))

    found = [Step((part(0, groups, 0, 0, 1),), stride=2**POOLINGS)]
    for scale in reversed(range(POOLINGS)):
        known: tuple[Part, ...] = (part(0, groups, *PHASES[0]),)
        for step in range(groups):
            shifted = [(phase - step) % groups for phase in range(len(PHASES))]
            parts = tuple(part(g, g + 1, *PHASES[phase]) for phase, g in enumerate(shifted) if phase)
            found.append(Step(parts, 2**scale, known, True, 0, groups + POOLINGS, scale))
            known += parts
    return tuple(found)
