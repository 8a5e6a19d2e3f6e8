"""Probability tables from what the networks really put out, in place of the ideal ones they were trained with.

``python -m compass_codec.training.tables WEIGHTS --data photos.tar`` counts the symbols of real encodes and rewrites
the tables in WEIGHTS, those of contexts among them. As the encoder rounds by what symbols cost, it counts twice: first
a few crops with the tables that are there, then all with those.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from compass_codec import contexts
from compass_codec.codec import Codec, choose_device
from compass_codec.entropy import LEVELS, Table, Tables, encode, frequencies, groups, walk
from compass_codec.errors import CompassError
from compass_codec.layer import LayerCodec
from compass_codec.pictures import write_file
from compass_codec.training.data import Pictures, resize
from compass_codec.training.export import device_name, read_tensors, remember

PRIOR = 20.0  # symbols that the ideal table counts for, next to those that were seen
WITH_CONTEXTS = 44  # scale indices that have contexts; tables of those above would be long, and their symbols are few
RIDGE = 30.0
FIRST = 8  # how many times fewer crops are counted at first
HELD_OUT = 10  # every so many-th crop is not counted


class Counts:
    """What was seen of the symbols of one codec: of z, how often each, by channel; all those of y."""

    def __init__(self, layer: LayerCodec) -> None:
        self.layer = layer
        self.z = [np.zeros(2 * t.width + 1) for t in layer.tables.z]
        # int32 [M, h, w] and their scale indices: what is counted, and what is only coded as a check
        self.y: list[tuple[np.ndarray, np.ndarray]] = []
        self.held_out: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, x: Tensor, quality: float, hold_out: bool = False) -> Tensor:
        """Count the symbols of a picture [1, 3, H, W] centred on zero; returns its reconstruction, not restored."""
        size = (x.shape[-2], x.shape[-1])
        analysed = self.layer.analyse([x], size, quality)
        ((y, index, means),) = analysed.latents
        if not hold_out:
            z = torch.cat(analysed.z, 2)[0].flatten(1).long().cpu().numpy()
            for counts, symbols in zip(self.z, z, strict=True):
                _count(counts, symbols)
        seen = self.held_out if hold_out else self.y
        seen.append((y[0].cpu().numpy().astype(np.int32), index[0].cpu().numpy()))
        return self.layer.codec.synthesis(y + means, self.layer.level(quality), size)

    def tables(self) -> dict[str, np.ndarray]:
        """New frequencies and weights, by their names in the weights file."""
        old = self.layer.tables
        z = np.stack([_blend(c, t) for c, t in zip(self.z, old.z, strict=True)])
        seen = [np.zeros(2 * t.width + 1) for t in old.y]
        for y, index in self.y:
            for i, where in groups(index):
                _count(seen[i], y.ravel()[where])
        # the means have taken out what is lopsided in y; the rest would be chance
        y_tables = [_blend((c + c[::-1]) / 2, t) for c, t in zip(seen, old.y, strict=True)]
        flat, lengths = np.concatenate(y_tables), np.array([len(t) for t in y_tables], np.int32)
        every = np.concatenate([np.tile(t, contexts.COUNT) for t in y_tables[:WITH_CONTEXTS]])
        new = Tables(z, flat, lengths, every, _weights(self.y, Tables(z, flat, lengths).expected))
        in_context = [np.zeros(2 * t.width + 1) for t in new.all_y]

        def count(table: np.ndarray, symbols: np.ndarray) -> np.ndarray:
            for number, where in groups(table):
                _count(in_context[number], symbols.ravel()[where])
            return symbols

        for y, index in self.y:
            walk(index, new, count, y)
        parts = [_blend(c, t) for c, t in zip(in_context[LEVELS:], new.all_y[LEVELS:], strict=True)]
        assert new.weights is not None
        return {"z": z, "y": flat, "y_contexts": np.concatenate(parts), "y_weights": new.weights.astype(np.int8)}

    def check(self, found: dict[str, np.ndarray]) -> str:
        """What the symbols of y that were not counted take with the old tables, with new ones, and with contexts."""
        lengths = np.array([len(t.freq) for t in self.layer.tables.y], np.int32)
        plain = Tables(found["z"], found["y"], lengths)
        with_contexts = Tables(found["z"], found["y"], lengths, found["y_contexts"], found["y_weights"])
        none = np.zeros((len(self.z), 1, 1), np.int32)
        old, new, best = (
            sum(len(encode(none, y, index, tables)) for y, index in self.held_out)
            for tables in (self.layer.tables, plain, with_contexts)
        )
        crops = len(self.held_out)
        return f"{crops} pieces that were not counted: {old} bytes before, {new} now, {best} with contexts"


def _weights(seen: Sequence[tuple[np.ndarray, np.ndarray]], expected: np.ndarray) -> np.ndarray:
    """The weights of contexts.Neighbourhood, int8 [phases - 1, M, 8], by least squares over all symbols, each error
    relative to the magnitude that was expected."""
    phases, channels = len(contexts.PHASES) - 1, len(seen[0][0])
    products = np.zeros((phases, channels, 8, 8)) + RIDGE * np.eye(8)
    targets = np.zeros((phases, channels, 8))
    for y, index in seen:
        around = contexts.Neighbourhood(expected[index], np.zeros((phases, channels, 8), np.int32))
        for phase, (row, column) in enumerate(contexts.PHASES):
            symbols = y[:, row::2, column::2]
            if phase:
                near = [around.part(around.symbols, phase, off) for off in contexts.AROUND]
                x = np.stack(near, 1).reshape(channels, 8, -1).astype(float)
                sure = (around.part(around.coming, phase) / contexts.UNIT + 0.1).reshape(channels, 1, -1) ** -2
                products[phase - 1] += (x * sure) @ x.transpose(0, 2, 1)
                targets[phase - 1] += ((x * sure) @ symbols.reshape(channels, -1, 1))[..., 0]
            around.put(phase, symbols)
    weights = np.linalg.solve(products, targets[..., None])[..., 0]
    return np.clip(np.rint(contexts.UNIT * weights), -127, 127).astype(np.int8)


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
        for n in bar:
            hold_out = n % HELD_OUT == HELD_OUT - 1
            x = pictures.sample(1, side, generator)
            draw, quality = torch.rand(2, generator=generator).tolist()
            factor, quality = 1 + 3 * draw, 1 + 99 * quality
            base.add(x - 0.5, quality, hold_out)
            small = resize(x, (round(side / factor), round(side / factor)))
            below = base.add(small - 0.5, quality, hold_out) + 0.5
            if codec.base.restorer is not None:
                below = below + codec.base.restorer(below, torch.full_like(below, 0.5), codec.base.level(quality))
            below = (below.clamp(0, 1) * 255).round() / 255
            residual.add(x - codec.liff(below, (side, side)), quality, hold_out)
    return base, residual


def rewrite(file: Path, tables: dict[str, np.ndarray]) -> None:
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
