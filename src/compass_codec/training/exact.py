"""Integer twins of trained networks: units of activations from pictures, and weights packed for exact.Conv."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compass_codec.entropy import LEVELS, SCALE_RANGE
from compass_codec.networks.exact import pack
from compass_codec.networks.lean import EntropyModel, PlainBlock
from compass_codec.networks.numbers import ACTIVATION, FACTORIZED, FINE, INTEGERS, LAMBDAS, MEAN_UNIT

KEPT = 0.9999  # of an activation's values lie within its range; the rest is clamped
SCALE_STEP = math.log(SCALE_RANGE[1] / SCALE_RANGE[0]) / (LEVELS - 1)


class Ranges:
    """Magnitudes within which nearly all values of an activation lie, gathered from several pictures."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)

    def see(self, name: str, x: Tensor) -> None:
        flat = x.detach().abs().flatten()
        self.found[name].append(float(flat.kthvalue(max(1, math.ceil(KEPT * len(flat)))).values))

    def unit(self, name: str) -> float:
        """What an integer of the activation stands for."""
        return max(1e-6, *self.found[name], 0.0) / ACTIVATION


FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)  # of the enhancement layers that activations are measured on
SHARE = 2  # crops of each lambda


@torch.no_grad()
def of_part(stage: Any, part: str) -> dict[str, Tensor]:
    """The integer tensors of the codec ``part`` of a LeanStage, measured on the crops that it started with. There are
    none without hyper networks."""
    if getattr(stage, part).codec.entropy == FACTORIZED:
        return {}
    if (x := stage.crops) is None:
        raise ValueError("no pictures to measure activations on, so these weights are not exported")
    x = x.to(stage.base.codec.y_scale.device)
    mode, latents = stage.training, []
    stage.eval()
    for k in range(len(LAMBDAS)):
        crops = x[torch.arange(SHARE * k, SHARE * (k + 1)) % len(x)]
        latents.append(stage.latents(part, crops, crops.new_full((SHARE,), float(k)), FACTORS[k % len(FACTORS)]))
    # on the CPU, where the units are
    found = integers(copy.deepcopy(getattr(stage, part).codec).cpu(), [y.float().cpu() for y in latents])
    stage.train(mode)
    return {f"{INTEGERS}{name}": value for name, value in found.items()}


@torch.no_grad()
def integers(codec: EntropyModel, latents: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbones.lean.Entropy for ``codec``, whose activations are measured on ``latents``: y
    [B, M, h, w] of pictures at all rates."""
    ranges, known = Ranges(), torch.full((codec.m,), 1e-3)
    hooks = [hook for name, block in _blocks(codec) for hook in _watch(ranges, name, block)]
    for y in latents:
        z = codec.hyper_analysis(y).round()
        features = codec.hyper_synthesis(z, (y.shape[-2], y.shape[-1]))

        def code(step: int, log_scales: Tensor, means: Tensor, part: tuple[slice, ...], y: Tensor = y) -> Tensor:
            return (y[part] - means).round() + means

        y_hat = codec.walk(features, code)
        each = (y_hat * codec.y_scale[:, None, None]).abs().transpose(0, 1).flatten(1)
        known = torch.maximum(known, each.kthvalue(math.ceil(0.999 * each.shape[1]), 1).values)
    for hook in hooks:
        hook.remove()
    return _pack(codec, ranges, known / ACTIVATION)


def _blocks(codec: EntropyModel) -> list[tuple[str, Any]]:
    return [(f"block.{k}", b) for k, b in enumerate(codec.h_s_blocks)] + [
        (f"context.{k}", b) for k, b in enumerate(codec.context.blocks if codec.context else ())
    ]


def _watch(ranges: Ranges, name: str, block: PlainBlock) -> list[Any]:
    def stream(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        ranges.see(name, inputs[0])
        ranges.see(name, output)

    def inner(part: str) -> Callable[..., None]:
        return lambda module, inputs, output: ranges.see(f"{name}.{part}", output.relu() if part == "p1" else output)

    return [
        block.register_forward_hook(stream),
        block.dw.register_forward_hook(inner("dw")),
        block.p1.register_forward_hook(inner("p1")),
    ]


def _pack(codec: Any, ranges: Ranges, known: Tensor) -> dict[str, Tensor]:
    """``known``: units of the known latents [M], already multiplied by y_scale."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor, bias: Tensor, unit_in: Tensor | float, unit_out: Tensor | float) -> None:
        tensors.update({f"{name}.{key}": value for key, value in pack(weight, bias, unit_in, unit_out).items()})

    for name, block in _blocks(codec):
        put(f"{name}.dw", block.dw.weight, block.dw.bias, ranges.unit(name), ranges.unit(f"{name}.dw"))
        put(f"{name}.p1", block.p1.weight, block.p1.bias, ranges.unit(f"{name}.dw"), ranges.unit(f"{name}.p1"))
        put(f"{name}.p2", block.p2.weight, block.p2.bias, ranges.unit(f"{name}.p1"), ranges.unit(name))
    unit: float = 1.0
    for k, up in enumerate(codec.h_s):  # as 1x1 convolutions, of which pixel_shuffle makes rows and columns
        weight = up.weight.permute(1, 2, 3, 0).reshape(-1, up.weight.shape[0], 1, 1)
        put(f"up.{k}", weight, up.bias.repeat_interleave(4), unit, unit := ranges.unit(f"block.{k}"))
    m = codec.m
    scale_units, mean_units = torch.full((m,), SCALE_STEP / FINE), codec.y_scale / MEAN_UNIT
    # log scales as indices: the lowest is 0, and half a level rounds to the nearest
    offset = torch.cat([torch.full((m,), SCALE_STEP / 2 - math.log(SCALE_RANGE[0])), torch.zeros(m)])
    put("first", codec.h_p.weight, codec.h_p.bias + offset, unit, torch.cat([scale_units, mean_units]))
    if (model := codec.context) is None:
        return tensors
    tensors["known"] = codec.y_scale / known
    for k, (seen, features, out) in enumerate(zip(model.known, model.features, model.out, strict=True)):
        marks, rows = seen.weight.shape[1] - m, torch.zeros(2 * m)
        units = [known, torch.full((marks,), 1 / ACTIVATION), torch.full((features.weight.shape[1],), unit)]
        weight = torch.cat([seen.weight, features.weight], 1)
        put(f"into.{k}", weight, features.bias, torch.cat(units), ranges.unit(f"context.{k}"))
        for part in (part for step in codec.order if step.context and step.network == k for part in step.parts):
            rows[part.outputs] = torch.cat([scale_units[part.channels], mean_units[part.channels]])
        put(f"more.{k}", out.weight, out.bias, ranges.unit(f"context.{k}"), rows)
    return tensors
