"""Broken .cmps files of every kind, and what must come of them: a picture, RGB or RGBA, or one clean error.

``python tests/mutate.py 100000`` tries that many; the tests try a small fixed set.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from attach import attach
from PIL import Image

from compass_codec import container, pictures
from compass_codec.codec import Codec
from compass_codec.errors import CompassError

MAX_PIXELS = 4096  # forged sizes above this are refused; those below cost little to decode
SLOWEST = 10.0  # seconds of processor time a case may take
MEMORY = 200 << 20  # bytes of memory that all cases together may add


def sign(header: container.Header, data: bytes, fields: dict[int, dict[str, Any]], parts: list[bytes]) -> bytes:
    """A file whose header says what ``fields`` say, and whose checksums are all right."""
    sizes, scales, qualities = [], [], []
    for k, entry in enumerate(header.layers[: len(parts)]):
        changed = fields.get(k, {})
        sizes.append((changed.get("width", entry.width), changed.get("height", entry.height)))
        scales.append(entry.scale)
        qualities.append(entry.quality)
    found = container.sections(header, bytes(data))
    return container.write(header.model, sizes, scales, qualities, parts, found)


def mutate(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """One broken file. Half of the kinds keep every checksum right, so that what is behind them is reached."""
    data = bytearray(files[rng.integers(len(files))])
    header = container.read_header(bytes(data))
    parts = [container.payload(header, bytes(data), k) for k in range(len(header.layers))]
    k = int(rng.integers(len(parts)))
    kind = int(rng.integers(14))
    if kind == 0:  # flipped bits
        for i in rng.integers(0, 8 * len(data), rng.integers(1, 9)):
            data[i // 8] ^= 1 << int(i % 8)
    elif kind == 1:  # cut off
        del data[rng.integers(0, len(data)) :]
    elif kind == 2:  # a piece removed, repeated or overwritten
        a, b = sorted(rng.integers(0, len(data) + 1, 2))
        data[a:b] = [b"", bytes(data[a:b]) * 2, rng.bytes(int(b - a))][rng.integers(3)]
    elif kind == 3:  # two files spliced
        other = files[rng.integers(len(files))]
        data = data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]
    elif kind == 4:  # noise behind the magic
        data = bytearray(container.MAGIC + rng.bytes(int(rng.integers(0, 200))))
    elif kind == 5:  # a header field overwritten, the header's checksum right
        head = bytearray(data[: header.length - 4])
        head[rng.integers(4, len(head))] = rng.integers(256)
        data = head + struct.pack("<I", zlib.crc32(head)) + data[header.length :]
    elif kind == 6:  # layers swapped
        data = bytearray(sign(header, data, {}, list(rng.permutation(np.array(parts, object)))))
    elif kind == 7:  # a layer of another file
        other = files[rng.integers(len(files))]
        theirs = container.read_header(other)
        parts[k] = container.payload(theirs, other, int(rng.integers(len(theirs.layers))))
        data = bytearray(sign(header, data, {}, parts))
    elif kind == 8:  # forged sizes
        side = {name: int(rng.integers(1, 200)) for name in ("width", "height")}
        data = bytearray(sign(header, data, dict.fromkeys(range(k, len(parts)), side), parts))
    elif kind == 9:  # a layer of noise
        parts[k] = rng.bytes(int(rng.integers(1, 300)))
        data = bytearray(sign(header, data, {}, parts))
    elif kind == 10:  # flipped bits in a layer
        part = bytearray(parts[k])
        for i in rng.integers(0, 8 * len(part), rng.integers(1, 5)):
            part[i // 8] ^= 1 << int(i % 8)
        parts[k] = bytes(part)
        data = bytearray(sign(header, data, {}, parts))
    elif kind == 11:  # a layer cut short or made longer
        parts[k] = (parts[k] + rng.bytes(20))[: rng.integers(1, len(parts[k]) + 20)]
        data = bytearray(sign(header, data, {}, parts))
    elif kind == 12:  # alpha of another size, of noise, or with flipped bits
        alpha = rng.integers(0, 256, rng.integers(1, 80, 2)).astype(np.uint8)
        part = bytearray(container.sections(header, bytes(data)).alpha.get(k) or pictures.alpha_to_bytes(alpha))
        if rng.integers(2):
            for i in rng.integers(0, 8 * len(part), rng.integers(1, 5)):
                part[i // 8] ^= 1 << int(i % 8)
        else:
            part = bytearray([pictures.alpha_to_bytes(alpha), rng.bytes(50)][rng.integers(2)])
        data = bytearray(attach(bytes(data), container.Sections(alpha={k: bytes(part)})))
    else:  # noise for metadata
        noise = container.Sections(*(rng.bytes(int(rng.integers(1, 300))) for _ in range(3)))
        data = bytearray(attach(bytes(data), noise))
    return bytes(data)


def attempt(codec: Codec, data: bytes) -> str:
    """Decode; the outcome in a word. Whatever is not a picture or a clean error is raised."""
    started = time.process_time()  # what others do on the machine must not count
    try:
        header = container.read_header(data, MAX_PIXELS)
        last = container.pick(header, len(data), None)
        *_, pixels = codec.decode_layers(data, header, last)
        entry, found = header.layers[last], container.sections(header, data, (last,))
        coded = found.alpha.get(last)
        alpha = None if coded is None else pictures.alpha_from_bytes(coded, (entry.width, entry.height))
        picture = pictures.with_alpha(pixels, alpha)
        assert picture.size == (entry.width, entry.height) and picture.width * picture.height <= MAX_PIXELS
        outcome = "picture" if alpha is None else "picture with alpha"
        pictures.to_bytes(picture, Path("x.png"), found)
    except CompassError as e:
        assert str(e) and "\n" not in str(e)
        outcome = type(e).__name__
    assert time.process_time() - started < SLOWEST, "too slow"
    return outcome


def run(codec: Codec, files: list[bytes], cases: int, seed: int) -> dict[str, int]:
    """Try ``cases`` broken files; how often each outcome came. A failing case is left in failed.cmps."""
    rng = np.random.default_rng(seed)
    for data in files:
        assert attempt(codec, data) in ("picture", "picture with alpha")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[str, int] = {}
    for case in range(cases):
        data = mutate(rng, files)
        try:
            outcome = attempt(codec, data)
        except BaseException:
            with Path("failed.cmps").open("wb") as file:
                file.write(data)
            print(f"case {case} of seed {seed} is in failed.cmps", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert added < MEMORY, f"{added} bytes of memory"
    return dict(sorted(outcomes.items()))


def samples(codec: Codec) -> list[bytes]:
    """Honest files to break."""
    from conftest import crop

    kinds = [((64, 64), [1, 2], 50), ((24, 17), [1, 1.5, 2.5], 40), ((16, 16), [1, 2], 90), ((9, 30), [1], 10)]
    files = [codec.encode(crop(*size), scales, quality).data for size, scales, quality in kinds]
    return [*files, with_everything(codec, crop(32, 24))]


def with_everything(codec: Codec, image: Image.Image) -> bytes:
    """A file of two layers with an ICC profile, EXIF, XMP and alpha."""
    from PIL import ImageCms

    source = pictures.Source(image, Image.radial_gradient("L").resize(image.size))
    layers, alphas = pictures.pyramid_alpha(source, [(image.width // 2, image.height // 2), image.size])
    exif = Image.Exif()
    exif[271] = "Cam"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    coded = {k: pictures.alpha_to_bytes(alpha) for k, alpha in enumerate(alphas)}
    sections = container.Sections(icc, exif.tobytes().removeprefix(b"Exif\0\0"), b"<x:xmpmeta/>", coded)
    return attach(codec.encode_layers(layers, [1, 2], 60).data, sections)


if __name__ == "__main__":
    import torch

    # oneDNN keeps kernels for every size it meets; over thousands of sizes that is no longer what one case needs
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")

    torch.set_num_threads(1)  # pictures this small gain nothing from more
    loaded = Codec.load("cpu")
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    for outcome, count in run(loaded, samples(loaded), total, seed).items():
        print(f"{count:8} {outcome}")
    print(f"{total} cases, {time.monotonic() - began:.0f} s")
