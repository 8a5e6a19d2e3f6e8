"""Writes the golden files of installed sets: ``python tests/make_golden.py [PROFILE...]``, after new weights.

Each is a .cmps file, the SHA-256 of the symbols of every layer, and the pictures it decodes to (float32, CPU).
rate.json has the bytes and PSNR of three crops. Documents with figures of the sets are brought up to date:
docs/format.md walks through the smallest file of the default set, docs/models.md and docs/serving.md show what commands
print.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
from attach import attach
from conftest import compass, crop, photo
from PIL import Image

from compass_codec import container, pictures, weights
from compass_codec.codec import ONE_COLOUR, Codec
from compass_codec.metrics import psnr

GOLDEN = Path(__file__).parent / "golden"
DOCS = Path(__file__).parents[1] / "docs"
FETCHED = re.compile(r"(\d+) bytes fetched of (\d+)|curl -s -r 0-(\d+)")  # in docs/serving.md
KINDS = {
    "portrait": ((97, 61), [1, 1.6, 3.2], 55),
    "fine": ((64, 64), [1, 2], 100),
    "coarse": ((130, 75), [1, 1.37, 2.9, 2.9], 5),
    "large": ((200, 150), [1, 2], 80),
    "dot": ((1, 1), [1, 4], 50),
    "small": ((8, 8), [1, 8], 50),
}
CROPS, QUALITIES = ((180, 60), (60, 330), (300, 450)), (15, 60, 95)  # what rate.json is of


def symbol_hashes(codec: Codec, data: bytes) -> list[str]:
    """SHA-256 over the symbols of z, then of y, as little-endian int32, of each layer; over the bytes of one without
    symbols, of one colour."""
    header, hashes = container.read_header(data), []
    for k, entry in enumerate(header.layers):
        layer, part = codec.residual if k else codec.base, container.payload(header, data, k)
        if part[0] == ONE_COLOUR:
            hashes.append(hashlib.sha256(part).hexdigest())
            continue
        z, y, *_ = layer.parse(part, (entry.height, entry.width))
        digest = hashlib.sha256()
        for symbols in (z, y):
            digest.update(symbols.astype("<i4").tobytes())
        hashes.append(digest.hexdigest())
    return hashes


class Walk:
    """Lines of a walk through a file: its bytes in hex, and what they are."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.lines = data, 0, []

    def take(self, count: int, what: str) -> None:
        """The next bytes, 16 to a line."""
        for at in range(self.at, self.at + count, 16):
            piece = self.data[at : min(at + 16, self.at + count)].hex(" ")
            self.lines.append(f"{piece:47}  {what if at == self.at else ''}".rstrip())
        self.at += count

    def varint(self, what: str) -> int:
        """The next number, named in ``what`` as {}."""
        end = next(i for i in range(self.at, len(self.data)) if self.data[i] < 128) + 1
        value = sum((byte & 127) << 7 * i for i, byte in enumerate(self.data[self.at : end]))
        signed = value // 2 if value % 2 == 0 else -(value + 1) // 2
        self.take(end - self.at, what.format(signed))
        return signed

    def text(self) -> str:
        assert self.at == len(self.data)
        return "\n".join(self.lines) + "\n"


def plain_example(data: bytes) -> str:
    """A walk through a file without sections."""
    header, walk = container.read_header(data), Walk(data)
    for count, what in (
        (4, 'magic "CMPS"'),
        (1, f"version {container.VERSION}"),
        (1, "flags"),
        (6, f"model {header.model}"),
    ):
        walk.take(count, what)
    walk.take(1, f"{len(header.layers)} layers")
    for k, layer in enumerate(header.layers):
        walk.varint(f"layer {k}: width {layer.width}")
        walk.varint(f"height {layer.height}")
        walk.varint(f"scale factor, digits {data[walk.at]}")
        walk.take(1, f"times 10^{data[walk.at]}")
        walk.varint(f"quality {layer.quality:g}, in hundredths")
        walk.varint(f"length {layer.length}")
        walk.take(4, "checksum of the layer")
    walk.take(4, "checksum of the header")
    for k, layer in enumerate(header.layers):
        if layer.length == 1 + 3 and data[walk.at] == ONE_COLOUR:
            walk.take(1, f"layer {k}: one colour")
            walk.take(3, "red, green, blue")
            continue
        for _ in range(walk.varint(f"layer {k}: {{}} escapes")):
            walk.varint("escaped value {}")
        walk.take(layer.end - walk.at, "range-coded words")
    return walk.text()


def example_with_sections(data: bytes) -> str:
    """A walk through the same file with alpha for its layer 0, 1 x 1, and XMP; what differs is marked."""
    alpha = pictures.alpha_to_bytes(np.full((1, 1), 128, np.uint8))
    full = attach(data, container.Sections(alpha={0: alpha}, xmp=b"<x/>"))
    header, plain, walk = container.read_header(full), container.read_header(data), Walk(full)
    walk.take(5, f'magic "CMPS", version {container.VERSION}')
    walk.take(1, "* flags: there is a table of sections")
    walk.take(7, "model, 2 layers")
    entries = plain.length - 4 - walk.at
    walk.take(entries // 2, "layer 0")
    walk.take(entries - entries // 2, "layer 1")
    walk.take(1, "* 2 sections")
    for what, length in (("alpha of layer 0", len(alpha)), ("XMP", 4)):
        walk.take(2, f"* {what}")
        walk.take(1, f"* length {length}")
        walk.take(4, "* checksum of the section")
    walk.take(4, "* checksum of the header")
    walk.take(header.layers[0].length, "layer 0")
    for count, what in (
        (16, 'alpha of layer 0: "RIFF", ..., "WEBPVP8L"'),
        (9, "2F, width - 1 and height - 1"),
        (len(alpha) - 25, "1 x 1 sample of 128"),
    ):
        walk.take(count, what)
    walk.take(header.layers[1].length, "layer 1")
    walk.take(4, 'XMP: "<x/>"')
    return walk.text()


def measured(codec: Codec) -> dict[str, list[list[float]]]:
    """Bytes and PSNR in dB of the top layer of two, of crops of the portrait, at each of QUALITIES."""
    found = {}
    for left, top in CROPS:
        image = photo().crop((left, top, left + 144, top + 112))
        points = []
        for quality in QUALITIES:
            encoded = codec.encode(image, [1, 2], quality)
            points.append([len(encoded.data), round(psnr(np.asarray(image), encoded.layers[-1]), 3)])
        found[f"{left},{top}"] = points
    return found


def make(profile: str) -> None:
    """The golden files of an installed set."""
    codec, folder = Codec.load("cpu", precision="float32", model=profile), GOLDEN / profile
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rate.json").write_text(json.dumps(measured(codec), indent=1) + "\n")
    facts = {"model": codec.model, "symbols": {}}
    for name, (size, scales, quality) in KINDS.items():
        data = codec.encode(crop(*size), scales, quality).data
        (folder / f"{name}.cmps").write_bytes(data)
        facts["symbols"][name] = symbol_hashes(codec, data)
        header = container.read_header(data)
        for k, picture in enumerate(codec.decode_layers(data, header, len(scales) - 1)):
            Image.fromarray(np.asarray(picture)).save(folder / f"{name}.layer{k}.png", optimize=True)
    (folder / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


def with_walks(text: str) -> str:
    """docs/format.md with the walks through the golden file as it is."""
    small = (GOLDEN / weights.DEFAULT / "small.cmps").read_bytes()
    examples = iter([example_with_sections(small), plain_example(small)])
    return re.sub(r"```text\n.*?```", lambda _: f"```text\n{next(examples)}```", text, flags=re.DOTALL)


def with_models(text: str) -> str:
    """docs/models.md with what ``compass models`` prints of the installed sets."""
    shown = compass("models").out
    return re.sub(r"(\$ compass models\n).*?```", lambda found: f"{found[1]}{shown}```", text, flags=re.DOTALL)


def with_fetched(text: str) -> str:
    """docs/serving.md with the bytes of the portrait in layers 1, 2, 3.2 that its layer 1 needs, and of all of them."""
    data = Codec.load("cpu", precision="float32").encode(photo(), [1, 2, 3.2]).data
    end = container.read_header(data).layers[1].end
    return FETCHED.sub(
        lambda found: f"{end} bytes fetched of {len(data)}" if found[1] else f"curl -s -r 0-{end - 1}", text
    )


def main() -> None:
    for profile in sys.argv[1:] or [found.profile for found in weights.sets()]:
        make(profile)
    for name, change in (("format", with_walks), ("models", with_models), ("serving", with_fetched)):
        page = DOCS / f"{name}.md"
        page.write_text(change(page.read_text()))


if __name__ == "__main__":
    main()
