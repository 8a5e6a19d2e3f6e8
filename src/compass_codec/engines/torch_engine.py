"""PyTorch as an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compass_codec.engines import threads
from compass_codec.entropy import LEVELS
from compass_codec.networks import mean_scale_numbers
from compass_codec.networks.arrays import to_device
from compass_codec.networks.exact import Block, Conv
from compass_codec.networks.hyper import HyperDecoder
from compass_codec.networks.lean import EntropyModel, LeanCodec, eighth
from compass_codec.networks.lean_liff import LeanLIFF
from compass_codec.networks.liff import LIFF
from compass_codec.networks.liff_rows import dimensions
from compass_codec.networks.mean_scale import ImageCodec
from compass_codec.networks.numbers import (
    ACTIVATION,
    EPSILON,
    FINE,
    INTEGERS,
    LAMBDAS,
    MEAN_LIMIT,
    MEAN_UNIT,
    STEPS,
    UNSHUFFLE,
    entropy_model,
)
from compass_codec.networks.order import Part, Step
from compass_codec.networks.rates import gain, level_of

N = TypeVar("N", bound=nn.Module)


class TorchEngine:
    """See engines.Engine."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        # PyTorch hears of this with its first tensor. Large arrays come from the system anew each time; in pages of
        # 4 KB that alone takes a tenth of a picture's time.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        self.device = device
        if threads.count is not None:
            torch.set_num_threads(threads.count)

    def parse(self, data: bytes) -> dict[str, Tensor]:
        from safetensors.torch import load

        found: dict[str, Tensor] = load(data)
        return found

    def array(self, x: NDArray[Any]) -> Tensor:
        return to_device(x, self.device)

    def lean(
        self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str, kind: type[LeanCodec] = LeanCodec
    ) -> TorchLean:
        codec = fill(lambda: kind(**dimensions), tensors, self.device)
        return TorchLean(codec, self._exact(codec, tensors), getattr(torch, precision))

    def lean_entropy(self, dimensions: dict[str, Any], tensors: dict[str, Any]) -> TorchEntropy:
        codec = fill(lambda: EntropyModel(**dimensions), tensors, self.device)
        return TorchEntropy(codec, self._exact(codec, tensors))

    def _exact(self, codec: EntropyModel, tensors: dict[str, Any]) -> TorchExact | None:
        exact = {name.removeprefix(INTEGERS): value for name, value in tensors.items() if name.startswith(INTEGERS)}
        model = entropy_model(codec.entropy)
        return TorchExact(exact, codec.m, self.device, model.networks) if model.hyper else None

    def lean_liff(self, dimensions: dict[str, Any], tensors: dict[str, Any], precision: str) -> LeanLIFF:
        return fill(lambda: LeanLIFF(**dimensions), tensors, self.device).to(getattr(torch, precision))

    def mean_scale(self, tensors: dict[str, Any], precision: str) -> TorchMeanScale:
        codec = fill(lambda: ImageCodec.like(tensors), tensors, self.device)
        hyper = HyperDecoder(codec).to(self.device)
        codec.pixels_in(getattr(torch, precision))
        return TorchMeanScale(codec, hyper)

    def liff(self, tensors: dict[str, Any], precision: str) -> LIFF:
        return fill(lambda: LIFF(**dimensions(tensors)), tensors, self.device).to(getattr(torch, precision))

    @contextmanager
    def computing(self) -> Iterator[None]:
        # not TF32, whose 10 bits show in the pixels; nothing changes on a CPU
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield


def fill(make: Callable[[], N], tensors: dict[str, Tensor], device: torch.device) -> N:
    """The network that ``make`` makes, holding ``tensors``, without ever drawing random weights."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict({k: tensors[k].float() for k in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    return network.to(device).to(memory_format=torch.channels_last)


class TorchEntropy:
    """See engines.EntropyNetworks."""

    def __init__(self, codec: EntropyModel, exact: TorchExact | None) -> None:
        self.codec, self.exact, self.m, self.n, self.entropy = codec, exact, codec.m, codec.n, codec.entropy

    @property
    def hyper(self) -> TorchHyper:
        return TorchHyper(self.codec)


class TorchLean(TorchEntropy):
    """See engines.LeanNetworks. Transforms compute in ``kind``."""

    codec: LeanCodec

    def __init__(self, codec: LeanCodec, exact: TorchExact | None, kind: torch.dtype) -> None:
        super().__init__(codec, exact)
        self.kind = kind

    def at(self, lam: float) -> TorchTransforms:
        level = level_of(lam, LAMBDAS)[None].float().to(self.codec.log_gain.device)
        return TorchTransforms(self.codec, level, self.kind)


class TorchHyper:
    """See engines.HyperAnalysis."""

    def __init__(self, codec: EntropyModel) -> None:
        first, *self.down = codec.h_a
        self.blocks = [self._block(block) for block in codec.h_a_blocks]
        self.first = lambda y: F.relu(first(y * codec.y_scale[:, None, None]))

    @staticmethod
    def _block(block: Any) -> Callable[[Tensor], Tensor]:
        """A PlainBlock on [1, C, rows + 2, W] to [1, C, rows, W]."""
        dw = block.dw

        def apply(x: Tensor) -> Tensor:
            h = F.conv2d(x, dw.weight, dw.bias, padding=(0, 1), groups=dw.groups)
            added: Tensor = block.p2(F.relu(block.p1(h)))
            return added.add_(x[:, :, 1:-1])

        return apply


class TorchMeanScale:
    """See engines.MeanScaleNetworks."""

    def __init__(self, codec: ImageCodec, hyper: HyperDecoder) -> None:
        self.codec, self.hyper, self.m, self.n = codec, hyper, codec.m, codec.n

    def _level(self, lam: float) -> Tensor:
        return level_of(lam, mean_scale_numbers.LAMBDAS)[None].to(self.codec.log_gain.device, non_blocking=True)

    def analysis(self, x: Tensor, lam: float) -> Tensor:
        return self.codec.analysis(x, self._level(lam))

    def synthesis(self, y: Tensor, lam: float, size: tuple[int, int]) -> Tensor:
        return self.codec.synthesis(y, self._level(lam), size)

    def hyper_analysis(self, y: Tensor) -> Tensor:
        return self.codec.hyper_analysis(y)

    def scales_and_means(self, z: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.hyper(z, size)
        return found


class TorchTransforms:
    """See engines.Transforms; those of a LeanCodec at one level. Strips are channels last."""

    def __init__(self, codec: LeanCodec, level: Tensor, kind: torch.dtype) -> None:
        self.codec, self.level, self.kind = codec, level, kind
        self.gain, self.inverse = gain(codec.log_gain, level), gain(codec.log_inv_gain, level)
        self.a8, self.a16, self.s16, self.s8 = (
            [_block(block, level, kind) for block in blocks] for blocks in (codec.a8, codec.a16, codec.s16, codec.s8)
        )
        names = ("embed", "down", "to_y", "from_y", "up", "out")
        self._layers = {name: self._linear(getattr(codec, name)) for name in names}

    def _linear(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> Callable[[Tensor], Tensor]:
        weight, bias = layer.weight.to(self.kind), None if layer.bias is None else layer.bias.to(self.kind)
        apply = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
        return lambda x: apply(x, weight, bias, stride=layer.stride)

    def embed(self, x: Tensor) -> Tensor:
        return self._layers["embed"](eighth(x).to(self.kind, memory_format=torch.channels_last))

    def down(self, f: Tensor) -> Tensor:
        return self._layers["down"](f)

    def to_y(self, f: Tensor) -> Tensor:
        return self._layers["to_y"](f).float().mul_(self.gain)

    def from_y(self, y: Tensor) -> Tensor:
        return self._layers["from_y"]((y * self.inverse).to(self.kind, memory_format=torch.channels_last))

    def up(self, f: Tensor) -> Tensor:
        return self._layers["up"](f)

    def out(self, f: Tensor) -> Tensor:
        return F.pixel_shuffle(self._layers["out"](f).float(), UNSHUFFLE)


def _block(block: Any, level: Tensor, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A GatedBlock on [1, C, rows + 2, W] to [1, C, rows, W]."""
    c = len(block.norm)
    dw, p1, p2 = block.dw, block.p1, block.p2
    first = (p1.weight[..., 0, 0] * block.norm).to(kind)
    last = (p2.weight[..., 0, 0] * gain(block.log_gain, level).view(-1)).to(kind)
    biases = [layer.bias.to(kind) for layer in (dw, p1, p2) if layer.bias is not None]
    taps = dw.weight.to(kind, memory_format=torch.channels_last)

    def apply(x: Tensor) -> Tensor:
        h = F.conv2d(x, taps, biases[0], padding=(0, 1), groups=c).permute(0, 2, 3, 1)
        norm = h.float().square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
        a, b = F.linear(h.mul_(norm.to(kind)), first, biases[1]).chunk(2, -1)
        gated = F.silu(a).mul_(b)
        return F.linear(gated, last, biases[2]).add_(x[:, :, 1:-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return apply


class TorchExact:
    """See engines.Exact."""

    def __init__(self, tensors: Mapping[str, Tensor], m: int, device: torch.device, networks: int = STEPS - 1) -> None:
        self.tensors, self.m, context = tensors, m, range(networks)
        self.up = [self._doubled(Conv(tensors, f"up.{k}", 0, ACTIVATION).to(device)) for k in range(2)]
        self.blocks = [Block(tensors, f"block.{k}").to(device) for k in range(2)]
        self.first = Conv(tensors, "first").to(device)
        self._into = [Conv(tensors, f"into.{k}", 0, ACTIVATION).to(device) for k in context]
        self.context = [Block(tensors, f"context.{k}").to(device) for k in context]
        self.more = [Conv(tensors, f"more.{k}").to(device) for k in context]
        if networks:
            self.known = tensors["known"].float()[:, None, None].to(device)

    @staticmethod
    def _doubled(up: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: F.pixel_shuffle(up(x), 2)

    def into(self, step: Step, known: Tensor, features: Tensor) -> Tensor:
        known = (known * self.known).add_(0.5).floor_().clamp_(-ACTIVATION, ACTIVATION)
        seen = [*step.marked(known, ACTIVATION), features.float()]
        found: Tensor = self._into[step.network](torch.cat(seen, 1))
        return found

    def scales_and_means(
        self, step: Step, part: Part, features: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first, last, f = part.channels.start, part.channels.stop, features.float()
        scales, means = (self.first(f, slice(k * self.m + first, k * self.m + last)) for k in (0, 1))
        if hidden is not None:
            more = self.more[step.network](hidden.float(), part.outputs).chunk(2, 1)
            scales, means = (a.add_(b) for a, b in zip((scales, means), more, strict=True))
        index = scales.mul_(1 / FINE).floor_().clamp_(0, LEVELS - 1).to(torch.uint8)
        return index, means.clamp_(-MEAN_LIMIT, MEAN_LIMIT).mul_(1 / MEAN_UNIT)
