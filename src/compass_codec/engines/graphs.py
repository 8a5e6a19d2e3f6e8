"""Graphs for ONNX Runtime, written in this process: a few nodes each, from the very tensors of a set of weights.

So no graph is stored that could be another than its weights, and the library onnx, which is as large as all else here,
is not needed. What is written is ONNX's ModelProto (onnx.proto) in the encoding of Protocol Buffers.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

IR_VERSION, OPSET = 10, 21
CONTRIB = "com.microsoft"  # the domain of operators that ONNX Runtime adds
TYPES = {"float32": 1, "int64": 7, "float64": 11}  # TensorProto.DataType


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


# Small parts are the same in most graphs. Typed: 1 and 1.0 are written differently.
_once = lru_cache(maxsize=None, typed=True)


@_once
def _field(number: int, value: int | float | str) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _bytes(number, value.encode())


@_once
def _attribute(name: str, value: int | float | str | tuple[int, ...]) -> bytes:
    if isinstance(value, str):
        return _field(1, name) + _field(4, value) + _field(20, 3)
    if isinstance(value, tuple):
        return _field(1, name) + b"".join(_field(8, item) for item in value) + _field(20, 7)
    number, kind = (2, 1) if isinstance(value, float) else (3, 2)
    return _field(1, name) + _field(number, value) + _field(20, kind)


@_once
def _info(name: str, kind: str, rank: int) -> bytes:
    shape = b"".join(_bytes(1, _field(2, f"{name}_{i}")) for i in range(rank))
    return _field(1, name) + _bytes(2, _bytes(1, _field(1, TYPES[kind]) + _bytes(2, shape)))


class Graph:
    """A graph in the making. Values are known by name; arrays among a node's inputs become constants of the graph,
    which ONNX Runtime may fold into others. What must not be folded is an input."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def input(self, rank: int, kind: str = "float32") -> str:
        name = self._name()
        self._parts.append(_bytes(11, _info(name, kind, rank)))
        return name

    def _constant(self, value: NDArray[Any]) -> str:
        name = self._name()
        dims = b"".join(_field(1, side) for side in value.shape)
        data = _field(2, TYPES[value.dtype.name]) + _field(8, name) + _bytes(9, value.tobytes())
        self._parts.append(_bytes(5, dims + data))
        return name

    def node(self, operator: str, *inputs: str | NDArray[Any], domain: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        out = self._name()
        node = b"".join(_field(1, name) for name in names) + _field(2, out) + _field(4, operator)
        for key, value in attributes.items():
            node += _bytes(5, _attribute(key, tuple(value) if isinstance(value, list) else value))
        self._parts.append(_bytes(1, node + _field(7, domain)))
        return out

    def model(self, output: str, rank: int, *more: str, kind: str = "float32") -> bytes:
        """The graph with its outputs, all of one type and rank, as a model."""
        graph = b"".join(self._parts) + _field(2, "compass")
        graph += b"".join(_bytes(12, _info(name, kind, rank)) for name in (output, *more))
        sets = _bytes(8, _field(1, "") + _field(2, OPSET)) + _bytes(8, _field(1, CONTRIB) + _field(2, 1))
        return _field(1, IR_VERSION) + sets + _bytes(7, graph)
