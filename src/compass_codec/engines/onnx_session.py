"""Graphs that run in ONNX Runtime, and what its networks share: shuffles, gains and checks of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compass_codec.engines import threads

Array = NDArray[Any]
Tensors = Mapping[str, Array]
MOST_THREADS = 8  # of each of some sixty sessions; strips are too small for more


class Cpu:
    type = "cpu"

    def __str__(self) -> str:
        return "cpu"


class Session:
    """A graph, ready to run."""

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, _options(), providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, *arrays: Array) -> Array:
        return self.all(*arrays)[0]

    def all(self, *arrays: Array) -> list[Array]:
        """All outputs."""
        found: list[Array] = self._session.run(None, dict(zip(self._inputs, arrays, strict=True)))
        return found


@cache
def _options() -> onnxruntime.SessionOptions:
    """Those of all sessions. They share memory, or each would keep what its largest strip took. Threads are those of
    each session, as a pool for all would be forced on every other user of ONNX Runtime in this process; they sleep
    while there is nothing to do."""
    onnxruntime.disable_telemetry_events()
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # shapes differ from strip to strip
    options.intra_op_num_threads = threads.count or _threads()
    return options


def _threads() -> int:
    said = os.environ.get("OMP_NUM_THREADS", "")  # as PyTorch does
    return min(int(said) if said.isdecimal() and int(said) else threads.cores(), MOST_THREADS)


def floats(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32)


def apart(x: Array, side: int) -> Array:
    """[rows, W, side * side * C], of rows, columns and channels, to [side * rows, side * W, C]."""
    rows, width, channels = x.shape
    parts = x.reshape(rows, width, side, channels // side).transpose(0, 2, 1, 3)
    return parts.reshape(rows * side, width * side, -1)


def gain(table: Array, level: float) -> Array:
    """Gains [M] of float32, interpolated geometrically between rows of ``table``, as rates.gain does."""
    i = min(int(level), len(table) - 2)
    t = np.float32(level - i)
    found: Array = np.exp((1 - t) * table[i] + t * table[i + 1])
    return found


def check_shapes(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises KeyError for a tensor that is missing, ValueError for one of another shape."""
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name}: {list(tensors[name].shape)} instead of {list(shape)}")
