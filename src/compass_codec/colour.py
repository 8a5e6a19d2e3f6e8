"""Colour spaces: profiles made from what a file says in another way, and pictures brought to sRGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

from PIL import Image, ImageChops

# of white, red, green and blue, x and y of each, by their code points in ITU-T H.273; 2: not said
PRIMARIES: dict[int, tuple[float, ...]] = {
    1: (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    22: (0.3127, 0.329, 0.63, 0.34, 0.295, 0.605, 0.155, 0.077),
}
PRIMARIES |= {2: PRIMARIES[1], 7: PRIMARIES[6]}
# powers by their code points; None: sRGB's curve, which browsers take for those of video too
CURVES: dict[int, float | None] = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}


def said_profile(image: Image.Image, head: bytes, notes: list[str]) -> bytes | None:
    """The ICC profile that holds for an opened file, of which ``head`` is the beginning: its own, or one made from what
    PNG (cICP; gAMA and cHRM) and AVIF and HEIC (nclx) say instead; None for sRGB. Raises anything on garbage."""
    icc, info = image.info.get("icc_profile") or None, image.info
    codes = None
    if image.format == "PNG":
        codes = _png_chunk(head, b"cICP")
    elif image.format in ("AVIF", "HEIF") and icc is None and (at := head.find(b"colrnclx")) > 0:
        codes = head[at + 9 : at + 12 : 2]
    if codes:
        colours, curve = PRIMARIES.get(codes[0]), CURVES.get(codes[1], 0.0)
        if colours and curve != 0:
            made = matrix_profile(colours, curve)
        else:
            notes.append(f"colour by the code points {codes[0]}, {codes[1]} (of HDR or rare) is not converted")
            return icc
    elif icc or "srgb" in info or not ("gamma" in info or "chromaticity" in info):
        return icc
    else:
        gamma, colours = info.get("gamma", 0), info.get("chromaticity", PRIMARIES[1])
        curve = 1 / gamma if gamma and abs(gamma - 1 / 2.2) > 0.005 else None
        try:
            made = matrix_profile(colours, curve)
        except (ArithmeticError, ValueError):
            notes.append("gAMA and cHRM left out, which make no sense")
            return None
    if made:
        notes.append(f"colour by {'code points' if codes else 'gAMA and cHRM'} is kept as an ICC profile")
    return made


def _png_chunk(head: bytes, wanted: bytes) -> bytes | None:
    """What a chunk before the pixels holds; None if there is no such."""
    at = 8
    while at + 8 <= len(head) and head[at + 4 : at + 8] != b"IDAT":
        (length,) = struct.unpack_from(">I", head, at)
        if head[at + 4 : at + 8] == wanted:
            return head[at + 8 : at + 8 + length]
        at += 12 + length
    return None


def matrix_profile(colours: Sequence[float], curve: float | None) -> bytes | None:
    """An ICC profile, version 4, for RGB whose white, red, green and blue have the chromaticities ``colours`` (x and y
    of each), and whose samples are light to the power of 1 / ``curve``, or follow sRGB's curve where that is None. None
    if this is sRGB. Raises ArithmeticError or ValueError for what is no such space."""
    import numpy as np

    if curve is None and max(abs(a - b) for a, b in zip(colours, PRIMARIES[1], strict=True)) < 0.002:
        return None
    if not (curve is None or 0.1 < curve < 10) or min(colours[1::2]) <= 0:
        raise ValueError("no colour space")
    white, *primaries = np.array(
        [(x / y, 1, (1 - x - y) / y) for x, y in zip(colours[::2], colours[1::2], strict=True)]
    )
    columns = np.array(primaries).T
    try:
        columns = columns * np.linalg.solve(columns, white)
    except np.linalg.LinAlgError as e:
        raise ValueError("no colour space") from e
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford
    d50 = np.array([0.9642, 1, 0.8249])
    adapted = np.linalg.solve(cones, np.diag(cones @ d50 / (cones @ white)) @ cones)

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    def words(text: str) -> bytes:
        coded = text.encode("utf-16-be")
        return b"mluc" + struct.pack(">3I2s2s2I", 0, 1, 12, b"en", b"US", len(coded), 28) + coded

    powers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if curve is None else (curve,)
    tone = b"para" + struct.pack(">IHH", 0, 0 if curve else 3, 0) + fixed(*powers)
    tags = {b"desc": words("RGB as the picture says"), b"cprt": words("CC0"), b"wtpt": b"XYZ " + bytes(4) + fixed(*d50)}
    tags[b"chad"] = b"sf32" + bytes(4) + fixed(*adapted.flat)
    tags |= {bytes([c]) + b"XYZ": b"XYZ " + bytes(4) + fixed(*(adapted @ columns)[:, k]) for k, c in enumerate(b"rgb")}
    tags |= {bytes([c]) + b"TRC": tone for c in b"rgb"}
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", 128 + len(table + body), 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + bytes(28) + fixed(*d50)).ljust(128, b"\0") + table + body


def apply_profile(image: Image.Image, icc: bytes) -> Image.Image | None:
    """The picture, L, RGB or CMYK, as sRGB; None if the profile is damaged or for something else."""
    from PIL import ImageCms

    try:
        return ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None


def to_srgb(image: Image.Image, icc: bytes, notes: list[str], reason: str) -> Image.Image:
    """An RGB or RGBA picture with the profile ``icc`` as sRGB; as it is where that changes nothing or cannot be done.
    ``notes`` say so, and that it is for ``reason``."""
    cube = Image.frombytes(
        "RGB", (27, 27), bytes(32 * (n // 9**k % 9) * 255 // 256 for n in range(729) for k in range(3))
    )
    tried = apply_profile(cube, icc)
    if tried is None:
        notes.append("damaged ICC profile left out")
    elif max(ImageChops.difference(cube, tried).tobytes()) > 2:
        converted = apply_profile(image.convert("RGB"), icc)
        assert converted is not None
        if image.mode == "RGBA":
            converted.putalpha(image.getchannel("A"))
        notes.append(f"converted to sRGB, for {reason} keeps no ICC profile")
        return converted
    return image
