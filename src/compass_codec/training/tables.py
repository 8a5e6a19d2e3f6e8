"""Probability tables from what the networks really put out, in place of the ideal ones they were trained with.

``python -m compass_codec.training.tables WEIGHTS --data photos.tar`` counts the symbols of real encodes and rewrites
the tables in WEIGHTS. Nothing else changes: the same symbols, in fewer bytes.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from compass_codec.codec import Codec, LayerCodec
from compass_codec.entropy import Table, frequencies
from compass_codec.errors import CompassError
from compass_codec.training.data import Pictures, resize

PRIOR = 20.0  # symbols that the ideal table counts for, next to those that were seen


class Counts:
    """How often each symbol of one codec was seen: of z by channel, of y by scale index."""

    def __init__(self, layer: LayerCodec) -> None:
        self.layer = layer
        self.z, self.y = ([np.zeros(2 * t.width + 1) for t in tables] for tables in (layer.tables.z, layer.tables.y))

    def add(self, x: Tensor, quality: float) -> Tensor:
        """Count the symbols of a picture [1, 3, H, W] centred on zero; returns its reconstruction."""
        size = (x.shape[-2], x.shape[-1])
        analysed = self.layer.analyse([x], size, quality)
        ((y, index, means),) = analysed.latents
        for counts, symbols in zip(self.z, torch.cat(analysed.z, 2)[0].flatten(1).long().cpu().numpy(), strict=True):
            _count(counts, symbols)
        flat, groups = y.long().flatten().cpu().numpy(), index.flatten().cpu().numpy()
        for i in np.unique(groups):
            _count(self.y[i], flat[groups == i])
        return self.layer.codec.synthesis(y + means, self.layer.level(quality), size)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """New frequencies, laid out as in the weights file."""
        # the means have taken out what is lopsided in y; the rest would be chance
        y = [(counts + counts[::-1]) / 2 for counts in self.y]
        z = [_blend(c, t) for c, t in zip(self.z, self.layer.tables.z, strict=True)]
        return np.stack(z), np.concatenate([_blend(c, t) for c, t in zip(y, self.layer.tables.y, strict=True)])


def _count(counts: np.ndarray, symbols: np.ndarray) -> None:
    width = len(counts) // 2
    inside = symbols[np.abs(symbols) <= width] + width
    counts += np.bincount(inside, minlength=len(counts))


def _blend(counts: np.ndarray, table: Table) -> np.ndarray:
    """Seen and ideal frequencies together; a wide table needs more of the ideal, its counts being thin."""
    prior = max(PRIOR, len(counts) / 2) * table.freq[:-1] / table.freq.sum()
    return frequencies((counts + prior) / (counts.sum() + max(PRIOR, len(counts) / 2)))


@torch.inference_mode()
def count(codec: Codec, pictures: Pictures, crops: int, side: int, seed: int = 1) -> tuple[Counts, Counts]:
    """Symbols of base and residual codec over random crops, qualities 1..100 and factors 1..4 between two layers."""
    generator = torch.Generator().manual_seed(seed)
    base, residual = Counts(codec.base), Counts(codec.residual)
    with click.progressbar(range(crops), label="counting") as bar:
        for _ in bar:
            x = pictures.sample(1, side, generator)
            draw, quality = torch.rand(2, generator=generator).tolist()
            factor, quality = 1 + 3 * draw, 1 + 99 * quality
            base.add(x - 0.5, quality)
            small = resize(x, (round(side / factor), round(side / factor)))
            below = base.add(small - 0.5, quality) + 0.5
            below = (below.clamp(0, 1) * 255).round() / 255
            residual.add(x - codec.liff(below, (side, side)), quality)
    return base, residual


def rewrite(file: Path, z: np.ndarray, y: np.ndarray) -> None:
    """Put new tables into a weights file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors |= {"tables.z": torch.from_numpy(z), "tables.y": torch.from_numpy(y)}
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    temporary.replace(file)


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--crops", type=click.IntRange(1), default=300, show_default=True)
@click.option("--side", type=click.IntRange(64), default=256, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def main(weights: Path, data: tuple[Path, ...], crops: int, side: int, device: str) -> None:
    """Fit the probability tables in the folder WEIGHTS to pictures."""
    try:
        codec = Codec.load(device, weights)
        counts = count(codec, Pictures(list(data), codec.device), crops, side)
        for part, found in zip(("base", "residual"), counts, strict=True):
            rewrite(weights / f"{part}.safetensors", *found.tables())
    except (CompassError, ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
