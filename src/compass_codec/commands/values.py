"""Values of options: text from the command line, checked and turned into numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from compass_codec import container

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


class Value(click.ParamType):  # type: ignore[type-arg]  # older click has it without an argument
    """A click type of a function from text to value, whose ValueError gives the reason."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as e:
            self.fail(f"{value}: {e}", param, ctx)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError("not numbers separated by commas") from None


def rising(text: str) -> tuple[float, ...]:
    """Positive numbers, each above the one before."""
    found = _numbers(text)
    if list(found) != sorted(set(found)) or not 0 < found[0] <= found[-1] < math.inf:
        raise ValueError("not rising positive numbers")
    return found


def integers(text: str) -> tuple[int, ...]:
    """Positive whole numbers."""
    found = _numbers(text)
    if not all(number >= 1 and number.is_integer() for number in found):
        raise ValueError("not positive whole numbers separated by commas")
    return tuple(map(int, found))


def scales(text: str) -> tuple[float, ...]:
    """Scale factors. Raises ValueError, as all of these do."""
    return tuple(container.check_scales(_numbers(text)))


def qualities(text: str) -> tuple[float, ...]:
    """One quality, or one for each layer."""
    found = _numbers(text)
    if not all(1 <= q <= 100 for q in found):
        raise ValueError("quality goes from 1 to 100")
    return found


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """(width, height) of each layer, smallest first."""
    parts = [re.fullmatch(r"\s*(\d+)[xX](\d+)\s*", part) for part in text.split(",")]
    found = sorted((int(part[1]), int(part[2])) for part in parts if part)
    if len(found) < len(parts):
        raise ValueError("not sizes such as 640x480 separated by commas")
    if any(b[1] < a[1] for a, b in pairwise(found)):
        raise ValueError("one size is wider than another but not as high; layers must not shrink in either direction")
    _check_sides([side for size in found for side in size], len(found))
    return tuple(found)


def widths(text: str) -> tuple[int, ...]:
    """Width of each layer, smallest first."""
    try:
        found = sorted(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("not whole numbers separated by commas") from None
    _check_sides(found, len(found))
    return tuple(found)


def _check_sides(sides: list[int], layers: int) -> None:
    if layers > container.MAX_LAYERS:
        raise ValueError(f"{layers} layers; a file holds 1 to {container.MAX_LAYERS}")
    if not all(1 <= side <= container.MAX_SIDE for side in sides):
        raise ValueError(f"a side has 1 to {container.MAX_SIDE} samples")


def byte_count(text: str) -> float:
    """Bytes: 200000, 200kB (1000 each), 200KiB (1024 each), 1.5MB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError("not a number of bytes such as 200kB, 200KiB or 1.5MB")
    found = float(match[1]) * UNITS[match[2].lower()]
    if found < 1:
        raise ValueError("less than one byte")
    return found


def positive(text: str) -> float:
    """One finite number above 0."""
    found = _numbers(text)
    if len(found) > 1 or not 0 < found[0] < math.inf:
        raise ValueError("not a number above 0")
    return found[0]


def share(text: str) -> float:
    """One number between 0 and 1."""
    found = positive(text)
    if found >= 1:
        raise ValueError("not between 0 and 1")
    return found


def layer_weights(text: str) -> tuple[float, ...]:
    """One finite number above 0 for each layer."""
    found = _numbers(text)
    if not all(0 < weight < math.inf for weight in found):
        raise ValueError("not numbers above 0")
    return found


def extension(text: str) -> str:
    """The extension of a picture format that can be written, with its dot."""
    from compass_codec.pictures import check_format

    found = f".{text.removeprefix('.')}"
    if Path(f"x{found}").suffix != found:
        raise ValueError("not an extension such as png")
    check_format(Path(f"x{found}"))
    return found


def some_of(known: Sequence[str]) -> Value:
    """A click type: names out of ``known``, separated by commas, each once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(filter(None, text.split(","))))
        if other := [name for name in names if name not in known]:
            raise ValueError(f"{other[0]!r} is none of {', '.join(known)}")
        return names

    return Value("X,Y,...", parse)


RISING, INTEGERS = Value("X,Y,...", rising), Value("N[,N...]", integers)
