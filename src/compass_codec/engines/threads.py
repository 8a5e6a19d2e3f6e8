"""How many threads compute."""

from __future__ import annotations

import os

count: int | None = None  # None: as many as an engine likes


def use_one() -> None:
    """From now on, compute with one thread; to be called before codecs are loaded. How many there are shows in the last
    bits of sums, and so in the bytes of a file."""
    global count
    count = 1


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
