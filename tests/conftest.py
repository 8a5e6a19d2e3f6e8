"""Pictures that any machine has, and the command run in this process."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from compass_codec import cli, engines, metrics, weights

if TYPE_CHECKING:
    import torch

GOLDEN = Path(__file__).parent / "golden" / weights.DEFAULT
KODAK = Path(__file__).parents[2] / "shared" / "data" / "kodak"


def photo() -> Image.Image:
    """The public-domain portrait that matplotlib ships, 512 x 600."""
    import matplotlib

    return Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


def crop(width: int, height: int) -> Image.Image:
    """A piece of the portrait of this size, enlarged first if it must be."""
    image = photo()
    factor = max(1, width / image.width, height / image.height)
    image = image.resize((max(width, round(image.width * factor)), max(height, round(image.height * factor))))
    left, top = (image.width - width) // 2, (image.height - height) // 3
    return image.crop((left, top, left + width, top + height))


def noise_pictures(count: int = 16, side: int = 128, seed: int = 0) -> torch.Tensor:
    """Synthetic pictures [count, 3, side, side] in 0..1 with the 1/f amplitude spectrum of photographs."""
    import torch

    from compass_codec.training.start import MIX

    generator = torch.Generator().manual_seed(seed)
    fy, fx = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    amplitude = 1 / (fy**2 + fx**2).sqrt().clamp(min=1 / side)
    white = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator))
    planes = torch.fft.irfft2(white * amplitude, s=(side, side))
    planes = planes / planes.std((2, 3), keepdim=True) * torch.tensor([0.35, 0.08, 0.04])[:, None, None]
    return (torch.einsum("boyx,oc->bcyx", planes, MIX) + 0.5).clamp(0, 1)


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers are the same whichever tests ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def in_float32():
    """What a test does not ask for is the same on every machine, whatever is installed there."""
    patch = pytest.MonkeyPatch()
    choose = engines.choose
    patch.setattr(engines, "choose", lambda asked, *about: choose("torch" if asked == "auto" else asked, *about))
    patch.setattr("compass_codec.codec.fastest", lambda device: "float32" if device.type == "cpu" else "float16")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def codec(in_float32):
    from compass_codec.codec import shared

    return shared("cpu")


@pytest.fixture(scope="session")
def small_file(codec) -> bytes:
    """A three-layer file of 80 x 60, 40 x 30 and 20 x 15."""
    return codec.encode(crop(80, 60), [1, 2, 4], 50).data


@dataclass
class Result:
    code: int
    out: str
    err: str


def compass(*args: object) -> Result:
    """Run the command line in this process: same entry point, no second start-up."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in args])
        except SystemExit as e:
            code = e.code or 0
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def psnr(a: Image.Image, b: Image.Image) -> float:
    return metrics.psnr(np.asarray(a), np.asarray(b))
