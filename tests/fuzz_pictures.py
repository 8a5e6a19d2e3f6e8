"""Damaged pictures of every format that Pillow reads here: each is a picture or one clean error.

``python tests/fuzz_pictures.py 20000`` reads that many; the tests read a few hundred.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from compass_codec import pictures
from compass_codec.errors import PictureError

MODES = ("RGB", "RGBA", "L", "P", "1", "F")
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
# how files begin in formats that can be read and not written
MAGICS = (b"8BPS\0\1", b"\x59\xa6\x6a\x95\0\0\0\x09\0\0\0\x07", b"SIMPLE  =", b"/* XPM */\n", b"P7 332\n", b"FTEX")
MAGICS += (b"\0\0\2\0\1\0", b"\xb1\x68\xde\x3a", b"\x80\xe8\0\0", b"\0\0\0\0\x11\xaf", b"\0\0\0\x1a\0\0\0\1GIMP")


def samples() -> dict[str, bytes]:
    """A small picture in every format that can be written here and read, in several modes."""
    pictures.register()
    base = Image.radial_gradient("L").resize((20, 12))
    picture = Image.merge("RGBA", [base, base.rotate(180), base.transpose(0), base.rotate(90)])
    ImageDraw.Draw(picture).rectangle((3, 3, 9, 9), fill=(200, 30, 60, 255))
    found = {}
    for name in sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "CMPS"}):  # EPS runs Ghostscript
        for mode in MODES:
            file, extras = io.BytesIO(), {"exif": EXIF, "xmp": b"<x/>"} if name in pictures.WITH_EXTRAS else {}
            try:
                with pictures.library("this format does not hold this mode"):
                    picture.convert("RGB" if mode in "FP" else "RGBA").convert(mode).save(file, name, **extras)
                pictures.read(io.BytesIO(file.getvalue()))
            except PictureError:
                continue
            found[f"{name} {mode}"] = file.getvalue()
    return found


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """A byte inverted, a few bytes overwritten, cut off, a piece left out, a field set to an extreme, or noise."""
    broken, kind = bytearray(data), int(rng.integers(6))
    at = int(rng.integers(len(data)))
    if kind == 0:
        broken[at] ^= 255
    elif kind == 1:
        for i in rng.integers(0, len(data), rng.integers(1, 5)):
            broken[i] = rng.integers(256)
    elif kind == 2:
        del broken[at:]
    elif kind == 3:
        del broken[at : at + int(rng.integers(1, 9))]
    elif kind == 4:
        broken[at : at + 4] = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"][rng.integers(4)]
    else:
        broken = bytearray(MAGICS[rng.integers(len(MAGICS))] + rng.bytes(300))
    return bytes(broken)


def run(cases: int, seed: int) -> dict[str, int]:
    """Read ``cases`` damaged pictures; how often each outcome came. A failing case is left in failed.picture."""
    rng, files, outcomes = np.random.default_rng(seed), samples(), dict[str, int]()
    for case in range(cases):
        name = list(files)[case % len(files)]
        data = mutate(rng, files[name])
        try:
            source = pictures.read(io.BytesIO(data))
            assert source.image.mode == "RGB" and source.image.width and source.image.height
            assert source.alpha is None or source.alpha.size == source.image.size
            outcome = "picture"
        except PictureError as e:
            assert str(e) and len(str(e).splitlines()) == 1
            outcome = type(e.__cause__).__name__
        except BaseException:
            Path("failed.picture").write_bytes(data)
            print(f"case {case} of seed {seed}, {name}, is in failed.picture", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return dict(sorted(outcomes.items()))


if __name__ == "__main__":
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    for outcome, count in run(total, seed).items():
        print(f"{count:8} {outcome}")
    print(f"{total} cases, {time.monotonic() - began:.0f} s")
