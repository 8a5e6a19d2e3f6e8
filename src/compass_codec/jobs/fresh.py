"""Whether an output is what a job would make, so that a batch can leave it alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compass_codec import container
from compass_codec.errors import CompassError
from compass_codec.jobs.job import EncodeOptions
from compass_codec.jobs.paths import is_stream
from compass_codec.jobs.plan import plan_layers
from compass_codec.jobs.targets import HIGHEST, LOWEST, SIZE_WINDOW

ORIENTATION, ROTATED = 0x0112, {5, 6, 7, 8}  # the EXIF tag, and its values that swap width and height


def encoded_alike(source: Path, target: Path, options: EncodeOptions) -> bool:
    """Whether ``target`` has the header that ``options`` give a picture of this size and, to be verified, is sound. A
    header does not show the target of a metric, the effort or weights of layers."""
    if is_stream(source):
        return False
    try:
        with target.open("rb") as file:
            data = file.read() if options.verify else file.read(container.MAX_HEADER)
        header = container.read_header(data, container.MAX_SIDE**2)
    except CompassError:
        return False
    if options.verify and set(container.states(header, data)) != {"ok"}:
        return False
    return any(_made_alike(header, target, size, options) for size in _picture_sizes(source))


def _made_alike(header: container.Header, target: Path, size: tuple[int, int], options: EncodeOptions) -> bool:
    """The same for one (width, height) that the picture may have."""
    entries = header.layers
    if options.scales:  # from which, and from the last, all other sizes follow
        sizes, scales, qualities = [size], list(options.scales), list(options.qualities)
    else:
        plan = plan_layers(size, options)
        sizes, scales, qualities = plan.sizes, plan.scales, plan.qualities
    if (
        header.model != options.identity()
        or [(e.width, e.height) for e in entries][-len(sizes) :] != sizes
        or [e.scale for e in entries] != scales
        or target.stat().st_size != header.end
        or (options.strip and any(not container.KINDS[s.kind].of_layer for s in header.sections))
    ):
        return False
    if options.target is None:
        wanted = qualities * (len(entries) if len(qualities) == 1 else 1)
        return [e.quality for e in entries] == [container.stored_quality(q) for q in wanted]
    quality = entries[0].quality
    if any(e.quality != quality for e in entries):
        return False
    if not options.target.of_size:
        return True
    length, most = header.end, options.target.most_bytes(entries[-1].width * entries[-1].height)
    return quality == LOWEST if length > most else length >= (1 - SIZE_WINDOW) * most or quality == HIGHEST


def decoded_alike(path: Path, entry: container.Layer) -> bool:
    """Is there a picture of this layer's size? What Pillow writes and does not read, such as PDF, is known by its first
    bytes alone."""
    from PIL import Image

    from compass_codec import pictures

    if not path.is_file():
        return False
    size = (entry.width, entry.height)
    try:
        if pictures.check_format(path) in Image.OPEN:
            with Image.open(path) as image:
                return image.size == size
        blank = pictures.to_bytes(Image.new("RGB", size), path)
        with path.open("rb") as file:
            return file.read(8) == blank[:8]
    except Exception:  # whatever Pillow says of a broken file, it is no such picture
        return False


def _picture_sizes(path: Path) -> Iterator[tuple[int, int]]:
    """(width, height) of a picture once it is upright: what its head says, where that can be told, then what its pixels
    say. The two differ for formats that Pillow turns or enlarges by itself. Raises PictureError."""
    from PIL import Image

    from compass_codec import pictures

    try:
        with Image.open(path) as image:
            width, height = image.size
            size = (height, width) if image.getexif().get(ORIENTATION) in ROTATED else (width, height)
    except Exception:  # Pillow has no error of its own for bad EXIF; read() says what is wrong, or that nothing is
        size = None
    if size:
        yield size
    yield pictures.read(path).image.size
