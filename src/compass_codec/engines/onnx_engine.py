"""ONNX Runtime as an engine: arrays of NumPy, float32, on a CPU.

What mixes channels alone is a matrix product, and one graph computes it for all layers, whose weights are inputs. Only
blocks have graphs of their own: depthwise convolutions are fast where weights are constants.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compass_codec.engines.graphs import CONTRIB, Graph
from compass_codec.engines.onnx_session import Array, Cpu, Session, Tensors, apart, check_shapes, floats, gain
from compass_codec.entropy import LEVELS
from compass_codec.networks import lean_rows
from compass_codec.networks.arrays import in_unit
from compass_codec.networks.numbers import (
    ACTIVATION,
    CONTEXT,
    EPSILON,
    EXACT,
    FINE,
    INTEGERS,
    LAMBDAS,
    MEAN_LIMIT,
    MEAN_UNIT,
    UNSHUFFLE,
    check_exact,
    entropy_model,
)
from compass_codec.networks.order import Part, Step, order_of
from compass_codec.networks.places import first, nearest

if TYPE_CHECKING:
    from compass_codec.engines.onnx_mean_scale import OnnxLIFF, OnnxMeanScale

Apply = Callable[[Array], Array]
ONE = np.array([1], np.int64)
# types of a safetensors file
KINDS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1"}


class OnnxEngine:
    """See engines.Engine."""

    name = "onnx"
    device = Cpu()

    def parse(self, data: bytes) -> dict[str, Array]:
        # views of the file; the library safetensors copies it twice, and so takes ten times as long
        begin = 8 + int.from_bytes(data[:8], "little")
        found = {}
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                (first, end), kind = entry["data_offsets"], np.dtype(KINDS[entry["dtype"]])
                whole = np.frombuffer(data, np.uint8)[begin + first : begin + end]
                found[name] = whole.view(kind).reshape(entry["shape"])
        return found

    def array(self, x: Array) -> Array:
        return x

    def lean(self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str) -> OnnxLean:
        return OnnxLean(tensors, **dimensions)

    def lean_entropy(self, dimensions: dict[str, Any], tensors: dict[str, Any]) -> OnnxEntropy:
        return OnnxEntropy(tensors, **dimensions)

    def lean_liff(self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str) -> OnnxLeanLIFF:
        return OnnxLeanLIFF(tensors, **dimensions)

    def mean_scale(self, tensors: dict[str, Any], precision: str) -> OnnxMeanScale:
        from compass_codec.engines.onnx_mean_scale import OnnxMeanScale

        return OnnxMeanScale(tensors)

    def liff(self, tensors: dict[str, Any], precision: str) -> OnnxLIFF:
        from compass_codec.engines.onnx_mean_scale import OnnxLIFF

        return OnnxLIFF(tensors)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()


# Graphs whose weights are inputs.


@cache
def _gemm() -> Session:
    """x [N, in], weights [in, out] and bias [out] to x @ weights + bias."""
    graph = Graph()
    return Session(graph.model(graph.node("Gemm", graph.input(2), graph.input(2), graph.input(1)), 2))


@cache
def _matmul() -> Session:
    graph = Graph()
    return Session(graph.model(graph.node("MatMul", graph.input(2), graph.input(2)), 2))


@cache
def _integers() -> Session:
    """An exact.Conv of size 1 with activations: integers x [N, in], weights, bias and scale."""
    graph = Graph()
    sums = graph.node("Gemm", graph.input(2), graph.input(2), graph.input(1))
    zero, most = (np.float32(value).reshape(()) for value in (0, ACTIVATION))
    return Session(graph.model(_scaled(graph, sums, graph.input(1), zero, most), 2))


@cache
def _parameters(channels: int, later: bool) -> Session:
    """See Exact.scales_and_means, of ``channels`` each. Inputs: features [N, in], weights, bias and scale, and in a
    ``later`` step the same of hidden activations; to indices and means [N, channels]."""
    graph = Graph()
    least, most, zero, last, limit = (
        np.float32(value).reshape(()) for value in (-EXACT, EXACT, 0, LEVELS - 1, MEAN_LIMIT)
    )
    parts = []
    for _ in range(1 + later):
        sums = graph.node("Gemm", graph.input(2), graph.input(2), graph.input(1))
        parts.append(_scaled(graph, sums, graph.input(1), least, most))
    both = graph.node("Add", *parts) if later else parts[0]
    scales, means = (
        graph.node("Slice", both, *(np.array([at], np.int64) for at in (k * channels, (k + 1) * channels, 1)))
        for k in (0, 1)
    )
    index = graph.node("Floor", graph.node("Mul", scales, np.float32(1 / FINE).reshape(())))
    means = graph.node("Mul", graph.node("Clip", means, -limit, limit), np.float32(1 / MEAN_UNIT).reshape(()))
    return Session(graph.model(graph.node("Clip", index, zero, last), 2, means))


def _scaled(graph: Graph, sums: str, scale: str, low: str | Array, high: str | Array) -> str:
    """Sums of integers in the units of the next layer. The scale is an input: nothing folds it into weights."""
    return graph.node("Clip", graph.node("Floor", graph.node("Mul", sums, scale)), low, high)


# Blocks: [1, rows + 2, W, C] to [1, rows, W, C]. Depthwise convolutions want channels first, and ONNX Runtime makes one
# step of that and their own layout.


def _depthwise(graph: Graph, x: str, weight: Array, bias: Array | None) -> str:
    channels, extra = len(weight), [] if bias is None else [bias]
    h = graph.node("Transpose", x, perm=[0, 3, 1, 2])
    h = graph.node("Conv", h, weight, *extra, group=channels, kernel_shape=[3, 3], pads=[0, 1, 0, 1])
    h = graph.node("Transpose", h, perm=[0, 2, 3, 1])
    return graph.node("Reshape", h, np.array([-1, channels], np.int64))


def _added(graph: Graph, x: str, flat: str) -> str:
    """The block's input without its first and last row, and what is added to it, [places, C]."""
    middle = graph.node("Slice", x, ONE, -ONE, ONE)
    return graph.node("Add", graph.node("Reshape", flat, graph.node("Shape", middle)), middle)


def _gated(taps: Array, bias: Array) -> Session:
    """A GatedBlock. Inputs after x: the norm's weights, weights and bias to a, to b, and the last ones with the gain of
    the rate."""
    graph = Graph()
    x, norm, *rest = graph.input(4), graph.input(1), *(graph.input(2 - i % 2) for i in range(6))
    h = _depthwise(graph, x, taps, bias)
    h = graph.node("SimplifiedLayerNormalization", h, norm, axis=-1, epsilon=EPSILON)
    a, b = (graph.node("Gemm", h, *rest[i : i + 2]) for i in (0, 2))
    gated = graph.node("Mul", graph.node("QuickGelu", a, domain=CONTRIB, alpha=1.0), b)  # with alpha 1 it is silu
    return Session(graph.model(_added(graph, x, graph.node("Gemm", gated, *rest[4:])), 4))


def _plain(taps: Array, bias: Array | None, biases: bool) -> Session:
    """A PlainBlock. Inputs after x: the two weights, with a bias after each where it has ``biases``."""
    graph = Graph()
    x, *rest = graph.input(4), *(graph.input(2 - i % 2 if biases else 2) for i in range(4 if biases else 2))
    half = len(rest) // 2
    operator = "Gemm" if biases else "MatMul"
    h = graph.node("Relu", graph.node(operator, _depthwise(graph, x, taps, bias), *rest[:half]))
    return Session(graph.model(_added(graph, x, graph.node(operator, h, *rest[half:])), 4))


def _exact_block(taps: Array, bias: Array) -> Session:
    """An exact.Block. Inputs after x: the scale of the depthwise convolution, then weights, bias and scale of both
    others."""
    graph = Graph()
    x, scale = graph.input(4), graph.input(1)
    low, zero, high = (np.float32(value).reshape(()) for value in (-ACTIVATION, 0, ACTIVATION))
    h = _scaled(graph, _depthwise(graph, x, taps, bias), scale, low, high)
    for least, most in ((zero, high), (np.float32(-EXACT).reshape(()), np.float32(EXACT).reshape(()))):
        sums = graph.node("Gemm", h, graph.input(2), graph.input(1))
        h = _scaled(graph, sums, graph.input(1), least, most)
    return Session(graph.model(graph.node("Clip", _added(graph, x, h), low, high), 4))


# From and to strips [1, C, rows, W], whose channels lie last in memory.


def _last(x: Array) -> Array:
    """A strip as [rows, W, C]."""
    return np.ascontiguousarray(x[0].transpose(1, 2, 0), np.float32)


def _flat(x: Array) -> Array:
    """A strip as [rows * W, C]."""
    return _last(x).reshape(-1, x.shape[1])


def _strip(x: Array) -> Array:
    """[rows, W, C] as a strip."""
    return x.transpose(2, 0, 1)[None]


def _block(session: Session, *weights: Array) -> Apply:
    return lambda x: _strip(session(_last(x)[None], *weights)[0])


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    """[rows, W, in] to [rows, W, out]."""
    return _gemm()(x.reshape(-1, x.shape[2]), weight, bias).reshape(*x.shape[:2], -1)


def _together(x: Array, side: int) -> Array:
    """[rows, W, C], multiples of ``side``, to [rows / side, W / side, side * side * C]: rows, columns, channels."""
    rows, width, channels = x.shape
    parts = x.reshape(rows // side, side, width // side, side * channels).transpose(0, 2, 1, 3)
    return parts.reshape(rows // side, width // side, -1)


def _even(x: Array, side: int) -> Array:
    """The last row and column of [rows, W, C] repeated up to multiples of ``side``."""
    more = [-length % side for length in x.shape[:2]]
    return np.pad(x, ((0, more[0]), (0, more[1]), (0, 0)), "edge") if any(more) else x


class Layers:
    """Weights by the names of layers, as matrices [in, out] of float32. Raises KeyError, and ValueError where one has
    another shape than ``shapes`` says."""

    def __init__(self, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.tensors = tensors
        check_shapes(tensors, shapes)

    def get(self, name: str) -> Array:
        return floats(self.tensors[name])

    def matrix(self, name: str) -> Array:
        """Of a 1x1 convolution."""
        return floats(self.tensors[f"{name}.weight"][:, :, 0, 0].T)

    def bias(self, name: str) -> Array:
        return self.get(f"{name}.bias")

    def from_pixels(self, name: str) -> Array:
        """Of a 1x1 convolution of pixels unshuffled by 8, whose columns here are channels last (see _together)."""
        out = self.tensors[f"{name}.weight"].shape[0]
        weight = self.tensors[f"{name}.weight"].reshape(out, 3, UNSHUFFLE, UNSHUFFLE)
        return floats(weight.transpose(2, 3, 1, 0).reshape(-1, out))

    def down(self, name: str) -> Array:
        """Of a 2x2 convolution with stride 2."""
        weight = self.tensors[f"{name}.weight"]
        return floats(weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)))


def _layer(name: str, out: int, size: int, side: int = 1, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, size, side, side)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _plain_shapes(name: str, c: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = _layer(f"{name}.dw", c, 1, 3, bias) | _layer(f"{name}.p1", 2 * c, c, 1, bias)
    return shapes | _layer(f"{name}.p2", c, 2 * c, 1, bias)


def _plain_block(layers: Layers, name: str, biases: bool = True) -> Apply:
    session = _plain(layers.get(f"{name}.dw.weight"), layers.bias(f"{name}.dw") if biases else None, biases)
    weights = []
    for part in ("p1", "p2"):
        weights += [layers.matrix(f"{name}.{part}"), *([layers.bias(f"{name}.{part}")] if biases else [])]
    return _block(session, *weights)


class OnnxEntropy:
    """See engines.EntropyNetworks; made from the dimensions of an EntropyModel. ``shapes``: those of other tensors."""

    def __init__(
        self,
        tensors: Tensors,
        m: int = 256,
        n: int = 64,
        h: int = 128,
        g: int = 128,
        entropy: str = CONTEXT,
        shapes: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.m, self.n, self.entropy = m, n, entropy
        hyper, shapes = entropy_model(entropy).hyper, {"y_scale": (m,)} | (shapes or {})
        if hyper:
            shapes |= _layer("h_a.0", h, m) | _layer("h_a.1", h, h, 2) | _layer("h_a.2", n, h, 2)
            shapes |= _plain_shapes("h_a_blocks.0", h) | _plain_shapes("h_a_blocks.1", h)
        self.layers = Layers(tensors, shapes)
        exact = {name.removeprefix(INTEGERS): value for name, value in tensors.items() if name.startswith(INTEGERS)}
        self.exact = OnnxExact(exact, m, n, h, g, entropy) if hyper else None

    @cached_property
    def hyper(self) -> OnnxHyper:
        return OnnxHyper(self.layers)


class OnnxLean(OnnxEntropy):
    """See engines.LeanNetworks; made from the dimensions of a LeanCodec."""

    def __init__(
        self,
        tensors: Tensors,
        c8: int = 144,
        c16: int = 288,
        n8: int = 5,
        n16: int = 3,
        m: int = 256,
        **entropy: Any,
    ) -> None:
        samples, levels = 3 * UNSHUFFLE**2, len(LAMBDAS)
        shapes: dict[str, tuple[int, ...]] = {"log_gain": (levels, m), "log_inv_gain": (levels, m)}
        shapes |= _layer("embed", c8, samples) | _layer("down", c16, c8, 2) | _layer("to_y", m, c16)
        shapes |= _layer("from_y", c16, m) | _layer("out", samples, c8)
        shapes |= {"up.weight": (c16, c8, 2, 2), "up.bias": (c8,)}
        self.counts = {"a8": n8, "a16": n16, "s16": n16, "s8": n8}
        for group, count in self.counts.items():
            c = c8 if group.endswith("8") else c16
            for k in range(count):
                name = f"{group}.{k}"
                shapes |= {f"{name}.norm": (c,), f"{name}.log_gain": (levels, c)}
                shapes |= _layer(f"{name}.dw", c, 1, 3) | _layer(f"{name}.p1", 2 * c, c) | _layer(f"{name}.p2", c, c)
        super().__init__(tensors, m, **entropy, shapes=shapes)
        self._sessions: dict[str, Session] = {}
        self._last: OnnxTransforms | None = None

    def at(self, lam: float) -> OnnxTransforms:
        level = float(np.interp(math.log(lam), np.log(LAMBDAS), np.arange(len(LAMBDAS))))
        if self._last is None or self._last.level != level:  # which most pictures share
            self._last = OnnxTransforms(self, level)
        return self._last

    def gated(self, name: str) -> Session:
        """The graph of a block, made when it is first asked for: who decodes needs half of them."""
        if name not in self._sessions:
            self._sessions[name] = _gated(self.layers.get(f"{name}.dw.weight"), self.layers.bias(f"{name}.dw"))
        return self._sessions[name]


class OnnxHyper:
    """See engines.HyperAnalysis."""

    def __init__(self, layers: Layers) -> None:
        self._weights = layers.get("y_scale")[:, None] * layers.matrix("h_a.0"), layers.bias("h_a.0")
        self.blocks = [_plain_block(layers, f"h_a_blocks.{k}") for k in range(2)]
        self.down = [self._halved(layers.down(f"h_a.{k}"), layers.bias(f"h_a.{k}")) for k in (1, 2)]

    @staticmethod
    def _halved(*weights: Array) -> Apply:
        return lambda x: _strip(_linear(_together(_last(x), 2), *weights))

    def first(self, y: Array) -> Array:
        x = _linear(_last(y), *self._weights)
        return _strip(np.maximum(x, 0, out=x))


class OnnxTransforms:
    """See engines.Transforms."""

    def __init__(self, networks: OnnxLean, level: float) -> None:
        self._networks, self.level, self._layers = networks, level, networks.layers

    @cached_property
    def a8(self) -> list[Apply]:
        return self._blocks("a8")

    @cached_property
    def a16(self) -> list[Apply]:
        return self._blocks("a16")

    @cached_property
    def s16(self) -> list[Apply]:
        return self._blocks("s16")

    @cached_property
    def s8(self) -> list[Apply]:
        return self._blocks("s8")

    def _blocks(self, group: str) -> list[Apply]:
        return [self._gated(f"{group}.{k}") for k in range(self._networks.counts[group])]

    def _gated(self, name: str) -> Apply:
        layers = self._layers
        p1, b1, p2 = layers.matrix(f"{name}.p1"), layers.bias(f"{name}.p1"), layers.matrix(f"{name}.p2")
        p2 *= self._gain(f"{name}.log_gain")[:, None]
        c = len(p2)
        halves = (floats(p1[:, :c]), b1[:c], floats(p1[:, c:]), b1[c:])
        norm, bias = layers.get(f"{name}.norm"), layers.bias(f"{name}.p2")
        return _block(self._networks.gated(name), norm, *halves, p2, bias)

    def _gain(self, name: str) -> Array:
        return gain(self._layers.get(name), self.level)

    @cached_property
    def _weights(self) -> dict[str, tuple[Array, Array]]:
        layers, gain = self._layers, self._gain("log_gain")
        found = {"embed": (layers.from_pixels("embed"), layers.bias("embed"))}
        found["down"] = layers.down("down"), layers.bias("down")
        found["to_y"] = layers.matrix("to_y") * gain, layers.bias("to_y") * gain
        found["from_y"] = layers.matrix("from_y") * self._gain("log_inv_gain")[:, None], layers.bias("from_y")
        up = layers.tensors["up.weight"].transpose(0, 2, 3, 1)
        found["up"] = floats(up.reshape(len(up), -1)), np.tile(layers.bias("up"), 4)
        out = layers.tensors["out.weight"][..., 0, 0].reshape(3, UNSHUFFLE, UNSHUFFLE, -1)
        bias = layers.bias("out").reshape(3, UNSHUFFLE, UNSHUFFLE).transpose(1, 2, 0)
        found["out"] = floats(out.transpose(3, 1, 2, 0).reshape(out.shape[3], -1)), floats(bias.reshape(-1))
        return found

    def embed(self, x: Array) -> Array:
        return _strip(_linear(_together(_even(_last(x), UNSHUFFLE), UNSHUFFLE), *self._weights["embed"]))

    def down(self, f: Array) -> Array:
        return _strip(_linear(_together(_last(f), 2), *self._weights["down"]))

    def to_y(self, f: Array) -> Array:
        return _strip(_linear(_last(f), *self._weights["to_y"]))

    def from_y(self, y: Array) -> Array:
        return _strip(_linear(_last(y), *self._weights["from_y"]))

    def up(self, f: Array) -> Array:
        return _strip(apart(_linear(_last(f), *self._weights["up"]), 2))

    def out(self, f: Array) -> Array:
        return _strip(apart(_linear(_last(f), *self._weights["out"]), UNSHUFFLE))


class OnnxExact:
    """See engines.Exact. Raises ValueError for weights that are not exact."""

    def __init__(self, tensors: Tensors, m: int, n: int, h: int, g: int, entropy: str = CONTEXT) -> None:
        self.m, self._tensors, context = m, tensors, range(entropy_model(entropy).networks)
        shapes = {"up.0": (4 * h, n), "up.1": (4 * h, h), "first": (2 * m, h)}
        for k in context:
            shapes |= {f"into.{k}": (g, m + order_of(entropy, m)[-1].marks + h), f"more.{k}": (2 * m, g)}
        for block, c in (*((f"block.{k}", h) for k in range(2)), *((f"context.{k}", g) for k in context)):
            shapes |= {f"{block}.p1": (2 * c, c), f"{block}.p2": (c, 2 * c), f"{block}.dw": (c, 1)}
        for name, shape in shapes.items():
            side = 3 if name.endswith("dw") else 1
            weight, bias, scale = (tensors[f"{name}.{part}"] for part in ("weight", "bias", "scale"))
            check_exact(name, weight, bias, scale)
            if weight.shape != (*shape, side, side):
                raise ValueError(f"{name}: {list(weight.shape)} instead of {[*shape, side, side]}")
        self._networks, self._known = context, floats(tensors["known"] if context else np.zeros(m))
        self._cut: dict[tuple[Any, ...], list[Array]] = {}
        if self._known.shape != (m,):
            raise ValueError(f"known: {list(self._known.shape)} instead of {[m]}")

    def _conv(self, name: str) -> tuple[Array, Array, Array]:
        """Weights [in, out], bias and scale of a 1x1 convolution."""
        weight, bias, scale = (self._tensors[f"{name}.{part}"] for part in ("weight", "bias", "scale"))
        return floats(weight[:, :, 0, 0].T), floats(bias), floats(scale)

    def _block(self, name: str) -> Apply:
        taps, bias, scale = (floats(self._tensors[f"{name}.dw.{part}"]) for part in ("weight", "bias", "scale"))
        return _block(_exact_block(taps, bias), scale, *self._conv(f"{name}.p1"), *self._conv(f"{name}.p2"))

    @cached_property
    def blocks(self) -> list[Apply]:
        return [self._block(f"block.{k}") for k in range(2)]

    @cached_property
    def context(self) -> list[Apply]:
        return [self._block(f"context.{k}") for k in self._networks]

    @cached_property
    def up(self) -> list[Apply]:
        return [self._doubled(*self._conv(f"up.{k}")) for k in range(2)]

    @staticmethod
    def _doubled(*conv: Array) -> Apply:
        # columns of channels, rows, columns as those of apart
        weights = [floats(x.reshape(*x.shape[:-1], -1, 4).swapaxes(-1, -2).reshape(x.shape)) for x in conv]
        return lambda x: _strip(apart(_positive(_last(x), *weights), 2))

    @cached_property
    def _into(self) -> list[tuple[Array, Array, Array]]:
        return [self._conv(f"into.{k}") for k in self._networks]

    def into(self, step: Step, known: Array, features: Array) -> Array:
        scaled = _last(known) * self._known
        scaled = np.floor(scaled + np.float32(0.5)).clip(-ACTIVATION, ACTIVATION)
        seen = [*step.marked(_strip(scaled), ACTIVATION), features]
        return _strip(_positive(np.concatenate([_last(x) for x in seen], 2), *self._into[step.network]))

    def _outputs(self, name: str, *rows: slice) -> list[Array]:
        """Weights, bias and scale of some outputs of a 1x1 convolution, made once."""
        key = (name, *((each.start, each.stop) for each in rows))
        if key not in self._cut:
            self._cut[key] = [floats(np.concatenate([x[..., each] for each in rows], -1)) for x in self._conv(name)]
        return self._cut[key]

    def scales_and_means(self, step: Step, part: Part, features: Array, hidden: Array | None) -> tuple[Array, Array]:
        first, last = part.channels.start, part.channels.stop
        inputs = [_flat(features), *self._outputs("first", part.channels, slice(self.m + first, self.m + last))]
        if hidden is not None:
            inputs += [_flat(hidden), *self._outputs(f"more.{step.network}", part.outputs)]
        found = _parameters(last - first, hidden is not None).all(*inputs)
        index, means = (each.reshape(*features.shape[2:], -1) for each in found)
        return _strip(index.astype(np.uint8)), _strip(means)


def _positive(x: Array, *conv: Array) -> Array:
    """[rows, W, in] to [rows, W, out], from 0 to the largest activation."""
    return _integers()(x.reshape(-1, x.shape[2]), *conv).reshape(*x.shape[:2], -1)


class OnnxLeanLIFF:
    """See lean_rows.Parts; made from the dimensions of a LeanLIFF."""

    device = Cpu()

    def __init__(self, tensors: Tensors, channels: int = 48, blocks: int = 2, taps: int = 9, hidden: int = 32) -> None:
        self._channels, self._count, self._taps = channels, blocks, taps
        shapes: dict[str, tuple[int, ...]] = _layer("embed", channels, 12, 3, False)
        shapes |= _layer("out", 4 * 3 * taps, channels, 1, False)
        for k in range(blocks):
            shapes |= _plain_shapes(f"blocks.{k}", channels, False)
        for axis in ("rows_phi", "columns_phi"):
            for name, out, size in (("first", hidden, 3), ("second", hidden, hidden), ("last", taps, hidden)):
                shapes |= {f"{axis}.{name}.weight": (out, size), f"{axis}.{name}.bias": (out,)}
        self._layers = Layers(tensors, shapes)

    def rows(self, low: Array, size: tuple[int, int], rows: tuple[int, int]) -> Array:
        """See engines.Predictor."""
        found: Array = lean_rows.predict(self, low, size, rows)
        return found

    def array(self, x: Array) -> Array:
        return x

    def matmul(self, a: Array, b: Array) -> Array:
        return _matmul()(floats(a), floats(b))

    @cached_property
    def _blocks(self) -> list[Apply]:
        return [_plain_block(self._layers, f"blocks.{k}", False) for k in range(self._count)]

    def through(self) -> Sequence[Apply]:
        return self._blocks

    @cached_property
    def _embed(self) -> Session:
        """[1, rows + 2, W + 2, 12], channels last as those of _together, to [1, rows, W, C]. The mean of each colour
        does not show."""
        weight = self._layers.get("embed.weight").reshape(self._channels, 3, 4, 3, 3)
        weight = weight - weight.mean((2, 3, 4), keepdims=True)
        weight = floats(weight.swapaxes(1, 2).reshape(self._channels, 12, 3, 3))
        graph = Graph()
        x = graph.node("Transpose", graph.input(4), perm=[0, 3, 1, 2])
        x = graph.node("Conv", x, weight, kernel_shape=[3, 3])
        return Session(graph.model(graph.node("Transpose", x, perm=[0, 2, 3, 1]), 4))

    def embedded(self, low: Array, span: tuple[int, int]) -> Array:
        begin, end = span
        part = low[..., 2 * max(0, begin - 1) : 2 * end + 2, :]
        x = _together(_even(_last(in_unit(part) - np.float32(0.5)), 2), 2)
        half = (low.shape[-2] + 1) // 2
        x = np.pad(x, ((int(begin == 0), int(end == half)), (1, 1), (0, 0)), "edge")
        return _strip(self._embed(x[None])[0])

    def _phi(self, axis: str, orders: Array, offset: Array, cell: float, across: float) -> Array:
        """See lean_liff.AlongAxis: values [N, taps] at offsets [N]."""
        cosines = np.cos(np.float32(0.5 * math.pi) * orders.astype(np.float32) * (offset[:, None] + 1))
        h = np.stack([offset, np.full_like(offset, cell), np.full_like(offset, across)], 1)
        for name in ("first", "second", "last"):
            weight, bias = self._layers.get(f"{axis}.{name}.weight"), self._layers.get(f"{axis}.{name}.bias")
            h = _gemm()(h, floats(weight.T), bias)
            h = h if name == "last" else h / (1 + np.exp(-h))
        found: Array = cosines + h
        return found

    def _along(self, low: tuple[int, int], size: tuple[int, int], rows: Array, columns: Array) -> tuple[Array, Array]:
        cells = [2 * a / b for a, b in zip(low, size, strict=True)]
        side, k = math.isqrt(self._taps - 1) + 1, np.arange(self._taps)
        a = self._phi("rows_phi", k // side, rows, *cells)
        return a, self._phi("columns_phi", k % side, columns, *reversed(cells))

    def added(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        fixed = 2 * size[0] % low[0] == 0 and 2 * size[1] % low[1] == 0
        return (self._fixed if fixed else self._looked_up)(low, size, rows)

    def _fixed(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        """See LeanLIFF._fixed."""
        m = [2 * b // a for a, b in zip(low, size, strict=True)]
        (row, dy), (column, dx) = (nearest(a, b, (0, c)) for a, b, c in zip(low, size, m, strict=True))
        a, b = self._along(low, size, dy, dx)
        weights = self._layers.get("out.weight").reshape(2, 2, 3, self._taps, -1)[row][:, column]
        weight = floats(np.einsum("yk,xk,yxckd->ycxd", a, b, weights).reshape(-1, self._channels).T)

        def added(x: Array, begin: int, span: tuple[int, int]) -> Array:
            n, width, channels = x.shape
            y = self.matmul(x.reshape(-1, channels), weight).reshape(n, width, m[0], 3, m[1])
            y = y.transpose(0, 2, 3, 1, 4).reshape(n * m[0], 3, -1)
            return y[span[0] - begin * m[0] : span[1] - begin * m[0], :, : size[1]]

        return added

    @cached_property
    def _look_up(self) -> Session:
        """See lean_liff.look_up. Inputs: x [n, w / 2, C], of each target column its column and its values [W, 3 *
        taps], of each row of features those of each target row and colour [2 n, 3 * most, 3 * taps], and which of
        these 2 n * most rows are wanted; to [rows, 3, W]. Even rows of features come first, then odd ones."""
        graph, taps = Graph(), 3 * self._taps
        x, column, along, down, at = (
            graph.input(rank, kind)
            for rank, kind in ((3, "float32"), (1, "int64"), (2, "float32"), (3, "float32"), (1, "int64"))
        )
        weights = self._layers.matrix("out").reshape(self._channels, 2, 2 * taps)
        flat = graph.node("Reshape", x, np.array([-1, self._channels], np.int64))
        n = graph.node("Shape", x, start=0, end=1)
        rows = graph.node("Concat", n, np.array([-1, taps], np.int64), axis=0)
        halves = [graph.node("Reshape", graph.node("MatMul", flat, floats(weights[:, k])), rows) for k in (0, 1)]
        near = graph.node("Gather", graph.node("Concat", *halves, axis=0), column, axis=1)
        near = graph.node("Transpose", graph.node("Mul", near, along), perm=[0, 2, 1])
        out = graph.node("MatMul", down, near)
        width = graph.node("Shape", column)
        out = graph.node("Reshape", out, graph.node("Concat", np.array([-1, 3], np.int64), width, axis=0))
        return Session(graph.model(graph.node("Gather", out, at, axis=0), 3))

    def _looked_up(self, low: tuple[int, int], size: tuple[int, int], rows: tuple[int, int]) -> lean_rows.Added:
        """See LeanLIFF._looked_up."""
        (row, dy), (column, dx) = (
            nearest(a, b, span) for a, b, span in zip(low, size, (rows, (0, size[1])), strict=True)
        )
        a, b = self._along(low, size, dy, dx)
        place, most = np.arange(*rows) - first(row, low[0], size[0]), -(-size[0] // low[0])
        colours, along = np.eye(3, dtype=np.float32)[:, :, None], np.tile(b, 3)

        def added(x: Array, begin: int, span: tuple[int, int]) -> Array:
            k = slice(span[0] - rows[0], span[1] - rows[0])
            at = (row[k] % 2 * len(x) + row[k] // 2 - begin) * most + place[k]
            down = np.zeros((2 * len(x) * most, 3, 3 * self._taps), np.float32)
            down[at] = (a[k, None, None] * colours).reshape(-1, 3, 3 * self._taps)
            return self._look_up(floats(x), column, along, down.reshape(2 * len(x), 3 * most, -1), at)

        return added
