"""Where the time and the memory go: ``python -m compass_codec.measure.speed`` writes docs/performance.md.

Absolute times mean little on a machine that others use, so variants run side by side and ratios of processor time are
given. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compass_codec.measure.protocol import rows

if TYPE_CHECKING:
    from PIL import Image

    from compass_codec.weights import ModelSet

REPEATS, STARTS = 3, 10
SIZE = (768, 512)
SCALES = [1, 2, 4]


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least processor time of a few runs after a first one."""
    work()
    return min(spent(work) for _ in range(repeats))


def spent(work: Callable[[], Any]) -> float:
    """Its processor time in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def photograph(width: int, height: int) -> Image.Image:
    """The public-domain portrait that matplotlib ships, resized."""
    import matplotlib
    from PIL import Image

    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(file).convert("RGB").resize((width, height))


def arithmetic(work: Callable[[], Any]) -> float:
    """Thousands of multiply-accumulates of its convolutions and matrix products in PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    operations: int = counter.get_total_flops()
    return operations / 2000


def parameters(found: ModelSet) -> int:
    """Of all parts: neither integer forms of the same networks nor what training alone needs."""
    from safetensors import safe_open

    from compass_codec.networks.numbers import INTEGERS

    total = 0
    for part in found.spec["parts"]:
        with safe_open(found.folder / f"{part}.safetensors", "np") as file:
            names = [name for name in file.keys() if not name.startswith((INTEGERS, "tables.", "bottleneck."))]  # noqa: SIM118
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def profiles() -> str:
    """Encoding and decoding three layers with every installed set, in turn in one process."""
    import torch

    from compass_codec import pictures, weights
    from compass_codec.codec import Codec, layer_sizes
    from compass_codec.engines import threads
    from compass_codec.errors import WeightsError

    threads.use_one()
    installed = {found.profile: found for found in weights.sets() if not isinstance(found, WeightsError)}
    layers, pixels = pictures.pyramid(photograph(*SIZE), layer_sizes(SIZE, SCALES)), SIZE[0] * SIZE[1] / 1e6
    spent: dict[str, list[float]] = {}
    counted: dict[str, list[float]] = {}
    names = [weights.DEFAULT, *sorted(installed.keys() - {weights.DEFAULT})]
    for name in names:
        codec = Codec.load("cpu", precision="float32", model=name, engine="torch")
        data = codec.encode_layers(layers, SCALES, 60).data
        works: list[Callable[[], Any]] = [partial(codec.encode_layers, layers, SCALES, 60)]
        works += [partial(codec.decode, data, k) for k in range(len(SCALES))]
        spent[name] = [seconds(work) / pixels for work in works]
        counted[name] = [arithmetic(work) / (1e6 * pixels) for work in (works[0], works[-1])]
    body = []
    for name, (encode, *decode) in spent.items():
        lower = ", ".join(f"{100 * part / decode[-1]:.0f} %" for part in decode[:-1])
        ratios = [f"{a / b:.2f}" for a, b in ((encode, spent[names[0]][0]), (decode[-1], spent[names[0]][-1]))]
        sums = " and ".join(f"{each:.1f}" for each in counted[name])
        size = f"{parameters(installed[name]) / 1e6:.1f} M"
        body.append([name, f"{encode:.2f} s", f"{decode[-1]:.2f} s", " and ".join(ratios), lower, sums, size])
    head = ["profile", "encoding", "decoding", f"of the times of `{names[0]}`", "layers 0 and 1, of decoding all"]
    head += ["kMAC a pixel, encoding and decoding", "parameters"]
    return (
        f"PyTorch {torch.__version__} with one thread, float32. Processor time a megapixel "
        f"of the largest layer, multiply-accumulates of convolutions and matrix products a pixel of it.\n\n"
        f"{rows(head, body)}"
    )


ENGINES = {"torch": "PyTorch", "onnx": "ONNX Runtime"}


def engines_here() -> list[list[float]]:
    """Processor seconds of encoding and of decoding three layers with each of ENGINES and one thread, in turn in this
    process: the least of some runs."""
    from compass_codec import pictures
    from compass_codec.codec import Codec, layer_sizes
    from compass_codec.engines import threads

    threads.use_one()
    layers = pictures.pyramid(photograph(*SIZE), layer_sizes(SIZE, SCALES))
    works: list[Callable[[], Any]] = []
    for name in ENGINES:
        codec = Codec.load("cpu", precision="float32", engine=name)
        data = codec.encode_layers(layers, SCALES, 60).data
        works += [partial(codec.encode_layers, layers, SCALES, 60), partial(codec.decode, data)]
    turns = [[spent(work) for work in works] for _ in range(2 * REPEATS)]
    least = [min(each) for each in zip(*turns, strict=True)]
    return [least[k : k + 2] for k in range(0, len(least), 2)]


def all_engines() -> str:
    """The engines with one thread."""
    pixels, body = SIZE[0] * SIZE[1] / 1e6, []
    for name, times in zip(ENGINES.values(), alone("engines_here"), strict=True):
        body.append([name, *(f"{s:.2f} s, {s / pixels:.2f} s" for s in times)])
    head = ["engine", "encoding, and a megapixel", "decoding, and a megapixel"]
    return (
        f"`lean`, three layers of {SIZE[0]} x {SIZE[1]}, one thread, float32, in turn in one process: processor time. "
        f"What was tried and not kept, OpenVINO and int8, is in [notes/engines.md](notes/engines.md).\n\n"
        f"{rows(head, body)}"
    )


Size = tuple[int, int]  # width, height


def alone(function: str, *arguments: Any) -> Any:
    """What a function of this module gives in a process of its own."""
    code = f"from compass_codec.measure import speed; print(speed.{function}(*{arguments!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def encode_here(file: str, sizes: list[Size]) -> list[float]:
    """Encode a photograph with layers of these sizes to a file: processor seconds, and the peak of memory in MB."""
    from compass_codec import pictures
    from compass_codec.codec import Codec
    from compass_codec.measure.cost import peak_mb

    codec = Codec.load("cpu", precision="float32")
    layers = pictures.pyramid(photograph(*sizes[-1]), sizes)
    start = time.process_time()
    encoded = codec.encode_layers(layers, [width / sizes[0][0] for width, _ in sizes], 60)
    spent = time.process_time() - start
    Path(file).write_bytes(encoded.data)
    return [spent, peak_mb() * 2**20 / 1e6]


def decode_here(file: str, layer: int) -> list[float]:
    """Decode one layer of a file: processor seconds, the peak of memory in MB, and the bytes read."""
    from compass_codec.codec import Codec
    from compass_codec.jobs import paths
    from compass_codec.measure.cost import peak_mb

    codec = Codec.load("cpu", precision="float32")
    start = time.process_time()
    data, header, last = paths.read_prefix(Path(file), layer, 10**9)
    for _ in codec.decode_layers(data, header, last):
        pass
    return [time.process_time() - start, peak_mb() * 2**20 / 1e6, len(data)]


def times(size: Size, factors: Sequence[float]) -> list[Size]:
    """Layers that are ``size`` divided by each of ``factors``."""
    return [(round(size[0] / factor), round(size[1] / factor)) for factor in factors]


def memory(pictures: list[list[Size]], growth: bool = False) -> str:
    """Peak memory and time of encoding and decoding pictures with layers of these sizes, each in its own process; and
    the ``growth`` from the first picture to the last."""
    body, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/large.cmps"
        for sizes in pictures:
            encoding, decoding = alone("encode_here", file, sizes), alone("decode_here", file, len(sizes) - 1)
            pixels = sizes[-1][0] * sizes[-1][1] / 1e6
            measured = [text for s, mb, *_ in (encoding, decoding) for text in (f"{mb:.0f} MB", f"{s / pixels:.1f} s")]
            body.append([", ".join(f"{width} x {height}" for width, height in sizes), *measured])
            peaks.append((encoding[1], decoding[1], pixels))
    head = ["layers", "encoding: peak memory", "time a megapixel", "decoding: peak memory", "time a megapixel"]
    encode, decode, pixels = (last - first for first, last in zip(peaks[0], peaks[-1], strict=True))
    grown = f"\n\nFor each pixel more, encoding takes {encode / pixels:.1f} bytes more, decoding {decode / pixels:.1f}."
    return rows(head, body) + (grown if growth else "")


def thumbnail(sizes: list[Size]) -> str:
    """What the smallest layer of a large picture costs to decode, against all of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/large.cmps"
        alone("encode_here", file, sizes)
        decoded = [alone("decode_here", file, layer) for layer in range(len(sizes))]
    body = [
        [f"{k} ({width} x {height})", f"{s:.2f} s", f"{100 * s / decoded[-1][0]:.1f} %", f"{mb:.0f} MB", f"{read:.0f}"]
        for k, ((width, height), (s, mb, read)) in enumerate(zip(sizes, decoded, strict=True))
    ]
    return rows(["up to layer", "processor time", "of decoding all", "peak memory", "bytes read"], body)


def cold() -> str:
    """Processor time of short commands, against the least that such a program can take. Their bytecode is kept, as that
    of an installed package is. This process stays small: the peak of a child is never below what its parent holds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(*arguments: str, runs: int = STARTS) -> tuple[float, float]:
        """Processor seconds and peak memory in MB: the least of some runs."""

        def once() -> tuple[float, float]:
            process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, arguments)
            return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6

        once()
        seconds, memory = zip(*(once() for _ in range(runs)), strict=True)
        return min(seconds), min(memory)

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.cmps"
        empty, _ = run("-c", "import click; click.command()(lambda: None)([], standalone_mode=False)")
        torch, _ = run("-c", "import torch", runs=REPEATS)
        for width, height in ((64, 48), (256, 192), (512, 384)):
            alone("encode_here", str(file), times((width, height), (2, 1)))
            if not lines:
                info, _ = run("-m", "compass_codec", "info", str(file))
                lines = [f"`compass info` takes {info:.2f} s of processor time, an empty click program {empty:.2f} s."]
            decode = ("-m", "compass_codec", "decode", str(file), "--force", "-o", str(file.with_suffix(".png")))
            with_torch, _ = run(*decode, "--engine", "torch", runs=REPEATS)
            with_onnx, mb = run(*decode, "--engine", "onnx")
            lines.append(
                f"`compass decode` of two layers up to {width} x {height} takes {with_torch:.2f} s with PyTorch, and "
                f"{with_onnx:.2f} s and {mb:.0f} MB with ONNX Runtime; `python -c 'import torch'` takes {torch:.2f} s."
            )
    return "\n".join(f"- {line}" for line in lines)


def kept(file: Path) -> dict[str, str]:
    """The sections of a page that is there already, by their headings."""
    parts = re.split(r"^## (.*)\n+", file.read_text() if file.exists() else "", flags=re.MULTILINE)
    return {head: text.strip() for head, text in zip(parts[1::2], parts[2::2], strict=True)}


SECTIONS = (
    "Three layers of 768 x 512",
    "Engines",
    "Starting",
    "Pictures of any height",
    "Large pictures",
    "A thumbnail",
)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("docs"), show_default=True, help="Folder of the page."
)
@click.option("--large", is_flag=True, help="Measure large pictures instead, which takes ten minutes.")
@click.option("--profiles", "first", is_flag=True, help="Measure the first section alone.")
def main(out: Path, large: bool, first: bool) -> None:
    """Measure speed and memory, and write performance.md to the folder OUT. A run keeps the sections of the page that
    it does not measure."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "performance.md"
    if large:
        named = [(720, 360), (1280, 640), (1920, 960), (4000, 2000)]
        tables = memory([named, times((12000, 8000), (4, 2, 1))]), thumbnail(times((6000, 4000), (16, 4, 1)))
        found = dict(zip(SECTIONS[4:], tables, strict=True))
    elif first:
        found = {SECTIONS[0]: profiles()}
    else:
        heights = [times((1500, height), (4, 2, 1)) for height in (1000, 4000, 12000)]
        starting = cold()  # first, as long as this process is small
        found = dict(zip(SECTIONS, (profiles(), all_engines(), starting, memory(heights, growth=True)), strict=False))
    sections = kept(page) | found
    text = [
        "# Speed and memory",
        "Made by `make speed`; `make speed LARGE=--large` adds sections on large pictures and a thumbnail.",
    ]
    text += [f"## {head}\n\n{sections[head]}" for head in SECTIONS if head in sections]
    page.write_text("\n\n".join(text) + "\n")
    click.echo(page.read_text())


if __name__ == "__main__":
    main()
