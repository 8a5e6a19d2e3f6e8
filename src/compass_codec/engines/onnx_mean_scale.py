"""The networks of the backbone "mean_scale" in ONNX Runtime: a graph for each transform, channels first, as ONNX
Runtime brings convolutions into its own layout. Sizes at odd sides are inputs, so that a graph takes any picture."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise

import numpy as np

from compass_codec.engines.graphs import Graph
from compass_codec.engines.onnx_session import Array, Cpu, Session, Tensors, apart, check_shapes, floats, gain
from compass_codec.networks import liff_rows
from compass_codec.networks.mean_scale_numbers import (
    ACTIVATION_BITS,
    BETA_LEAST,
    CLAMP,
    LAMBDAS,
    LEAK,
    PEDESTAL,
    WEIGHT_BITS,
    integers,
    scale_bounds,
    stages,
)

Shapes = dict[str, tuple[int, ...]]
ROWS_AND_COLUMNS, FROM_ZERO = np.array([2, 3], np.int64), np.array([0, 0], np.int64)


def _shapes(m: int, n: int) -> Shapes:
    """Of the tensors of an ImageCodec."""
    found: Shapes = {"log_gain": (len(LAMBDAS), m), "log_inv_gain": (len(LAMBDAS), m)}
    up = {"g_s": (m, n, n, n, 3), "h_s": (n, m, m * 3 // 2, 2 * m)}
    for group, channels in ({"g_a": (3, n, n, n, m), "h_a": (m, n, n, n)} | up).items():
        for i, (a, b) in enumerate(pairwise(channels)):
            side = 3 if (group, i) in (("h_a", 0), ("h_s", 2)) else 5
            first = (a, b) if group in up and side == 5 else (b, a)  # of a transposed convolution
            found |= {f"{group}.{2 * i}.weight": (*first, side, side), f"{group}.{2 * i}.bias": (b,)}
            if group.startswith("g") and i < 3:
                found |= {f"{group}.{2 * i + 1}.beta": (n,), f"{group}.{2 * i + 1}.gamma": (n, n)}
    return found


def _by_places(weight: Array) -> Array:
    """Weights [in, out, 5, 5] of a transposed convolution with stride 2 as those [4 * out, in, 3, 3] of a convolution
    with stride 1, whose outputs are the rows and columns of a 2x2 square, and channels."""
    found = np.zeros((2, 2, weight.shape[1], weight.shape[0], 3, 3), weight.dtype)
    # even rows take taps 4, 2 and 0 of three neighbours, odd rows 3 and 1 of the last two; columns alike
    for row, rows in enumerate((weight[:, :, ::-2], weight[:, :, 3::-2])):
        for column, taps in enumerate((rows[..., ::-2], rows[..., 3::-2])):
            found[row, column, ..., row:, column:] = taps.swapaxes(0, 1)
    return found.reshape(-1, *found.shape[3:])


def _conv(graph: Graph, x: str, weight: Array, bias: Array | None, stride: int = 1, pad: bool = True) -> str:
    side = weight.shape[2]
    more, pads = [] if bias is None else [floats(bias)], [side // 2 if pad else 0] * 4
    return graph.node("Conv", x, floats(weight), *more, kernel_shape=[side, side], strides=[stride, stride], pads=pads)


class OnnxMeanScale:
    """See engines.MeanScaleNetworks."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.n, self.m = tensors, len(tensors["g_a.0.bias"]), len(tensors["g_a.6.bias"])
        check_shapes(tensors, _shapes(self.m, self.n))
        self._hyper_decoder = HyperDecoder(tensors)

    def _get(self, name: str) -> Array:
        return floats(self._tensors[name])

    def _gain(self, name: str, lam: float) -> Array:
        level = np.interp(math.log(lam), np.log(LAMBDAS), np.arange(len(LAMBDAS)))
        return gain(self._get(name), float(level))[:, None, None]

    def _layer(self, name: str) -> tuple[Array, Array]:
        return self._get(f"{name}.weight"), self._get(f"{name}.bias")

    def _gdn(self, graph: Graph, x: str, name: str, inverse: bool = False) -> str:
        """See mean_scale.GDN."""
        beta = np.maximum(self._get(f"{name}.beta"), (BETA_LEAST + PEDESTAL) ** 0.5) ** 2 - PEDESTAL
        gamma = np.maximum(self._get(f"{name}.gamma"), PEDESTAL**0.5) ** 2 - PEDESTAL
        root = graph.node("Sqrt", _conv(graph, graph.node("Mul", x, x), gamma[:, :, None, None], beta))
        return graph.node("Mul" if inverse else "Div", x, root)

    def _down(self, graph: Graph, x: str, name: str) -> str:
        """A convolution with stride 2, before which the input ``pads`` of the graph makes sides even."""
        return _conv(graph, graph.node("Pad", x, graph.input(1, "int64"), mode="edge"), *self._layer(name), stride=2)

    @cached_property
    def _analysis(self) -> Session:
        graph = Graph()
        x = graph.input(4)
        for i in range(0, 8, 2):
            x = self._down(graph, x, f"g_a.{i}")
            x = self._gdn(graph, x, f"g_a.{i + 1}") if i < 6 else x
        return Session(graph.model(x, 4))

    def analysis(self, x: Array, lam: float) -> Array:
        y = self._analysis(floats(x), *_pads(x, 4))
        y *= self._gain("log_gain", lam)
        return y

    @cached_property
    def _hyper_analysis(self) -> Session:
        graph = Graph()
        x = _conv(graph, graph.input(4), *self._layer("h_a.0"))
        for i in (2, 4):
            x = self._down(graph, graph.node("LeakyRelu", x, alpha=LEAK), f"h_a.{i}")
        return Session(graph.model(x, 4))

    def hyper_analysis(self, y: Array) -> Array:
        return self._hyper_analysis(floats(y), *_pads(y, 2))

    @cached_property
    def _synthesis(self) -> Session:
        graph = Graph()
        x = graph.input(4)
        for i in range(0, 8, 2):
            weight, bias = self._layer(f"g_s.{i}")
            x = graph.node("DepthToSpace", _conv(graph, x, _by_places(weight), np.tile(bias, 4)), blocksize=2)
            x = graph.node("Slice", x, FROM_ZERO, graph.input(1, "int64"), ROWS_AND_COLUMNS)
            x = self._gdn(graph, x, f"g_s.{i + 1}", inverse=True) if i < 6 else x
        return Session(graph.model(x, 4))

    def synthesis(self, y: Array, lam: float, size: tuple[int, int]) -> Array:
        sizes = [np.array(each, np.int64) for each in stages(size, 4)[3::-1]]
        return self._synthesis(floats(y * self._gain("log_inv_gain", lam)), *sizes)

    def scales_and_means(self, z: Array, size: tuple[int, int]) -> tuple[Array, Array]:
        return self._hyper_decoder(z, size)


def _pads(x: Array, count: int) -> list[Array]:
    """What makes the sides of ``x`` even before each of ``count`` halvings."""
    sizes = stages((x.shape[2], x.shape[3]), count)[:-1]
    return [np.array([0, 0, 0, 0, 0, 0, h % 2, w % 2], np.int64) for h, w in sizes]


class HyperDecoder:
    """See hyper.HyperDecoder: integers in float64, whose sums of products are exact in any order."""

    def __init__(self, tensors: Tensors) -> None:
        self._layers, self._bounds = [], scale_bounds()
        for i in (0, 2, 4):
            up = i < 4
            weight, bias = integers(tensors[f"h_s.{i}.weight"], tensors[f"h_s.{i}.bias"], up)
            if up:
                weight, bias = _by_places(weight), np.tile(bias, 4)
            self._layers.append((weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)), bias))

    @cached_property
    def _matmul(self) -> Session:
        graph = Graph()
        product = graph.node("MatMul", graph.input(2, "float64"), graph.input(2, "float64"))
        return Session(graph.model(product, 2, kind="float64"))

    def __call__(self, z: Array, size: tuple[int, int]) -> tuple[Array, Array]:
        x = z[0].transpose(1, 2, 0) * 2.0**ACTIVATION_BITS
        sizes = [*stages(size, 2)[1::-1], None]
        for (weight, bias), cropped in zip(self._layers, sizes, strict=True):
            rows, width, _ = x.shape
            sums = self._matmul(_neighbours(x.clip(-CLAMP, CLAMP)), weight)
            x = np.floor((sums + bias) * 2.0**-WEIGHT_BITS + 0.5).reshape(rows, width, -1)
            if cropped:
                x = apart(x, 2)[: cropped[0], : cropped[1]]
                x = np.maximum(x, np.floor(x * LEAK))
        scales, means = np.split(x.clip(-CLAMP, CLAMP).transpose(2, 0, 1)[None], 2, 1)
        return np.searchsorted(self._bounds, scales), floats(means * 2.0**-ACTIVATION_BITS)


def _neighbours(x: Array) -> Array:
    """[rows, W, C], with zeros around, to the 3x3 places around each: float64 [rows * W, 9 * C]."""
    rows, width, channels = x.shape
    padded, found = np.pad(x, ((1, 1), (1, 1), (0, 0))), np.empty((rows, width, 9, channels))
    for k in range(9):
        found[:, :, k] = padded[k // 3 : k // 3 + rows, k % 3 : k % 3 + width]
    return found.reshape(rows * width, -1)


class OnnxLIFF:
    """See liff_rows.Parts."""

    device = Cpu()

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self._sizes = tensors, liff_rows.dimensions(tensors)
        c, n, depth, growth, blocks, convs = self._sizes.values()
        self._channels, self._hidden, self._depth = c, n, depth
        self.reach = 3 + blocks * convs
        shapes: Shapes = {}

        def layer(name: str, out: int, *size: int) -> None:
            shapes.update({f"{name}.weight": (out, *size), f"{name}.bias": (out,)})

        layer("extractor.first", c, 3, 3, 3)
        layer("extractor.second", c, c, 3, 3)
        layer("extractor.fuse.0", c, blocks * c, 1, 1)
        layer("extractor.fuse.1", c, c, 3, 3)
        for k in range(blocks):
            layer(f"extractor.blocks.{k}.fuse", c, c + convs * growth, 1, 1)
            for i in range(convs):
                layer(f"extractor.blocks.{k}.convs.{i}", growth, c + i * growth, 3, 3)
        layer("mlp_first", n, 9 * c + 4)
        for k in range(depth - 1):
            layer(f"mlp_hidden.{k}", n, n)
        layer("mlp_last", 27 * c, n)
        check_shapes(tensors, shapes)

    def rows(self, low: Array, size: tuple[int, int], rows: tuple[int, int]) -> Array:
        """See engines.Predictor."""
        found: Array = liff_rows.predict(self, low, size, rows)
        return found

    def array(self, x: Array) -> Array:
        return x

    def _get(self, name: str) -> Array:
        return floats(self._tensors[name])

    @cached_property
    def _interpolated(self) -> Session:
        graph = Graph()
        down, x, across = graph.input(2), graph.input(4), graph.input(2)
        return Session(graph.model(graph.node("MatMul", graph.node("MatMul", down, x), across), 4))

    def interpolated(self, down: Array, x: Array, across: Array) -> Array:
        return self._interpolated(*map(floats, (down, x, across)))

    @cached_property
    def _maps(self) -> Session:
        """The features of x, centred on zero, from a first row and column to a last, with zeros around the picture; and
        maps of these, channels last, with a bias."""
        graph, parts = Graph(), self._sizes
        c, n = self._channels, self._hidden

        def conv(x: str, name: str) -> str:
            return _conv(graph, x, self._get(f"extractor.{name}.weight"), self._get(f"extractor.{name}.bias"))

        x, first, last, bias = graph.input(4), graph.input(1, "int64"), graph.input(1, "int64"), graph.input(1)
        shallow = conv(x, "first")
        x, features = conv(shallow, "second"), []
        for k in range(parts["blocks"]):
            seen = [x]
            for i in range(parts["convs"]):
                whole = graph.node("Concat", *seen, axis=1) if i else x
                seen.append(graph.node("Relu", conv(whole, f"blocks.{k}.convs.{i}")))
            x = graph.node("Add", conv(graph.node("Concat", *seen, axis=1), f"blocks.{k}.fuse"), x)
            features.append(x)
        x = graph.node("Add", conv(conv(graph.node("Concat", *features, axis=1), "fuse.0"), "fuse.1"), shallow)
        x = graph.node("Pad", x, np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        x = graph.node("Slice", x, first, last, ROWS_AND_COLUMNS)
        # as LIFF.maps has them
        a = self._get("mlp_first.weight")[:, : c * 9].reshape(n, c, 3, 3)
        g = self._get("mlp_last.weight").reshape(c, 9, 3, n).transpose(2, 3, 0, 1).reshape(3 * n, c, 3, 3)
        b = self._get("mlp_last.bias").reshape(c, 9, 3).transpose(2, 0, 1).reshape(3, c, 3, 3)
        x = _conv(graph, x, np.concatenate([a, g, b]), None, pad=False)
        return Session(graph.model(graph.node("Add", graph.node("Transpose", x, perm=[0, 2, 3, 1]), bias), 4))

    def maps(self, x: Array, rows: liff_rows.Span, columns: liff_rows.Span, cell: tuple[float, float]) -> Array:
        bias = self._get("mlp_first.bias") + self._get("mlp_first.weight")[:, -2:] @ np.array(cell, np.float32)
        first, last = (np.array([rows[k] + 2 * k, columns[k] + 2 * k], np.int64) for k in (0, 1))
        return self._maps(floats(x - np.float32(0.5)), first, last, np.pad(bias, (0, 3 * self._hidden + 3)))

    @cached_property
    def _query(self) -> Session:
        """Maps [h * w, 4 * hidden + 3], for each target pixel its place and offsets [N, 2] to the picture [N, 3]."""
        graph, c, n = Graph(), self._channels, self._hidden
        maps, place, offsets = graph.input(2), graph.input(1, "int64"), graph.input(2)
        near = graph.node("Gather", maps, place, axis=0)

        def part(first: int, last: int) -> str:
            return graph.node("Slice", near, *(np.array([k], np.int64) for k in (first, last, 1)))

        h = graph.node("Gemm", offsets, floats(self._get("mlp_first.weight")[:, 9 * c : 9 * c + 2].T), part(0, n))
        h = graph.node("Relu", h)
        for k in range(self._depth - 1):
            weight, bias = self._get(f"mlp_hidden.{k}.weight"), self._get(f"mlp_hidden.{k}.bias")
            h = graph.node("Relu", graph.node("Gemm", h, weight, bias, transB=1))
        filters = graph.node("Reshape", part(n, 4 * n), np.array([-1, 3, n], np.int64))
        h = graph.node("Mul", filters, graph.node("Unsqueeze", h, np.array([1], np.int64)))
        summed = graph.node("ReduceSum", h, np.array([2], np.int64), keepdims=0)
        return Session(graph.model(graph.node("Add", summed, part(4 * n, 4 * n + 3)), 2))

    def query(self, maps: Array, row: Array, column: Array, dy: Array, dx: Array) -> Array:
        place = (row[:, None] * maps.shape[2] + column).ravel()
        offsets = np.stack(np.broadcast_arrays(dy[:, None], dx), 2).reshape(-1, 2)
        return self._query(maps[0].reshape(-1, maps.shape[3]), place, offsets).reshape(1, len(row), len(column), 3)
