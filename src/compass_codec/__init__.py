"""compass_codec: one picture, many sizes, one file.

>>> import compass_codec
>>> data = compass_codec.encode(image, scales=[1, 2, 3.2], quality=60)
>>> small = compass_codec.decode(data, layer=0)

Importing this module is light; ONNX Runtime or PyTorch is loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compass_codec.errors import CompassError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from typing_extensions import Buffer

__version__ = "0.1.0"
__all__ = ["CompassError", "decode", "encode"]

DEFAULT_QUALITY = 60.0


def encode(
    image: Image.Image | NDArray[np.uint8],
    scales: Sequence[float],
    quality: float = DEFAULT_QUALITY,
    device: str = "auto",
    model: str | None = None,
    tune: str | None = None,
) -> bytes:
    """Encode a Pillow image, or a uint8 array [height, width, 3] (4 with alpha; [height, width]), as one layered file.

    ``scales``: 1 to 16 positive factors that do not fall, relative to each other; the last layer is the image
    itself and layer k has size round(side * s_k / s_K), at least 1. ``quality``: 1..100, the same for all layers.
    ``model``: the profile or the identity of a set of weights; None is the default profile. ``tune`` in its place:
    "psnr" for the least squared error, or "visual" for what people see.
    Returns the bytes of a .cmps file. Raises a subclass of CompassError.
    """
    from compass_codec import codec, weights

    return codec.shared(device, model=weights.tuned(tune, model)).encode(image, scales, quality).data


def decode(data: Buffer, layer: int | None = None, device: str = "auto") -> Image.Image:
    """Decode one layer of a .cmps file to an 8-bit Pillow image: RGB, or RGBA if it has alpha.

    ``data``, bytes or a bytearray or memoryview, may be cut off anywhere after the layer's end;
    ``layer`` defaults to the highest that is all there. The weights are those the file was made with, if they are
    found. Raises a subclass of CompassError.
    """
    from compass_codec import codec, container

    data = container.as_bytes(data)
    return codec.shared(device, model=container.read_header(data).model).decode(data, layer)
