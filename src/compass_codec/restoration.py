"""Restoration: small networks that take a decoded layer nearer to the picture it was.

What synthesis and prediction give together is not the best guess that can be made from it: quantisation leaves noise,
ringing and false colours, which look alike in all pictures. One network for the base layer and one for enhancement
layers take some of it away, as the in-loop filters of video codecs do; what is special to a picture is left to the
filter of the layer (filters.py), which comes after them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compass_codec.networks import LAMBDAS, gain

FOLD = 2  # pixels along the side of what one place of the network holds
LEAK = 2.0**-7
IN, MORE, OUT = 4.0, 8.0, 0.1  # that bring samples and residuals to about 1, and outputs to samples


class Restorer(nn.Module):
    """A residual network: a 3x3 convolution, ``blocks`` of two with a skip around them, and one more. How much of what
    each of them finds counts depends on the rate.

    With ``predicted`` it also sees what the residual codec added to the prediction.
    """

    def __init__(self, channels: int = 32, blocks: int = 2, predicted: bool = False) -> None:
        super().__init__()
        samples = 3 * FOLD**2
        self.predicted = predicted
        self.reach = FOLD * (2 + 2 * blocks)  # pixels that a square of FOLD x FOLD sees to every side
        self.first = nn.Conv2d(samples * (1 + predicted) + 1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.LeakyReLU(LEAK),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(channels, samples, 3, padding=1)
        # of what the blocks add, one after the other, and last of what the last convolution sees
        self.log_gain = nn.Parameter(torch.zeros(len(LAMBDAS), channels * (blocks + 1)))
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)  # at first nothing changes

    def forward(self, x: Tensor, known: Tensor, level: Tensor) -> Tensor:
        """Picture [B, 3, H, W] in 0..1, not clipped, what of it was predicted, of the same shape, and the rate's level
        [B], to what restoration adds to the picture."""
        h, w = x.shape[-2:]
        dtype = self.first.weight.dtype  # 16 bits where the layer may be; what comes in and goes out is not
        seen = torch.cat([IN * (x - 0.5), MORE * (x - known)], 1) if self.predicted else IN * (x - 0.5)
        seen = F.pixel_unshuffle(F.pad(seen.to(dtype), (0, -w % FOLD, 0, -h % FOLD), mode="replicate"), FOLD)
        rate = (level / (len(LAMBDAS) - 1) - 0.5).to(dtype)[:, None, None, None]
        *gains, last_gain = gain(self.log_gain, level).to(dtype).chunk(len(self.blocks) + 1, 1)
        features = F.leaky_relu(self.first(torch.cat([seen, rate.expand(-1, 1, *seen.shape[-2:])], 1)), LEAK)
        for block, amount in zip(self.blocks, gains, strict=True):
            features = features + amount * block(features)
        out = self.last(F.leaky_relu(features, LEAK) * last_gain)
        return OUT * F.pixel_shuffle(out, FOLD)[..., :h, :w].to(x.dtype)

    def pixels_in(self, kind: torch.dtype) -> None:
        """Let the convolutions compute in float16 or bfloat16; gains stay float32."""
        for layer in (self.first, self.blocks, self.last):
            layer.to(kind)


class Restoration(nn.Module):
    """The two networks: ``base`` for the base layer, ``residual`` for the layers above."""

    def __init__(self, channels: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.base = Restorer(channels, blocks)
        self.residual = Restorer(channels, blocks, predicted=True)

    @staticmethod
    def dimensions(weights: Mapping[str, Tensor]) -> dict[str, int]:
        """The arguments with which networks are made that fit ``weights``."""
        blocks = {name.split(".")[2] for name in weights if name.startswith("base.blocks.")}
        return {"channels": len(weights["base.first.bias"]), "blocks": len(blocks)}
