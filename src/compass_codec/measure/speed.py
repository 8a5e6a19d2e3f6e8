"""Where the time and the memory go: ``python -m compass_codec.measure.speed`` writes docs/performance.md.

Absolute times mean little on a machine that others use, so variants run side by side and ratios of processor time are
given. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from PIL import Image

REPEATS = 3
SIZE = (768, 512)
SCALES = [1, 2, 4]


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least processor time of a few runs after a first one."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def photograph(width: int, height: int) -> Image.Image:
    """The public-domain portrait that matplotlib ships, resized."""
    import matplotlib
    from PIL import Image

    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(file).convert("RGB").resize((width, height))


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def timed(codec: Any) -> Iterator[dict[str, float]]:
    """Processor seconds spent in each part of ``codec`` while this is open; no part calls another."""
    from compass_codec import entropy

    spent: dict[str, float] = defaultdict(float)
    replaced = []

    def watch(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[label] += time.process_time() - start

        replaced.append((owner, name, original))
        setattr(owner, name, wrapped)

    watch(codec.predictor.extractor, "forward", "LIFF: features")
    watch(codec.predictor, "_maps", "LIFF: maps")
    watch(codec.predictor, "_query", "LIFF: MLP at every pixel")
    for layer in (codec.base, codec.residual):
        watch(layer.codec, "analysis", "analysis")
        watch(layer.codec, "hyper_analysis", "hyper-analysis")
        watch(layer.codec, "synthesis", "synthesis")
        watch(layer.hyper, "forward", "integer hyper-decoder")
    watch(entropy, "encode", "entropy coding")
    watch(entropy.Decoder, "z", "entropy coding")
    watch(entropy.Decoder, "y", "entropy coding")
    try:
        yield spent
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def factored() -> str:
    """LIFF in its factored form against the naive one."""
    import torch

    from compass_codec.codec import Codec
    from compass_codec.measure import naive
    from compass_codec.networks.liff import bicubic

    body = []
    with torch.inference_mode():
        network: Any = Codec.load("cpu", precision="float32").predictor
        for factor in (1.2, 2.0, 4.0):
            low = torch.rand(1, 3, round(256 / factor), round(384 / factor))
            a = seconds(lambda low=low: naive.liff(network, low, (256, 384)))  # type: ignore[misc]
            b = seconds(lambda low=low: network(low, (256, 384)))  # type: ignore[misc]
            difference = (naive.liff(network, low, (256, 384)) - network(low, (256, 384))).abs().max()
            positions = (bicubic(low, (256, 384)) - bicubic(low.double(), (256, 384))).abs().max()
            body.append([f"{factor:g}", f"{a / b:.1f} times", f"{difference:.0e}", f"{positions:.0e}"])
    head = ["factor", "the factored form is faster", "largest difference", "PyTorch's bicubic, float32 to float64"]
    return rows(head, body)


def whole() -> tuple[str, dict[str, dict[str, float]]]:
    """Encoding and decoding three layers: against the usual way, and what each part takes."""
    import torch

    from compass_codec import pictures
    from compass_codec.codec import Codec, fastest, layer_sizes
    from compass_codec.measure import naive

    layers = pictures.pyramid(photograph(*SIZE), layer_sizes(SIZE, SCALES))
    codec, parts = Codec.load("cpu", precision="float32"), {}
    data = codec.encode_layers(layers, SCALES, 60).data
    totals = {
        "encode": seconds(lambda: codec.encode_layers(layers, SCALES, 60)),
        "decode": seconds(lambda: codec.decode(data)),
    }
    works: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode_layers(layers, SCALES, 60),
        "decode": lambda: codec.decode(data),
    }
    for name, work in works.items():
        with timed(codec) as spent:
            for _ in range(REPEATS):
                start = time.process_time()
                work()
                spent["everything"] += time.process_time() - start
        inside = sum(value for key, value in spent.items() if key != "everything")
        parts[name] = {**spent, "the rest": spent["everything"] - inside}
    with torch.inference_mode():
        usual: Any = Codec.load("cpu", precision="float32")
        for network in (usual.base.codec, usual.residual.codec, usual.predictor):
            network.to(memory_format=torch.contiguous_format)
        level = usual.base.level(60)
        ratio = (totals["encode"] + totals["decode"]) / seconds(lambda: naive.code(usual, layers, level), 1)
    in_short = "`--precision auto` computes in it on this processor too"
    if (precision := fastest(codec.device)) != "float32":
        short = Codec.load("cpu", precision=precision)
        encoding = seconds(lambda: short.encode_layers(layers, SCALES, 60)) / totals["encode"]
        decoding = seconds(lambda: short.decode(data)) / totals["decode"]
        in_short = (
            f"in {precision}, which `--precision auto` takes on this processor, encoding takes {100 * encoding:.0f} % "
            f"of it and decoding {100 * decoding:.0f} %"
        )
    layer_times = [seconds(lambda k=k: codec.decode(data, k)) for k in range(3)]  # type: ignore[misc]
    pixels = SIZE[0] * SIZE[1] / 1e6
    text = [
        f"- Encoding and decoding take {100 * ratio:.0f} % of the usual way's time (a filter for every pixel, channels "
        "first, a Gaussian for every symbol; the same weights).",
        f"- Encoding: {totals['encode'] / pixels:.1f} s of processor time a megapixel of the largest layer; decoding: "
        f"{totals['decode'] / pixels:.1f} s.",
        "- Decoding layer 0, 1 and 2 takes "
        + ", ".join(f"{100 * t / layer_times[-1]:.0f} %" for t in layer_times)
        + " of decoding everything.",
        f"- All of this page is in float32; {in_short}.",
    ]
    return "\n".join(text), parts


Size = tuple[int, int]  # width, height


def alone(function: str, *arguments: Any) -> list[float]:
    """What a function of this module gives in a process of its own."""
    code = f"from compass_codec.measure import speed; print(speed.{function}(*{arguments!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


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


def memory(pictures: list[list[Size]]) -> str:
    """Peak memory and time of encoding and decoding pictures with layers of these sizes, each in its own process."""
    body = []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/large.cmps"
        for sizes in pictures:
            encoding, decoding = alone("encode_here", file, sizes), alone("decode_here", file, len(sizes) - 1)
            pixels = sizes[-1][0] * sizes[-1][1] / 1e6
            measured = [text for s, mb, *_ in (encoding, decoding) for text in (f"{mb:.0f} MB", f"{s / pixels:.1f} s")]
            body.append([", ".join(f"{width} x {height}" for width, height in sizes), *measured])
    return rows(
        ["layers", "encoding: peak memory", "time a megapixel", "decoding: peak memory", "time a megapixel"], body
    )


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
    """Processor time of short commands, against the least that such a program can take."""
    from compass_codec.codec import Codec

    def run(*arguments: str) -> float:
        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        once()
        return min(once() for _ in range(REPEATS))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.cmps"
        file.write_bytes(Codec.load("cpu", precision="float32").encode(photograph(64, 48), [1, 2], 60).data)
        empty = run("-c", "import click; click.command()(lambda: None)([], standalone_mode=False)")
        info = run("-m", "compass_codec", "info", str(file))
        torch = run("-c", "import torch")
        decode = run("-m", "compass_codec", "decode", str(file), "--force", "-o", str(file.with_suffix(".png")))
    return (
        f"- `compass info` takes {info - empty:.2f} s of processor time more than an empty click program.\n"
        f'- `compass decode` of a small file takes {decode / torch:.2f} times as long as `python -c "import torch"`.'
    )


def plot(parts: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of what each part takes of encoding and of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in parts["encode"] if name != "everything"]
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    left = dict.fromkeys(parts, 0.0)
    for name, colour in zip(names, colours[: len(names)], strict=True):
        shares = [100 * parts[way].get(name, 0.0) / parts[way]["everything"] for way in parts]
        axis.barh(list(parts), shares, left=list(left.values()), color=colour, label=name)
        left = {way: left[way] + share for way, share in zip(parts, shares, strict=True)}
    axis.set_xlabel("% of processor time")
    axis.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def kept(file: Path) -> dict[str, str]:
    """The sections of a page that is there already, by their headings."""
    parts = re.split(r"^## (.*)\n+", file.read_text() if file.exists() else "", flags=re.MULTILINE)
    return {head: text.strip() for head, text in zip(parts[1::2], parts[2::2], strict=True)}


def ordinary() -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The sections on pictures of everyday size, and what each part takes."""
    import torch

    text, parts = whole()
    names = sorted(parts["encode"] | parts["decode"], key=lambda n: -parts["encode"].get(n, 0))
    body = [
        [n, *(f"{100 * parts[w].get(n, 0) / parts[w]['everything']:.1f} %" for w in parts)]
        for n in names
        if n != "everything"
    ]
    first = f"PyTorch {torch.__version__} with {torch.get_num_threads()} threads.\n\n{text}"
    three = "\n\n".join([first, rows(["part", *parts], body), "![What each part takes](performance.svg)"])
    heights = [times((1500, height), (4, 2, 1)) for height in (500, 1000, 2000)]
    sections = dict(zip(SECTIONS, (three, factored(), cold(), memory(heights)), strict=False))
    return sections, parts


SECTIONS = ("Three layers of 768 x 512", "LIFF", "Starting", "Pictures of any height", "Large pictures", "A thumbnail")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
@click.option("--large", is_flag=True, help="Measure large pictures instead, which takes about an hour.")
def main(out: Path, large: bool) -> None:
    """Measure speed and memory and write performance.md and performance.svg to the folder OUT. What is measured with
    --large stays in the page when the rest is measured anew, and the reverse."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "performance.md"
    if large:
        named = [(720, 360), (1280, 640), (1920, 960), (4000, 2000)]
        tables = memory([named, times((12000, 8000), (4, 2, 1))]), thumbnail(times((6000, 4000), (16, 4, 1)))
        found = dict(zip(SECTIONS[4:], tables, strict=True))
    else:
        found, parts = ordinary()
        plot(parts, out / "performance.svg")
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
