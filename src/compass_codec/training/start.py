"""What training starts from when it has no weights: a block transform, which codes pictures before the first step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks.mean_scale import GDN, ImageCodec
from compass_codec.networks.mean_scale_numbers import LAMBDAS, PEDESTAL

# Orthonormal luma/chroma mix and 2x2 Haar packet: rows are basis vectors.
MIX = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
MIX = MIX / MIX.norm(dim=1, keepdim=True)
HAAR = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).reshape(4, 2, 2)

STEP = 7.0  # scale of y: a quantisation step of 1 then suits LAMBDA_0
LAMBDA_0 = 0.013  # whose cost counts once in a loss
GAMMA = 0.002  # GDN's diagonal: nearly linear over the range of the block transform
NOISE = 0.005  # standard deviation of the weights that the transform leaves free


@torch.no_grad()
def block_transform(codec: ImageCodec, crops: Tensor, seed: int = 0) -> None:
    """Make ``codec`` an orthonormal 16x16 block transform followed by a plain quantiser, in place.

    Each stride-2 convolution gets a 2x2 Haar packet in its taps (2:4, 2:4), where padding 2 makes it act on whole
    2x2 blocks; the transposed convolution with the same taps is its exact inverse. After each stage the channels
    with the most energy on ``crops`` ([B, 3, H, W] in 0..1; synthetic ones when None) are kept. Gains follow
    sqrt(lambda), since the best step of a uniform quantiser does. The hyper-decoder starts at each channel's
    standard deviation, so that the rate starts at a plain Gaussian's.
    """
    generator = torch.Generator().manual_seed(seed)
    x = crops.detach().float().cpu() - 0.5
    x = x[..., : x.shape[-2] // 16 * 16, : x.shape[-1] // 16 * 16]
    downs = [layer for layer in codec.g_a if isinstance(layer, nn.Conv2d)]
    ups = [layer for layer in codec.g_s if isinstance(layer, nn.ConvTranspose2d)]
    inputs = MIX  # basis of the stage's input channels, in terms of the convolution's input channels
    for i, (down, up) in enumerate(zip(downs, reversed(ups), strict=True)):
        packet = torch.einsum("co,kuv->ckouv", inputs, HAAR).flatten(0, 1)
        y = F.conv2d(x, packet, stride=2)
        keep = y.square().mean((0, 2, 3)).argsort(descending=True)[: down.out_channels]
        scale = STEP if i == len(downs) - 1 else 1.0
        for layer, factor in ((down, scale), (up, 1 / scale)):
            free = torch.randn(layer.weight.shape, generator=generator) * NOISE * factor
            free[: len(keep), : packet.shape[1]] = 0
            free[: len(keep), : packet.shape[1], 2:4, 2:4] = packet[keep] * factor
            layer.weight.copy_(free)
            assert layer.bias is not None
            layer.bias.zero_()
        x, inputs = y[:, keep], torch.eye(len(keep))
    for layer in [*codec.g_a, *codec.g_s]:
        if isinstance(layer, GDN):
            layer.beta.fill_((1 + PEDESTAL) ** 0.5)
            layer.gamma.copy_((GAMMA * torch.eye(len(layer.beta)) + PEDESTAL).sqrt())
    log_gain = torch.tensor([0.5 * math.log(lam / LAMBDA_0) for lam in LAMBDAS])[:, None]
    codec.log_gain.copy_(log_gain.expand_as(codec.log_gain))
    codec.log_inv_gain.copy_(-log_gain.expand_as(codec.log_inv_gain))
    last = codec.h_s[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.mul_(0.1)
    last.bias.zero_()
    last.bias[: x.shape[1]] = STEP * x.transpose(0, 1).flatten(1).std(1).clamp(min=0.01)
