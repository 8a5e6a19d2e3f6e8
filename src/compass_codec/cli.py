"""The ``compass`` command: parses arguments, prints tables, and turns errors into one line."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from compass_codec import __version__, container
from compass_codec.errors import CompassError, OptionError
from compass_codec.training.command import train

STDIO = Path("-")
HEADER_READ = 4096  # more than any header


class Scales(click.ParamType):
    """Scale factors separated by commas."""

    name = "S0,S1,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return container.check_scales([float(part) for part in str(value).split(",")])
        except OptionError as e:
            self.fail(f"{value}: {e}", param, ctx)
        except ValueError:
            self.fail(f"{value}: not numbers separated by commas", param, ctx)


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """What goes wrong inside is reported as one line that begins with the file's name."""
    name = "standard input" if path == STDIO else str(path)
    try:
        yield
    except CompassError as e:
        raise click.ClickException(f"{name}: {e}") from e
    except BrokenPipeError:
        raise
    except OSError as e:
        raise click.ClickException(f"{e.filename or name}: {e.strerror or e}") from e
    except (MemoryError, RuntimeError) as e:
        # PyTorch has no error of its own for this on the CPU
        if isinstance(e, RuntimeError) and "allocate memory" not in str(e) and "out of memory" not in str(e):
            raise
        raise click.ClickException(f"{name}: not enough memory") from e


def check_target(path: Path, force: bool, source: Path) -> None:
    """Refuse early what could not be written after minutes of work."""
    if path == STDIO:
        return
    if source != STDIO and path.exists() and source.exists() and path.samefile(source):
        raise click.ClickException(f"{path}: the output would overwrite the input")
    if path.is_dir():
        raise click.ClickException(f"{path}: is a directory")
    if path.is_file() and not force:
        raise click.ClickException(f"{path}: exists already; --force overwrites it")
    if not path.parent.is_dir():
        raise click.ClickException(f"{path}: no such directory")
    if not os.access(path.parent, os.W_OK):
        raise click.ClickException(f"{path}: the directory cannot be written to")


def put(path: Path, data: bytes) -> None:
    """Write the file whole or not at all, or to standard output."""
    from compass_codec.pictures import write_file

    with blame(path):
        if path == STDIO:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            write_file(path, data)


def read_prefix(path: Path, layer: int | None, max_pixels: int) -> tuple[bytes, container.Header, int]:
    """The part of a .cmps file that ``layer`` needs (default: the highest complete), its header and that layer."""
    with blame(path):
        if path == STDIO:
            data = sys.stdin.buffer.read()
            header = container.read_header(data, max_pixels)
            return data, header, container.pick(header, len(data), layer)
        with path.open("rb") as file:
            data = file.read(HEADER_READ)
            header = container.read_header(data, max_pixels)
            last = container.pick(header, os.fstat(file.fileno()).st_size, layer)
            end = header.layers[last].end
            return data[:end] + file.read(max(0, end - len(data))), header, last


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first row as their heads, aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite the output if it exists.")
quiet_option = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=container.MAX_PIXELS,
    show_default=True,
    help="Refuse files whose largest layer has more pixels.",
)
weights_option = click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False), help="Folder of other weights than the installed."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="compass %(version)s")
def cli() -> None:
    """One picture, many sizes, one file: layered image compression with learned codecs."""


@cli.command()
@click.argument("image", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-s", "--scales", type=Scales(), required=True, help="Size of each layer relative to the first.")
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), help="Default: IMAGE with .cmps.")
@click.option(
    "-q", "--quality", type=click.FloatRange(1, 100), default=60, show_default=True, help="1 (small) to 100 (good)."
)
@click.option("--verify", is_flag=True, help="Decode what was written and compare it with the encoder's pictures.")
@force_option
@device_option
@weights_option
@quiet_option
def encode(
    image: Path,
    scales: list[float],
    output: Path | None,
    quality: float,
    verify: bool,
    force: bool,
    device: str,
    weights: Path | None,
    quiet: bool,
) -> None:
    """Encode IMAGE once, as one layer for each scale factor; the last layer is the picture itself.

    \b
    compass encode photo.png --scales 1,2.0,3.2
    compass encode photo.jpg --scales 1,1.5,4 -q 80 -o web/photo.cmps
    """
    if output is None:
        output = STDIO if image == STDIO else image.with_suffix(".cmps")
    check_target(output, force, image)
    from compass_codec import pictures

    with blame(image):
        picture = pictures.read(io.BytesIO(sys.stdin.buffer.read()) if image == STDIO else image)
    with blame(image):
        from compass_codec import codec

        loaded = codec.shared(device, weights)
        layers = pictures.pyramid(picture, codec.layer_sizes(picture.size, scales))
        result = loaded.encode_layers(layers, scales, quality)
    put(output, result.data)
    if verify:
        with blame(output):
            data = result.data if output == STDIO else output.read_bytes()
            header = container.read_header(data)
            for k, decoded in enumerate(loaded.decode_layers(data, header, len(scales) - 1)):
                if not (decoded == result.layers[k]).all():
                    raise CompassError(f"layer {k} does not decode to what the encoder reconstructed")
    if not quiet:
        header = container.read_header(result.data)
        rows = [["layer", "size", "scale", "bytes", "bpp", "acc. bytes", "acc. bpp", "PSNR"]]
        for k, entry in enumerate(header.layers):
            pixels, length = entry.width * entry.height, entry.end - (header.layers[k - 1].end if k else 0)
            row = [str(k), f"{entry.width} x {entry.height}", f"{entry.scale:g}", str(length)]
            row += [f"{8 * length / pixels:.3f}", str(entry.end), f"{8 * entry.end / pixels:.3f}"]
            rows.append([*row, f"{pictures.psnr(layers[k], result.layers[k]):.2f}"])
        note = ", verified" if verify else ""
        click.echo(f"{table(rows)}\n{output}: {len(result.data)} bytes, quality {quality:g}{note}", err=output == STDIO)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-l", "--layer", type=click.IntRange(0), help="Which layer; default: the highest that the file holds.")
@click.option("--all", "every", is_flag=True, help="Write every layer that the file holds.")
@click.option("--best-effort", is_flag=True, help="From a damaged file, take the highest layer that is sound.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Default: FILE with .layerK.png. With --all, .layerK goes before the extension.",
)
@force_option
@device_option
@weights_option
@pixels_option
@quiet_option
def decode(
    file: Path,
    layer: int | None,
    every: bool,
    best_effort: bool,
    output: Path | None,
    force: bool,
    device: str,
    weights: Path | None,
    max_pixels: int,
    quiet: bool,
) -> None:
    """Decode a layer of FILE to a picture; only the part of the file up to that layer is read.

    \b
    compass decode photo.cmps                     the largest layer, to photo.layer2.png
    compass decode photo.cmps --layer 0 -o thumb.jpg
    compass decode photo.cmps --all
    """
    if every and layer is not None:
        raise click.UsageError("--all and --layer exclude each other")
    if every and output == STDIO:
        raise click.UsageError("--all cannot write to standard output")
    data, header, last = read_prefix(file, layer, max_pixels)
    if best_effort:
        sound = [state == "ok" for state in container.states(header, data)]
        last = min(last, [*sound, False].index(False) - 1)
        if last < 0:
            raise click.ClickException(f"{file}: layer 0 is damaged; nothing decodes")
    name = output or (Path("decoded.png") if file == STDIO else file.with_suffix(".png"))
    wanted = {
        k: name if output and not every else name.with_name(f"{name.stem}.layer{k}{name.suffix}")
        for k in (range(last + 1) if every else [last])
    }
    from compass_codec import pictures

    for target in wanted.values():
        if target != STDIO:
            with blame(target):
                pictures.check_format(target)
        check_target(target, force, file)
    from PIL import Image

    with blame(file):
        from compass_codec import codec

        decoded = codec.shared(device, weights).decode_layers(data, header, last)
        kept = [(k, picture) for k, picture in enumerate(decoded) if k in wanted]
    for k, picture in kept:
        target = wanted[k]
        with blame(target):
            encoded = pictures.to_bytes(Image.fromarray(picture), Path("x.png") if target == STDIO else target)
        put(target, encoded)
        if not quiet and target != STDIO:
            click.echo(f"{target}: layer {k}, {picture.shape[1]} x {picture.shape[0]}")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(file: Path, as_json: bool) -> None:
    """Show what FILE holds: sizes, scale factors, quality, and the bytes that each layer needs."""
    with blame(file):
        data = sys.stdin.buffer.read() if file == STDIO else file.read_bytes()
        header = container.read_header(data, max_pixels=container.MAX_SIDE**2)
        states = container.states(header, data)
    if as_json:
        layers = [
            {
                "layer": k,
                "width": e.width,
                "height": e.height,
                "scale": e.scale,
                "quality": e.quality,
                "start": e.start,
                "length": e.length,
                "end": e.end,
                "state": states[k],
            }
            for k, e in enumerate(header.layers)
        ]
        facts = {"file": str(file), "size": len(data), "version": container.VERSION, "model": header.model}
        click.echo(json.dumps(facts | {"header": header.length, "layers": layers}, indent=2))
        return
    click.echo(f"{file}: compass version {container.VERSION}, {len(data)} bytes, weights {header.model}")
    rows = [["layer", "size", "scale", "quality", "bytes", "first N bytes", ""]]
    for k, e in enumerate(header.layers):
        state = "" if states[k] == "ok" else states[k]
        row = [str(k), f"{e.width} x {e.height}", f"{e.scale:g}", f"{e.quality:g}", str(e.length), str(e.end), state]
        rows.append(row)
    click.echo("\n".join(line.rstrip() for line in table(rows).splitlines()))


cli.add_command(train)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command; every error is one line on stderr, exit code 1, or 2 for wrong usage."""
    try:
        sys.exit(cli.main(args, standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as e:
        click.echo(f"compass: {' '.join(e.format_message().split())}", err=True)
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("compass: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
