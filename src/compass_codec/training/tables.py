"""Probability tables from what the networks really put out, in place of the ideal ones they were trained with.

``python -m compass_codec.training.tables WEIGHTS --data photos.tar`` counts the symbols of real encodes and rewrites
the tables in WEIGHTS. As the encoder rounds by what symbols cost, it counts twice: first a few crops with the tables
that are there, then all with those.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from compass_codec.backbones import LayerCodec
from compass_codec.backbones.mean_scale import MeanScaleLayer
from compass_codec.codec import Codec, choose_device
from compass_codec.entropy import Table, Tables, encode, frequencies, groups
from compass_codec.errors import CompassError
from compass_codec.files import write_file
from compass_codec.training.data import Pictures, resize
from compass_codec.training.export import device_name, remember
from compass_codec.training.tensors import read_tensors

PRIOR = 20.0  # symbols that the ideal table counts for, next to those that were seen
FIRST = 8  # how many times fewer crops are counted at first
HELD_OUT = 10  # every so many-th crop is not counted


class Counts:
    """How often each symbol of one codec was seen: of z by channel, of y by scale index.

    Raises ValueError for a codec of another backbone than mean_scale.
    """

    def __init__(self, layer: LayerCodec) -> None:
        if not isinstance(layer, MeanScaleLayer):
            raise ValueError("only sets of the backbone mean_scale have tables that are counted")
        self.layer = layer
        self.z, self.y = ([np.zeros(2 * t.width + 1) for t in tables] for tables in (layer.tables.z, layer.tables.y))
        # symbols of y, int32 [M, h, w], and their scale indices, that are only coded as a check
        self.held_out: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []

    def add(self, x: Tensor, quality: float, hold_out: bool = False) -> Tensor:
        """Count the symbols of a picture [1, 3, H, W] centred on zero; returns its reconstruction."""
        size = (x.shape[-2], x.shape[-1])
        analysed = self.layer.analyse([x], size, quality)
        ((symbols, indices, means),) = analysed.latents
        y, index = symbols[0].cpu().numpy().astype(np.int32), indices[0].cpu().numpy()
        if hold_out:
            self.held_out.append((y, index))
        else:
            for counts, channel in zip(
                self.z, torch.cat(analysed.z, 2)[0].flatten(1).long().cpu().numpy(), strict=True
            ):
                _count(counts, channel)
            for number, where in groups(index):
                _count(self.y[number], y.ravel()[where])
        return self.layer.codec.synthesis(symbols + means, self.layer.level(quality), size)

    def tables(self) -> dict[str, NDArray[np.int32]]:
        """New frequencies, by their names in the weights file."""
        old = self.layer.tables
        z = [_blend(counts, table) for counts, table in zip(self.z, old.z, strict=True)]
        # the means have taken out what is lopsided in y; the rest would be chance
        y = [_blend((counts + counts[::-1]) / 2, table) for counts, table in zip(self.y, old.y, strict=True)]
        return {"z": np.stack(z), "y": np.concatenate(y)}

    def check(self, found: dict[str, NDArray[np.int32]]) -> str:
        """What the symbols of y that were not counted take with the old tables and with new ones."""
        new = Tables(found["z"], found["y"], np.array([len(t.freq) for t in self.layer.tables.y], np.int32))
        none = np.zeros((len(self.z), 1, 1), np.int32)
        before, now = (
            sum(len(encode(none, y, index, tables)) for y, index in self.held_out)
            for tables in (self.layer.tables, new)
        )
        return f"{len(self.held_out)} pieces that were not counted: {before} bytes before, {now} now"


def _count(counts: NDArray[np.float64], symbols: NDArray[np.integer[Any]]) -> None:
    width = len(counts) // 2
    inside = symbols[np.abs(symbols) <= width] + width
    counts += np.bincount(inside, minlength=len(counts))


def _blend(counts: NDArray[np.float64], table: Table) -> NDArray[np.int32]:
    """Seen and ideal frequencies together; a wide table needs more of the ideal, its counts being thin."""
    prior = max(PRIOR, len(counts) / 2) * table.freq[:-1] / table.freq.sum()
    return frequencies((counts + prior) / (counts.sum() + max(PRIOR, len(counts) / 2)))


@torch.inference_mode()
def count(codec: Codec, pictures: Pictures, crops: int, side: int, seed: int = 1) -> tuple[Counts, Counts]:
    """Symbols of base and residual codec over random crops, qualities 1..100 and factors 1..4 between two layers."""
    generator = torch.Generator().manual_seed(seed)
    base, residual = Counts(codec.base), Counts(codec.residual)
    with click.progressbar(range(crops), label="counting") as bar:
        for n in bar:
            hold_out = n % HELD_OUT == HELD_OUT - 1
            x = pictures.sample(1, side, generator)
            draw, quality = torch.rand(2, generator=generator).tolist()
            factor, quality = 1 + 3 * draw, 1 + 99 * quality
            base.add(x - 0.5, quality, hold_out)
            small = resize(x, (round(side / factor), round(side / factor)))
            below = base.add(small - 0.5, quality, hold_out) + 0.5
            below = (below.clamp(0, 1) * 255).round().byte()
            residual.add(x - codec.predictor.rows(below, (side, side), (0, side)), quality, hold_out)
    return base, residual


def rewrite(file: Path, tables: dict[str, NDArray[np.int32]]) -> None:
    """Put new tables into a weights file."""
    found = {f"tables.{name}": torch.from_numpy(table) for name, table in tables.items()}
    write_file(file, save(read_tensors(file) | found))


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--crops", type=click.IntRange(1), default=300, show_default=True)
@click.option("--side", type=click.IntRange(64), default=256, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def main(weights: Path, data: tuple[Path, ...], crops: int, side: int, device: str) -> None:
    """Fit the probability tables in the folder WEIGHTS to pictures."""
    start = time.monotonic()
    try:
        pictures = Pictures(list(data), choose_device(device))
        for share in (FIRST, 1):
            counts = count(Codec.load(device, weights), pictures, -(-crops // share), side)
            for part, found in zip(("base", "residual"), counts, strict=True):
                tables = found.tables()
                rewrite(weights / f"{part}.safetensors", tables)
                if share == 1 and found.held_out:
                    click.echo(f"{part}: {found.check(tables)}")
        minutes = round((time.monotonic() - start) / 60, 1)
        chosen = device_name(pictures.device)
        remember(weights, {"stage": "tables", "crops": crops, "side": side, "device": chosen, "minutes": minutes})
    except (CompassError, ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
