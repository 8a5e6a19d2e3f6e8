"""What training and search lower besides rate: the mean squared error, or a distortion that follows what people see.

That is some of the squared error, and of two others. One is like Butteraugli. Pictures are compared in the opponent
colours XYB of JPEG XL (ISO/IEC 18181-1), X red less green, Y luma and B blue less luma, on the cube root of light.
Their bands, each of half the frequencies of the one before, count as much as fits the Butteraugli distances of coded
photographs; an error counts less where the picture is busy in the same band. The other is MS-SSIM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ABSORBED = torch.tensor(
    [[0.3, 0.622, 0.078], [0.23, 0.692, 0.078], [0.24342268924547819, 0.20476744424496821, 0.5518098665095536]]
)  # of linear red, green and blue by the long, medium and short cones
DARK = 0.0037930732552754493  # what cones give without light
OPPONENT = torch.tensor([[0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [-0.5, -0.5, 1.0]])
# What a squared error in X, Y and B counts, in the finest band, those below it, and what is left below all of them.
WEIGHTS = torch.tensor([[10, 0.08, 0.005], [30, 1.1, 0.05], [60, 3, 0.5], [40, 3, 2], [20, 3, 0.5]])
BUSY = 0.03  # root mean square of a band's Y where its errors count half
SHARES = (0.1, 0.65, 0.25)  # of the squared error, ``seen`` and 1 - ``similar`` in the distortion
# About the mean squared error where each is 1, in pictures as the codec for that error codes them, at all qualities.
# The rate of a quality stays near to what it was.
LIKE_MSE = (1.0, 16.0, 0.032)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM
WINDOW, DEVIATION = 11, 1.5  # of MS-SSIM, in samples
LIGHT, CONTRAST = 0.01**2, 0.03**2  # constants of SSIM for pictures in 0..1


def squared(x: Tensor, rec: Tensor) -> Tensor:
    """Mean squared error of pictures [B, 3, H, W]: [B]."""
    return (x - rec).square().mean((1, 2, 3))


def xyb(x: Tensor) -> Tensor:
    """sRGB pictures [B, 3, H, W] in 0..1 to X, Y and B."""
    x = x.clamp(0, 1)
    light = torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    cones = F.conv2d(light, ABSORBED.to(x)[:, :, None, None]) + DARK
    return F.conv2d(cones ** (1 / 3), OPPONENT.to(x)[:, :, None, None])


def mean(x: Tensor, side: int) -> Tensor:
    """Of the square of ``side`` (odd) samples around each; edges are repeated."""
    return F.avg_pool2d(F.pad(x, [side // 2] * 4, mode="replicate"), side, 1)


def bands(x: Tensor) -> list[Tensor]:
    """A picture [B, 3, H, W] apart into bands: each is what a blur takes from the one before, which goes on at half the
    size; the last is what is left. Pictures that are small have fewer."""
    found: list[Tensor] = []
    while len(found) < len(WEIGHTS) - 1 and min(x.shape[-2:]) > 2:
        low = mean(mean(x, 3), 3)
        found.append(x - low)
        x = F.avg_pool2d(low, 2)
    return [*found, x]


def seen(x: Tensor, rec: Tensor) -> Tensor:
    """How much pictures [B, 3, H, W] in 0..1 look different from ``x``: [B]."""
    total = x.new_zeros(len(x))
    found = bands(xyb(x))
    for k, (a, b) in enumerate(zip(found, bands(xyb(rec)), strict=True)):
        last = k == len(found) - 1
        error = (a - b).square() * WEIGHTS[-1 if last else k].to(x)[:, None, None]
        busy = 0 if last else mean(a[:, 1:2].square(), 5)
        total = total + (error / (1 + busy / BUSY**2)).sum(1).mean((1, 2))
    return total


def similar(x: Tensor, rec: Tensor) -> Tensor:
    """MS-SSIM of pictures [B, 3, H, W] in 0..1: [B], the mean of R, G and B. Those with a side of less than 161 have as
    many of the scales as fit, those of less than 11 are all equal."""
    steps = (torch.arange(WINDOW) - WINDOW // 2) / DEVIATION
    window = (-steps.square() / 2).exp().to(x)
    window = window / window.sum()

    def local(maps: Tensor) -> Tensor:
        """[B, C, H, W] to the mean around each place that a window fits on."""
        columns = F.conv2d(maps.reshape(-1, 1, *maps.shape[-2:]), window.view(1, 1, -1, 1))
        rows = F.conv2d(columns, window.view(1, 1, 1, -1))
        return rows.view(*maps.shape[:2], *rows.shape[-2:])

    count = sum(min(x.shape[-2:]) >> k >= WINDOW for k in range(len(SCALES)))
    product = x.new_ones(x.shape[:2])
    for k, exponent in enumerate(SCALES[:count]):
        a, b, aa, bb, ab = local(torch.cat([x, rec, x * x, rec * rec, x * rec], 1)).chunk(5, 1)
        score = (2 * (ab - a * b) + CONTRAST) / (aa - a * a + bb - b * b + CONTRAST)
        if k == count - 1:
            score = score * (2 * a * b + LIGHT) / (a * a + b * b + LIGHT)
        # a power of nothing has no gradient
        product = product * score.mean((2, 3)).clamp(min=1e-4) ** (exponent / sum(SCALES[:count]))
        x, rec = F.avg_pool2d(x, 2), F.avg_pool2d(rec, 2)
    return product.mean(1)


# PyTorch 2.15 compiles the gradient of padding by repetition to one of other strides
@torch.compiler.disable  # type: ignore[untyped-decorator]
def visual(x: Tensor, rec: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 to what stands for their mean squared error: [B]."""
    parts = (squared(x, rec), seen(x, rec), 1 - similar(x, rec.clamp(0, 1)))
    weights = x.new_tensor([share * like for share, like in zip(SHARES, LIKE_MSE, strict=True)])
    return weights @ torch.stack(parts)


Distortion = Callable[[Tensor, Tensor], Tensor]
TUNES: dict[str, Distortion] = {"psnr": squared, "visual": visual}  # by the ``tune`` of a set of weights
