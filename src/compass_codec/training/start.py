"""What training starts from when it has no weights: a block transform, which codes pictures before the first step, and
principal components for details."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks import BLOCK, GDN, LAMBDAS, ImageCodec, ascend, lower_bound
from compass_codec.restoration import Restoration
from compass_codec.training.stages import SCALE_MIN, RatedCodec, encoded, gaussian_bits, untrained_restoration

# Orthonormal luma/chroma mix and 2x2 Haar packet: rows are basis vectors.
MIX = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
MIX = MIX / MIX.norm(dim=1, keepdim=True)
HAAR = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).reshape(4, 2, 2)

STEP = 7.0  # scale of y: a quantisation step of 1 then suits LAMBDA_0
LAMBDA_0 = 0.013
GAMMA = 0.002  # GDN's diagonal: nearly linear over the range of the block transform
DETAIL_GAIN = 36.0  # of details at lambda = 1, to begin with: coarse, since most of them are better left out
BATCHES = 4  # of crops that details are found from, at each level
RIDGE = 1e-3  # of the mean square of a feature: details must not hang on small differences between features
ABSOLUTE = 1.25  # standard deviation of a normal distribution by its mean magnitude
NOISE = 0.005  # standard deviation of the weights that the transform leaves free


def noise_pictures(count: int = 16, side: int = 128, seed: int = 0) -> Tensor:
    """Synthetic pictures [count, 3, side, side] in 0..1 with the 1/f amplitude spectrum of photographs."""
    generator = torch.Generator().manual_seed(seed)
    fy, fx = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    amplitude = 1 / (fy**2 + fx**2).sqrt().clamp(min=1 / side)
    white = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator))
    planes = torch.fft.irfft2(white * amplitude, s=(side, side))
    planes = planes / planes.std((2, 3), keepdim=True) * torch.tensor([0.35, 0.08, 0.04])[:, None, None]
    return (torch.einsum("boyx,oc->bcyx", planes, MIX) + 0.5).clamp(0, 1)


@torch.no_grad()
def block_transform(codec: ImageCodec, crops: Tensor | None = None, seed: int = 0) -> None:
    """Make ``codec`` an orthonormal 16x16 block transform followed by a plain quantiser, in place.

    Each stride-2 convolution gets a 2x2 Haar packet in its taps (2:4, 2:4), where padding 2 makes it act on whole
    2x2 blocks; the transposed convolution with the same taps is its exact inverse. After each stage the channels
    with the most energy on ``crops`` ([B, 3, H, W] in 0..1; synthetic ones when None) are kept. Gains follow
    sqrt(lambda), since the best step of a uniform quantiser does. The hyper-decoder starts at each channel's
    standard deviation, so that the rate starts at a plain Gaussian's.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (noise_pictures() if crops is None else crops.detach().float().cpu()) - 0.5
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
            layer.beta.fill_((1 + GDN.PEDESTAL) ** 0.5)
            layer.gamma.copy_((GAMMA * torch.eye(len(layer.beta)) + GDN.PEDESTAL).sqrt())
    log_gain = torch.tensor([0.5 * math.log(lam / LAMBDA_0) for lam in LAMBDAS])[:, None]
    codec.log_gain.copy_(log_gain.expand_as(codec.log_gain))
    codec.log_inv_gain.copy_(-log_gain.expand_as(codec.log_inv_gain))
    last = codec.h_s[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.mul_(0.1)
    last.bias.zero_()
    last.bias[: x.shape[1]] = STEP * x.transpose(0, 1).flatten(1).std(1).clamp(min=0.01)


@dataclass(frozen=True)
class Blocks:
    """Of so many blocks, coded at one level: the hyper-decoder's features [P, C], and their components [P, K] in the
    basis of details, in units of the picture's range: of what the synthesis loses without quantisation, and with it."""

    features: Tensor
    lost: Tensor
    missing: Tensor


def principal_details(rated: RatedCodec, crops: Callable[[float, int], Iterator[Tensor]]) -> None:
    """Give a codec details, in place: the principal components of what its synthesis cannot give back, in blocks.

    ``crops`` gives, for a level, so many batches [B, 3, H, W] of what the codec is to code, H and W multiples of BLOCK.
    Each level gets the gain of least cost, R + lambda D; scales are fitted to the bits of what is then coded.
    """
    codec, top = rated.codec, len(LAMBDAS) - 1
    with torch.no_grad():
        codec.d_a.weight.zero_()
        products = sum(x.T @ x for x in (_blocks(x - _coded(rated, x, top)[0]) for x in crops(top, 2 * BATCHES)))
        basis = torch.linalg.eigh(products)[1].flip(1)[:, : codec.details]
        seen = [_look(rated, crops(level, BATCHES), level, basis) for level in range(top + 1)]
        gains = tuple(DETAIL_GAIN * lam**0.5 for lam in LAMBDAS)
        known = F.pad(torch.cat([s.features for s in seen]), (0, 1), value=1.0)
        squares = known.T @ known
        squares += RIDGE * squares.trace() / len(squares) * torch.eye(len(squares), device=squares.device)
    for _ in range(2):
        with torch.no_grad():
            magnitudes = torch.cat([g * s.lost.abs() for g, s in zip(gains, seen, strict=True)])
            fitted = ABSOLUTE * torch.linalg.solve(squares, known.T @ magnitudes)
        fitted = _fit_scales(fitted, known, torch.cat([g * s.lost for g, s in zip(gains, seen, strict=True)]))
        with torch.no_grad():
            scales = (known @ fitted).split([len(s.lost) for s in seen])
            parts = zip(LAMBDAS, gains, seen, scales, strict=True)
            gains, inverses = zip(*(_best_gain(lam, g, s, scale / g) for lam, g, s, scale in parts), strict=True)
    with torch.no_grad():
        assert codec.h_d.bias is not None
        codec.h_d.weight.copy_(fitted[:-1].T[:, :, None, None])
        codec.h_d.bias.copy_(fitted[-1])
        for weight in (codec.d_a.weight, codec.d_s.weight):
            weight.copy_(basis.T.reshape(weight.shape))
        for gain, values in (codec.log_gain_d, gains), (codec.log_inv_gain_d, inverses):
            gain.copy_(torch.tensor(values).log()[:, None].expand_as(gain))


def _blocks(x: Tensor) -> Tensor:
    """[B, 3, H, W] to its blocks [P, 3 * BLOCK**2]."""
    return F.unfold(x, BLOCK, stride=BLOCK).transpose(1, 2).flatten(0, 1)


def _coded(rated: RatedCodec, x: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as it comes out without quantisation and with it, and the hyper-decoder's features [P, C]."""
    codec, levels, size = rated.codec, torch.full((len(x),), float(level), device=x.device), (x.shape[-2], x.shape[-1])
    y = codec.analysis(x, levels)
    features = ascend(codec.h_s[:-1], codec.hyper_analysis(y).round(), (y.shape[-2], y.shape[-1]))
    coded = codec.synthesis(rated.code(y)[0], levels, size)
    return codec.synthesis(y, levels, size), coded, features.permute(0, 2, 3, 1).flatten(0, 2)


def _look(rated: RatedCodec, crops: Iterator[Tensor], level: float, basis: Tensor) -> Blocks:
    """What is to know of details at a level, of a codec that has none yet."""
    found = [(x, *_coded(rated, x, level)) for x in crops]
    lost, missing = (torch.cat([_blocks(part[0] - part[i]) @ basis for part in found]) for i in (1, 2))
    return Blocks(torch.cat([part[3] for part in found]), lost, missing)


def _fit_scales(start: Tensor, known: Tensor, details: Tensor, steps: int = 120) -> Tensor:
    """Weights [C + 1, K] that give scales from features ``known`` [P, C + 1], of fewest bits for the details [P, K]."""
    size = known.square().mean(0).sqrt()[:, None]  # features differ in magnitude
    weights = (start * size).requires_grad_()
    rate = 0.1 * float(weights.detach().abs().mean())
    optimiser = torch.optim.Adam([weights], rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        some = torch.arange(step % 4, len(known), 4, device=known.device)
        scales = known[some] @ (weights / size)
        with torch.no_grad():
            symbols = encoded(details[some], lower_bound(scales, SCALE_MIN))
        bits = gaussian_bits(symbols, scales, torch.zeros_like(symbols)).sum() / len(some)
        optimiser.zero_grad()
        bits.backward()
        optimiser.step()
    return (weights / size).detach()


def _best_gain(lam: float, gain: float, seen: Blocks, scales: Tensor) -> tuple[float, float]:
    """The gain of details near ``gain`` that costs least, and its inverse; ``scales``: of details themselves."""
    best = (math.inf, gain, 1 / gain)
    for factor in (0.7, 0.8, 0.9, 1.0, 1.1, 1.25):
        tried = factor * gain
        symbols = encoded(tried * seen.lost, lower_bound(tried * scales, SCALE_MIN))
        bits = gaussian_bits(symbols, tried * scales, torch.zeros_like(symbols)).sum()
        inverse = float((symbols * seen.missing).sum() / symbols.square().sum().clamp(min=1))
        inverse = min(max(inverse, 0.5 / tried), 1.2 / tried)
        # a block has BLOCK**2 pixels, whose mean error is that of their three samples
        error = (seen.missing - inverse * symbols).square().sum() / 3
        best = min(best, (float(bits + lam * 255**2 * error), tried, inverse))
    return best[1], best[2]


@torch.no_grad()
def grown(old: Restoration, channels: int, blocks: int) -> Restoration:
    """Larger networks that restore as ``old`` does: what is added is random, but nothing of it reaches the output yet.
    Raises ValueError when they would be smaller."""
    had = Restoration.dimensions(old.state_dict())
    if channels < had["channels"] or blocks < had["blocks"]:
        raise ValueError(f"restoration has {had['channels']} channels and {had['blocks']} blocks; it does not shrink")
    new = untrained_restoration(channels=channels, blocks=blocks)
    given = old.state_dict()
    for name, value in new.state_dict().items():
        if name.endswith("log_gain"):  # parts of so many channels: one for each block, and the last
            parts = list(value.split(channels, 1))
            for part, kept in zip(
                [*parts[: had["blocks"]], parts[-1]], given[name].split(had["channels"], 1), strict=True
            ):
                part[:, : had["channels"]] = kept
        elif name in given:
            kept = given[name]
            value[: len(kept)] = 0  # what was there sees nothing of what is new
            value[tuple(map(slice, kept.shape))] = kept
        elif ".2." in name:  # a block's second convolution
            value.zero_()
    return new
