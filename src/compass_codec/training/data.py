"""Training pictures, held once in memory as uint8 and cropped, turned and resized on the device."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compass_codec import pictures
from compass_codec.errors import CompassError

HELD_OUT = 6  # pictures never trained on, for the rate-distortion points printed during training


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar or under a folder, in sorted order. ValueError when it is neither;
    OSError, with a name, for what cannot be read, such as a pipe."""
    if not source.exists():
        raise ValueError(f"{source}: no such tar file or folder of pictures")
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            yield str(path), path.read_bytes()
        return
    try:
        with tarfile.open(source) as tar:
            for member in sorted((m for m in tar if m.isfile()), key=lambda m: m.name):
                handle = tar.extractfile(member)
                assert handle is not None
                yield member.name, handle.read()
    except tarfile.TarError as error:
        raise ValueError(f"{source}: neither a folder nor a tar file") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(source)) from error


def _decode(item: tuple[str, bytes]) -> NDArray[np.uint8] | None:
    try:
        return np.asarray(pictures.read(io.BytesIO(item[1])).image).transpose(2, 0, 1)
    except CompassError:
        return None  # a text file among the pictures, or a damaged one


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic reduction with antialiasing (Pillow's BICUBIC), clamped to 0..1."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class Pictures:
    """All pictures of the sources in one flat uint8 tensor on ``device``; ``held_out`` keeps a few aside."""

    def __init__(self, sources: list[Path], device: torch.device, smallest: int = 256) -> None:
        files = [item for source in sources for item in read_files(source)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = [p for p in pool.map(_decode, files) if p is not None and min(p.shape[1:]) >= smallest]
        if len(decoded) <= HELD_OUT:
            names = ", ".join(map(str, sources))
            raise ValueError(f"{names}: fewer than {HELD_OUT + 1} pictures with sides of {smallest} pixels or more")
        step = len(decoded) // HELD_OUT
        kept = [p for i, p in enumerate(decoded) if i % step or i // step >= HELD_OUT]
        self.held_out = [torch.from_numpy(p[:, :256, :256].copy()) for i, p in enumerate(decoded) if i % step == 0]
        self.held_out = self.held_out[:HELD_OUT]
        self.flat = torch.from_numpy(np.concatenate([p.reshape(-1) for p in kept])).to(device)
        self.heights = torch.tensor([p.shape[1] for p in kept])
        self.widths = torch.tensor([p.shape[2] for p in kept])
        self.starts = torch.tensor([0] + [p.size for p in kept[:-1]]).cumsum(0)
        self.smallest = int(torch.minimum(self.heights, self.widths).min())
        # a picture is drawn in proportion to its area, so every pixel counts the same
        self.shares = (self.heights * self.widths).double()
        self.device = device

    def __len__(self) -> int:
        return len(self.heights)

    def sample(self, batch: int, side: int, generator: torch.Generator) -> Tensor:
        """Random crops [batch, 3, side, side] in 0..1, flipped, turned and sometimes reduced up to 2 times.

        Where and how is drawn on the CPU from ``generator`` and sent over in one small copy; nothing waits.
        """
        reduce = float(torch.rand((), generator=generator)) * 2
        wide = min(round(side * max(1.0, reduce)), self.smallest)  # half of the batches at full size
        pick = torch.multinomial(self.shares, batch, replacement=True, generator=generator)
        h, w = self.heights[pick], self.widths[pick]
        top = (torch.rand(batch, generator=generator) * (h - wide + 1)).long()
        left = (torch.rand(batch, generator=generator) * (w - wide + 1)).long()
        flip_v, flip_h, turn = torch.randint(0, 2, (3, batch), generator=generator)
        values = torch.stack([self.starts[pick], h, w, top, left, flip_v, flip_h, turn])
        start, h, w, top, left, flip_v, flip_h, turn = values.to(self.device, non_blocking=True)[:, :, None, None]
        i = torch.arange(wide, device=self.device)
        v, u = i[None, :, None], i[None, None, :]
        row, col = torch.where(turn == 1, u, v), torch.where(turn == 1, v, u)
        row = top + torch.where(flip_v == 1, wide - 1 - row, row)
        col = left + torch.where(flip_h == 1, wide - 1 - col, col)
        plane = start + row * w + col
        offsets = (torch.arange(3, device=self.device)[None, :, None, None]) * (h * w)[:, None]
        crops = self.flat[plane[:, None] + offsets].float() / 255
        return resize(crops, (side, side))
