"""Probability tables from what the networks really put out, in place of the ideal ones they were trained with.

``python -m compass_codec.training.tables WEIGHTS --data photos.tar`` counts the symbols of real encodes and rewrites
the tables in WEIGHTS. As the encoder rounds by what symbols cost, it counts twice: first a few crops with the tables
that are there, then all with those.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from compass_codec.backbones import LayerCodec
from compass_codec.codec import Codec, choose_device
from compass_codec.entropy import PRECISION, Table, Tables, frequencies
from compass_codec.errors import CompassError
from compass_codec.files import write_file
from compass_codec.networks.arrays import to_bytes
from compass_codec.networks.numbers import FACTORIZED
from compass_codec.training.data import Pictures, resize
from compass_codec.training.export import describe, device_name, remember
from compass_codec.training.tensors import read_tensors
from compass_codec.weights import read_set

PRIOR = 20.0  # symbols that the ideal table counts for, next to those that were seen
FIRST = 8  # how many times fewer crops are counted at first
HELD_OUT = 10  # every so many-th crop is not counted


class Counted(Table):
    """A table that counts the symbols which are coded with it."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.freq)
        self.seen = np.zeros(2 * self.width + 1)
        self.held_out = np.zeros(len(self.freq))  # with escapes, the last
        self.hold_out = False  # whether symbols are kept apart, to check the new frequencies on

    def indices(self, symbols: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        positions, escaped = super().indices(symbols)
        counts = np.bincount(positions, minlength=len(self.freq))
        if self.hold_out:
            self.held_out += counts
        else:
            self.seen += counts[:-1]
        return positions, escaped

    def bits(self, freq: NDArray[np.int32]) -> float:
        """What the symbols that were held out cost with frequencies ``freq``."""
        return float((self.held_out * (PRECISION - np.log2(freq))).sum())


class Counts:
    """How often each symbol of one codec is coded from now on: of z by channel, of y by scale index.

    Raises ValueError for a codec that has no tables.
    """

    def __init__(self, layer: LayerCodec) -> None:
        tables = getattr(layer, "tables", None)
        if not isinstance(tables, Tables):
            raise ValueError("this backbone has no tables that could be counted")
        self.z, self.y = tables.z, tables.y = [Counted(t) for t in tables.z], [Counted(t) for t in tables.y]

    def hold_out(self, value: bool) -> None:
        """Whether what is coded from now on is held out."""
        for table in (*self.z, *self.y):
            table.hold_out = value

    def frequencies(self) -> dict[str, NDArray[np.int32]]:
        """New frequencies, by their names in the weights file."""
        z = [_blend(table.seen, table) for table in self.z]
        # the means have taken out what is lopsided in y; the rest would be chance
        y = [_blend((table.seen + table.seen[::-1]) / 2, table) for table in self.y]
        return {"z": np.stack(z), "y": np.concatenate(y)}

    def check(self, found: dict[str, NDArray[np.int32]]) -> str:
        """What the symbols of y that were held out take with the old frequencies and with new ones."""
        new = np.split(found["y"], np.cumsum([len(table.freq) for table in self.y])[:-1])
        before = sum(table.bits(table.freq) for table in self.y)
        now = sum(table.bits(freq) for table, freq in zip(self.y, new, strict=True))
        return f"symbols of y that were not counted: {before / 8:.0f} bytes before, {now / 8:.0f} now"


def _blend(counts: NDArray[np.float64], table: Table) -> NDArray[np.int32]:
    """Seen and ideal frequencies together; a wide table needs more of the ideal, its counts being thin."""
    prior = max(PRIOR, len(counts) / 2) * table.freq[:-1] / table.freq.sum()
    return frequencies((counts + prior) / (counts.sum() + max(PRIOR, len(counts) / 2)))


def count(codec: Codec, pictures: Pictures, crops: int, side: int, seed: int = 1) -> tuple[Counts, Counts]:
    """Symbols of base and residual codec over random crops, each encoded as a layer of its own and above a smaller one,
    at qualities 1..100 and factors 1..4."""
    generator = torch.Generator().manual_seed(seed)
    counts = Counts(codec.base), Counts(codec.residual)
    with click.progressbar(range(crops), label="counting") as bar:
        for n in bar:
            for each in counts:
                each.hold_out(n % HELD_OUT == HELD_OUT - 1)
            x = pictures.sample(1, side, generator)
            draw, quality = torch.rand(2, generator=generator).tolist()
            small = resize(x, (round(side / (1 + 3 * draw)),) * 2)
            large, low = (to_bytes(part) for part in (x, small))
            codec.encode_layers([large], [1.0], 1 + 99 * quality)
            codec.encode_layers([low, large], [1.0, side / low.shape[0]], 1 + 99 * quality)
    return counts


def rewrite(file: Path, tables: dict[str, NDArray[np.int32]]) -> None:
    """Put new tables into a weights file."""
    found = {f"tables.{name}": torch.from_numpy(table) for name, table in tables.items()}
    write_file(file, save(read_tensors(file) | found))


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), multiple=True, required=True, help="Tar file or folder of pictures."
)
@click.option("--crops", type=click.IntRange(1), default=300, show_default=True, help="Number of crops to encode.")
@click.option("--side", type=click.IntRange(64), default=256, show_default=True, help="Side of crops in pixels.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
def main(weights: Path, data: tuple[Path, ...], crops: int, side: int, device: str) -> None:
    """Fit the probability tables of the set in the folder WEIGHTS to pictures."""
    start = time.monotonic()
    try:
        if read_set(weights).spec.get("base", {}).get("entropy") == FACTORIZED:
            raise ValueError(f"{weights}: a factorized prior keeps the tables of its density")
        pictures = Pictures(list(data), choose_device(device))
        for share in (FIRST, 1):
            counts = count(Codec.load(device, weights, engine="torch"), pictures, -(-crops // share), side)
            for part, found in zip(("base", "residual"), counts, strict=True):
                tables = found.frequencies()
                rewrite(weights / f"{part}.safetensors", tables)
                describe(weights)
                if share == 1:
                    click.echo(f"{part}: {found.check(tables)}")
        minutes = round((time.monotonic() - start) / 60, 1)
        chosen = device_name(pictures.device)
        remember(weights, {"stage": "tables", "crops": crops, "side": side, "device": chosen, "minutes": minutes})
    except (CompassError, ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
