"""What people would pick instead: the codecs that Pillow writes, with its defaults unless said otherwise."""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Gap(Exception):
    """Why a figure is missing, in words for the table."""


@dataclass(frozen=True)
class Peer:
    """A picture format: Pillow's name of it, what is varied along its rate-distortion curve, how Pillow is called."""

    title: str
    format: str
    settings: tuple[float, ...]
    grid: Sequence[float]  # all settings, from few bytes to many
    options: Callable[[float], dict[str, Any]]
    plugin: str = ""  # module that teaches Pillow the format
    package: str = "pillow"  # whose version decides the bytes
    feature: str = ""  # Pillow's name of the library inside

    def load(self) -> None:
        """Make the format known to Pillow. Raises Gap when it cannot be."""
        from PIL import Image, features

        if self.plugin:
            try:
                module = import_module(self.plugin)
            except ImportError as e:
                raise Gap(f"needs {self.package} (pip install 'compass_codec[bench]')") from e
            if register := getattr(module, "register_heif_opener", None):
                register()
        elif not features.check(self.feature):
            raise Gap(f"this Pillow was built without {self.title}")
        Image.init()

    def identity(self) -> str:
        """Which code makes the bytes; raises Gap as ``load`` does."""
        from PIL import features

        self.load()
        library = f" {self.feature} {features.version(self.feature)}" if self.feature else ""
        return f"{self.package} {version(self.package)}{library}"

    def encode(self, picture: np.ndarray, setting: float) -> bytes:
        """uint8 [height, width, 3] to a file."""
        from PIL import Image

        self.load()
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, self.format, **self.options(setting))
        return buffer.getvalue()

    def decode(self, data: bytes, halvings: int = 0) -> np.ndarray:
        """A file to uint8 [height, width, 3]; with ``halvings``, a resolution that JPEG 2000 holds below the full."""
        import numpy as np
        from PIL import Image

        self.load()
        with Image.open(io.BytesIO(data)) as image:
            if halvings:
                image.reduce = halvings  # type: ignore[method-assign,assignment]
            return np.array(image.convert("RGB"))


def _quality(setting: float) -> dict[str, Any]:
    return {"quality": round(setting)}


def _ratio(setting: float) -> dict[str, Any]:
    # Pillow's own defaults are lossless and code R, G and B apart, which nobody who wants small files would keep
    return {"quality_mode": "rates", "quality_layers": [setting], "irreversible": True, "mct": 1}


J2K = "jpeg2000"
_RATIOS = [r / 10 for r in range(4000, 15, -1)]
PEERS = {
    "avif": Peer("AVIF", "AVIF", (5, 15, 25, 35, 45, 55, 65, 75), range(100), _quality, feature="avif"),
    "jxl": Peer(
        "JPEG XL", "JXL", (1, 10, 25, 40, 55, 70, 80, 90), range(100), _quality, "pillow_jxl", "pillow-jxl-plugin"
    ),
    "webp": Peer("WebP", "WEBP", (0, 10, 25, 45, 65, 80, 90), range(100), _quality, feature="webp"),
    "heic": Peer("HEIC", "HEIF", (5, 10, 20, 30, 40, 50, 60), range(100), _quality, "pillow_heif", "pillow-heif"),
    "jpeg": Peer("JPEG", "JPEG", (5, 10, 20, 35, 50, 65, 80, 90), range(1, 96), _quality, feature="jpg"),
    J2K: Peer("JPEG 2000", "JPEG2000", (150, 100, 60, 35, 20, 12), _RATIOS, _ratio, feature="jpg_2000"),
}


def resolutions(layers: Sequence[np.ndarray], setting: float) -> list[tuple[int, np.ndarray]]:
    """One JPEG 2000 file of the last of ``layers``; for each layer, how many bytes of the file the resolution of that
    size needs and what it decodes to. Raises Gap unless each layer is the last one halved a few times.

    The file holds the smallest resolution first (progression RLCP). The end of a resolution is the shortest part of
    the file that decodes to the same picture as the whole; OpenJPEG wants zeros (empty packets) and the end marker
    after it.
    """
    import numpy as np
    from PIL import Image

    full = layers[-1].shape
    halvings = [round(math.log2(full[0] / layer.shape[0])) for layer in layers]
    for layer, k in zip(layers, halvings, strict=True):
        if (layer.shape[0] << k, layer.shape[1] << k) != full[:2]:
            raise Gap("its resolutions are halves, quarters, ... of the picture, these layers are not")
    peer = PEERS[J2K]
    peer.load()
    buffer = io.BytesIO()
    options = peer.options(setting) | {"progression": "RLCP", "num_resolutions": max(6, max(halvings) + 1)}
    Image.fromarray(layers[-1]).save(buffer, peer.format, **options)
    data = buffer.getvalue()
    found = []
    for k in halvings:
        whole = peer.decode(data, k)

        def enough(end: int, k: int = k, whole: np.ndarray = whole) -> bool:
            try:
                return np.array_equal(peer.decode(data[:end].ljust(len(data) - 2, b"\0") + data[-2:], k), whole)
            except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
                return False

        found.append((bisect.bisect_left(range(len(data)), True, key=enough) if k else len(data), whole))
    return found
