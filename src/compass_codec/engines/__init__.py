"""What computes: PyTorch, on a CPU or a GPU, or ONNX Runtime, on a CPU and without PyTorch.

An engine is a room of its own that takes and gives arrays (networks/arrays.py); how pictures are cut into strips, the
walk through the context model, rounding, symbols and the container are the same code for all. Strips are [1, C, rows,
W], channels last in memory where that is faster.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compass_codec.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compass_codec.networks.arrays import Array
    from compass_codec.networks.order import Part, Step
    from compass_codec.networks.strips import Device

Apply = Callable[[Any], Any]  # of arrays


class Transforms(Protocol):
    """The transforms of a lean codec at one level: gains and norms are parts of weights. Each takes and gives strips;
    blocks take a row more above and one below."""

    @property
    def a8(self) -> Sequence[Apply]: ...
    @property
    def a16(self) -> Sequence[Apply]: ...
    @property
    def s16(self) -> Sequence[Apply]: ...
    @property
    def s8(self) -> Sequence[Apply]: ...

    def embed(self, x: Array) -> Array:
        """A centred picture [1, 3, H, W] to what a8 begins with; the last row and column are repeated up to a multiple
        of 8."""
        ...

    def down(self, f: Array) -> Array:
        """What a8 gives, of even rows and columns, to what a16 begins with."""
        ...

    def to_y(self, f: Array) -> Array:
        """What a16 gives to y, float32."""
        ...

    def from_y(self, y: Array) -> Array: ...

    def up(self, f: Array) -> Array: ...

    def out(self, f: Array) -> Array:
        """What s8 gives to pixels [1, 3, 8 rows, 8 W], float32."""
        ...


class Exact(Protocol):
    """The integer networks of a lean codec: integers, held as float32 unless said otherwise."""

    @property
    def up(self) -> Sequence[Apply]:
        """z, and then what the first block gives, to twice as many rows and columns."""
        ...

    @property
    def blocks(self) -> Sequence[Apply]: ...

    @property
    def context(self) -> Sequence[Apply]:
        """The block of each network of the context model; none without one."""
        ...

    def into(self, step: Step, known: Array, features: Array) -> Array:
        """Latents of a step's grid, 0 where not known, and features (int16) to what the block of the step begins
        with."""
        ...

    def scales_and_means(self, step: Step, part: Part, features: Array, hidden: Array | None) -> tuple[Array, Array]:
        """Features (int16) and hidden activations at the places of a part to scale indices (uint8) and means (float32)
        of the channels of that part."""
        ...


class HyperAnalysis(Protocol):
    """Strips of y to strips of z, float32, not rounded: ``first``, then each of ``blocks``, which take a row more above
    and one below, followed by that of ``down``, which takes even rows and columns."""

    @property
    def blocks(self) -> Sequence[Apply]: ...
    @property
    def down(self) -> Sequence[Apply]: ...

    def first(self, y: Array) -> Array: ...


class EntropyNetworks(Protocol):
    """The networks of an entropy model of lean."""

    m: int
    n: int
    entropy: str

    @property
    def exact(self) -> Exact | None:
        """None without hyper networks."""
        ...

    @property
    def hyper(self) -> HyperAnalysis: ...


class LeanNetworks(EntropyNetworks, Protocol):
    """The networks of a lean codec."""

    def at(self, lam: float) -> Transforms:
        """The transforms at a Lagrangian multiplier."""
        ...


class MeanScaleNetworks(Protocol):
    """The networks of a mean-scale hyperprior codec, with layer-wise padding at odd sizes; arrays are [1, C, H, W]."""

    m: int
    n: int

    def analysis(self, x: Array, lam: float) -> Array:
        """A layer less its prediction to y [1, M, ceil(H/16), ceil(W/16)] at a Lagrangian multiplier."""
        ...

    def synthesis(self, y: Array, lam: float, size: tuple[int, int]) -> Array:
        """The quantised latent to what is added to the prediction of a layer of ``size``."""
        ...

    def hyper_analysis(self, y: Array) -> Array:
        """y to z [1, N, ceil(h/4), ceil(w/4)], not rounded."""
        ...

    def scales_and_means(self, z: Array, size: tuple[int, int]) -> tuple[Array, Array]:
        """Integers z to scale indices (integers of any type) and means (float32) [1, M, *size], in integers."""
        ...


class Predictor(Protocol):
    """Predicts a layer from the one below it, at any ratio of their sizes of at least 1."""

    def rows(self, low: Array, size: tuple[int, int], rows: tuple[int, int]) -> Array:
        """Rows ``rows`` (first, last + 1) of the prediction of a layer of ``size`` from the layer below, uint8
        [1, 3, height, width]: float32 [1, 3, rows, width] in about 0..1."""
        ...


class Engine(Protocol):
    name: str

    @property
    def device(self) -> Device: ...

    def parse(self, data: bytes) -> dict[str, Any]:
        """A safetensors file to its tensors. Raises any exception for what is no such file."""
        ...

    def array(self, x: NDArray[Any]) -> Array: ...

    def lean(self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str) -> LeanNetworks:
        """Raises KeyError, ValueError, TypeError or RuntimeError where something is missing or does not fit."""
        ...

    def lean_entropy(self, dimensions: dict[str, Any], tensors: dict[str, Any]) -> EntropyNetworks:
        """The same of an entropy model alone."""
        ...

    def lean_liff(self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str) -> Predictor:
        """The same of a predictor."""
        ...

    def mean_scale(self, tensors: dict[str, Any], precision: str) -> MeanScaleNetworks:
        """The same of a mean-scale codec, whose tensors say its dimensions. ``precision`` is that of analysis and
        synthesis."""
        ...

    def liff(self, tensors: dict[str, Any], precision: str) -> Predictor:
        """The same of the paper's predictor."""
        ...

    def computing(self) -> AbstractContextManager[Any]:
        """What encoding and decoding happen in."""
        ...


ENGINES = ("auto", "torch", "onnx")
LIBRARIES = {"torch": "torch", "onnx": "onnxruntime"}
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, under Windows
LIGHT_BACKBONES = ("lean", "mean_scale")  # that ONNX Runtime computes
INSTALL = {"torch": "PyTorch: pip install torch", "onnx": "ONNX Runtime: pip install onnxruntime"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[name]) is not None


def may_have_gpu() -> bool:
    """False where there is certainly no GPU for PyTorch, which then need not be loaded to hear so."""
    drivers = sys.platform != "linux" or any(Path(path).exists() for path in GPU_DRIVERS)
    return drivers and installed("torch")


def choose(asked: str, backbone: str, device: str = "auto", precision: str = "auto") -> str:
    """The engine, "torch" or "onnx", for a backbone: ``asked``, or with "auto" ONNX Runtime where it can do all that is
    wanted, as it starts in a fifth of the time, and PyTorch elsewhere. Raises OptionError if that is not installed, or
    cannot do it."""
    if asked not in ENGINES:
        raise OptionError(f"engine {asked!r}; there are {', '.join(ENGINES)}")
    if asked == "torch":
        why = "--engine torch"
    elif backbone not in LIGHT_BACKBONES:
        why = f"the backbone {backbone}"
    elif precision not in ("auto", "float32"):
        why = f"--precision {precision}"
    elif device not in ("auto", "cpu"):
        why = f"--device {device}"
    elif asked == "auto" and device == "auto" and may_have_gpu():
        why = "a GPU"
    else:
        why = ""
    if why and asked == "onnx":
        raise OptionError(f"--engine onnx has no {why.removeprefix('the ')}; --engine torch has")
    if not why and installed("onnx"):
        return "onnx"
    if installed("torch") and asked != "onnx":
        return "torch"
    if why or asked == "onnx":
        raise OptionError(f"{why or '--engine onnx'} needs {INSTALL['torch' if why else 'onnx']}")
    raise OptionError(f"nothing to compute with is installed: {INSTALL['onnx']} (or {INSTALL['torch']})")


def make(name: str, device: str) -> Engine:
    """The engine on a device, as "cpu" or "cuda:1"."""
    if name == "onnx":
        from compass_codec.engines.onnx_engine import OnnxEngine

        return OnnxEngine()
    import torch

    from compass_codec.engines.torch_engine import TorchEngine

    return TorchEngine(torch.device(device))
