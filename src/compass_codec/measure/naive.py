"""The way it is usually done, to compare with: a filter for every target pixel, float hyper-decoder, channels first, a
Gaussian for every symbol. No files come of it, only time and the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from constriction import stream
from numpy.typing import NDArray
from torch import Tensor

from compass_codec.networks.arrays import to_tensor
from compass_codec.networks.liff import LIFF, bicubic, nearest

ROWS = 64  # of the target at a time; all at once would take gigabytes


def liff(network: LIFF, low: Tensor, size: tuple[int, int]) -> Tensor:
    """Section 3.2 of the paper as it stands: unfold, look up the nearest, make a filter for every pixel, apply it.
    ``low`` [1, 3, h, w] in 0..1 to [1, 3, *size]. Bicubic interpolation is in float64, as PyTorch's positions in
    float32 are off by up to a ten-thousandth of a sample."""
    h, w = low.shape[-2:]
    unfolded = F.unfold(network.extractor(low), 3, padding=1).reshape(-1, h, w).permute(1, 2, 0)
    cell = torch.tensor([2 * h / size[0], 2 * w / size[1]])
    cols, dx = nearest(w, size[1], (0, size[1]))
    strips = []
    for top in range(0, size[0], ROWS):
        rows, dy = nearest(h, size[0], (top, min(size[0], top + ROWS)))
        features = unfolded[rows][:, cols]
        shape = features.shape[:2]
        offsets = torch.stack(torch.broadcast_tensors(dy[:, None], dx), -1)
        hidden = F.relu(network.mlp_first(torch.cat([features, offsets, cell.expand(*shape, 2)], -1)))
        for layer in network.mlp_hidden:
            hidden = F.relu(layer(hidden))
        filters = network.mlp_last(hidden).reshape(*shape, -1, 3)
        strips.append(torch.einsum("hwk,hwko->hwo", features, filters))
    return bicubic(low.double(), size).float() + torch.cat(strips).permute(2, 0, 1)[None]


def code(codec: Any, layers: list[NDArray[np.uint8]], level: Tensor) -> list[NDArray[np.uint8]]:
    """Encode and decode uint8 pictures [height, width, 3], smallest first; ``codec``, a Codec of mean_scale networks,
    should hold weights with channels first. Returns the decoded layers."""
    encoded: list[tuple[NDArray[np.uint32], NDArray[np.float64], Tensor]] = []
    done: list[NDArray[np.uint8]] = []
    for picture in layers:
        part = codec.residual.codec if done else codec.base.codec
        x, size = to_tensor(picture, codec.device).contiguous().float() / 255, (picture.shape[0], picture.shape[1])
        y = part.analysis(x - _below(codec, done, size), level)
        z = part.hyper_analysis(y).round()
        scales, means = part.hyper_synthesis(z, (y.shape[2], y.shape[3]))
        symbols = (y - means).round()
        encoder = stream.queue.RangeEncoder()
        gaussians = stream.model.QuantizedGaussian(-(2**15), 2**15)
        spread = scales.clamp(min=0.11).double().numpy().ravel()
        encoder.encode(symbols.int().numpy().ravel(), gaussians, np.zeros_like(spread), spread)
        encoded.append((encoder.get_compressed(), spread, z))
        done.append(_shown(codec, done, part.synthesis(symbols + means, level, size)))
    decoded: list[NDArray[np.uint8]] = []
    for picture, (words, spread, z) in zip(layers, encoded, strict=True):
        part = codec.residual.codec if decoded else codec.base.codec
        size = (picture.shape[0], picture.shape[1])
        _, means = part.hyper_synthesis(z, part.latent_size(size))
        found = stream.queue.RangeDecoder(words).decode(gaussians, np.zeros_like(spread), spread)
        symbols = torch.from_numpy(found).float().reshape(means.shape)
        decoded.append(_shown(codec, decoded, part.synthesis(symbols + means, level, size)))
    return decoded


def _below(codec: Any, done: list[NDArray[np.uint8]], size: tuple[int, int]) -> Tensor:
    if not done:
        return torch.tensor(0.5)
    return liff(codec.predictor, to_tensor(done[-1], codec.device).contiguous().float() / 255, size)


def _shown(codec: Any, done: list[NDArray[np.uint8]], residual: Tensor) -> NDArray[np.uint8]:
    """The layer that comes after those that are ``done``."""
    x = _below(codec, done, (residual.shape[2], residual.shape[3])) + residual
    return (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
