"""Writes the golden files: ``python tests/make_golden.py``, once for each set of weights.

Each is a .cmps file, the SHA-256 of the symbols of every layer, and the pictures it decodes to (float32, CPU).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from compass_codec import container
from compass_codec.codec import Codec

FOLDER = Path(__file__).parent / "golden"
KINDS = {
    "portrait": ((97, 61), [1, 1.6, 3.2], 55),
    "fine": ((64, 64), [1, 2], 100),
    "coarse": ((130, 75), [1, 1.37, 2.9, 2.9], 5),
    "dot": ((1, 1), [1, 4], 50),
}


def symbol_hashes(codec: Codec, data: bytes) -> list[str]:
    """SHA-256 over the symbols of z, then of y, as little-endian int32, of each layer."""
    header, hashes = container.read_header(data), []
    for k, entry in enumerate(header.layers):
        if entry.side.empty:
            hashes.append("")
            continue
        layer = codec.residual if k else codec.base
        z, y, *_ = layer.parse(container.payload(header, data, k), (entry.height, entry.width))
        digest = hashlib.sha256()
        for symbols in (z, y):
            digest.update(symbols.astype("<i4").tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def main() -> None:
    from conftest import crop

    codec = Codec.load("cpu")
    FOLDER.mkdir(exist_ok=True)
    facts = {"model": codec.model, "symbols": {}}
    for name, (size, scales, quality) in KINDS.items():
        data = codec.encode(crop(*size), scales, quality).data
        (FOLDER / f"{name}.cmps").write_bytes(data)
        facts["symbols"][name] = symbol_hashes(codec, data)
        header = container.read_header(data)
        for k, picture in enumerate(codec.decode_layers(data, header, len(scales) - 1)):
            Image.fromarray(np.asarray(picture)).save(FOLDER / f"{name}.layer{k}.png", optimize=True)
    (FOLDER / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
