"""What people would pick instead: the codecs that Pillow writes, with its defaults unless said otherwise, and the
pretrained networks of CompressAI."""

from __future__ import annotations

import bisect
import io
import math
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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

    def encode(self, picture: NDArray[np.uint8], setting: float) -> bytes:
        """uint8 [height, width, 3] to a file."""
        from PIL import Image

        self.load()
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, self.format, **self.options(setting))
        return buffer.getvalue()

    def decode(self, data: bytes, halvings: int = 0) -> NDArray[np.uint8]:
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


def _full_chroma(setting: float) -> dict[str, Any]:
    return _quality(setting) | {"subsampling": "4:4:4", "speed": 4}


def _ratio(setting: float) -> dict[str, Any]:
    # Pillow's own defaults are lossless and code R, G and B apart, which nobody who wants small files would keep
    return {"quality_mode": "rates", "quality_layers": [setting], "irreversible": True, "mct": 1}


@dataclass(frozen=True)
class Learned(Peer):
    """A codec of CompressAI, ``format`` its name there. The settings are its qualities, a network for each, whose
    pretrained weights torch.hub fetches once and keeps. A file is quality and size, then each string of the range coder
    behind its length, as in CompressAI's own example."""

    HEAD = ">BHH"

    def load(self) -> None:
        """See that the weights of every setting are in torch.hub's folder. Raises Gap when they cannot be fetched."""
        for setting in self.settings:
            _weights(self.format, round(setting))

    def identity(self) -> str:
        """Raises Gap as ``load`` does. The names of the weights end in the beginnings of their hashes."""
        self.load()
        names = (_weights(self.format, round(setting)).name.split(".")[0] for setting in self.settings)
        return f"{self.package} {version(self.package)}, torch {version('torch')}, {' '.join(names)}"

    def encode(self, picture: NDArray[np.uint8], setting: float) -> bytes:
        import torch
        from torch.nn import functional as F

        quality, (height, width) = round(setting), picture.shape[:2]
        network = _network(self.format, quality)
        down, right = (-side % network.downsampling_factor for side in (height, width))
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            coded = network.compress(F.pad(x, (0, right, 0, down), mode="replicate"))
        strings = (struct.pack(">I", len(string)) + string for (string,) in coded["strings"])
        return struct.pack(self.HEAD, quality, height, width) + b"".join(strings)

    def decode(self, data: bytes, halvings: int = 0) -> NDArray[np.uint8]:
        import torch

        quality, height, width = struct.unpack_from(self.HEAD, data)
        network, strings, at = _network(self.format, quality), [], struct.calcsize(self.HEAD)
        while at < len(data):
            (length,) = struct.unpack_from(">I", data, at)
            strings.append([data[at + 4 : at + 4 + length]])
            at += 4 + length
        shape = [-(-side // network.downsampling_factor) for side in (height, width)]
        with torch.no_grad():
            x = network.decompress(strings, shape)["x_hat"][0, :, :height, :width]
        picture: NDArray[np.uint8] = (255 * x).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return picture


PATIENCE = 20  # seconds that a server may be silent


def _weights(name: str, quality: int) -> Path:
    """The file of CompressAI's weights for mean squared error, fetched unless torch.hub has it. Raises Gap."""
    try:
        import torch
        from compressai.zoo.image import model_urls
    except ImportError as e:
        raise Gap(f"needs compressai (pip install 'compass_codec[bench]', up to Python 3.12): {e}") from e
    url = model_urls[name]["mse"][quality]
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = file.name.split(".")[0].rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(file), digest, progress=False)
        except (OSError, RuntimeError, HTTPException) as e:
            # a page of results does not name the home of whoever made it
            folder = str(file.parent).replace(str(Path.home()), "~", 1)
            raise Gap(f"its weights are neither in {folder} nor to be fetched ({e})") from e
        finally:
            socket.setdefaulttimeout(patience)
    return file


@lru_cache(maxsize=8)
def _network(name: str, quality: int) -> Any:
    """On the CPU, where coding symbols is exact. Raises Gap."""
    file = _weights(name, quality)
    try:
        import torch
        from compressai.zoo.image import model_architectures
        from compressai.zoo.pretrained import load_pretrained

        state = torch.load(file, map_location="cpu", weights_only=True)
        return model_architectures[name].from_state_dict(load_pretrained(state)).eval()
    except Exception as e:  # whatever a damaged file makes of it
        raise Gap(f"{file} does not hold its weights ({e})") from e


def _learned(name: str, qualities: range) -> Learned:
    return Learned(f"CompressAI {name}", name, tuple(qualities), qualities, _quality, package="compressai")


J2K = "jpeg2000"
_RATIOS = [r / 10 for r in range(4000, 15, -1)]
PEERS = {
    "avif": Peer("AVIF", "AVIF", (5, 15, 25, 35, 45, 55, 65, 75), range(100), _quality, feature="avif"),
    "avif-444": Peer(
        "AVIF 4:4:4, speed 4", "AVIF", (5, 15, 25, 35, 45, 55, 65, 75), range(100), _full_chroma, feature="avif"
    ),
    "jxl": Peer(
        "JPEG XL", "JXL", (1, 10, 25, 40, 55, 70, 80, 90), range(100), _quality, "pillow_jxl", "pillow-jxl-plugin"
    ),
    "webp": Peer("WebP", "WEBP", (0, 10, 25, 45, 65, 80, 90), range(100), _quality, feature="webp"),
    "heic": Peer("HEIC", "HEIF", (5, 10, 20, 30, 40, 50, 60), range(100), _quality, "pillow_heif", "pillow-heif"),
    "jpeg": Peer("JPEG", "JPEG", (5, 10, 20, 35, 50, 65, 80, 90), range(1, 96), _quality, feature="jpg"),
    J2K: Peer("JPEG 2000", "JPEG2000", (150, 100, 60, 35, 20, 12), _RATIOS, _ratio, feature="jpg_2000"),
    "mbt2018-mean": _learned("mbt2018-mean", range(1, 9)),
    "cheng2020-anchor": _learned("cheng2020-anchor", range(1, 7)),
    "bmshj2018-factorized": _learned("bmshj2018-factorized", range(1, 9)),
}


def resolutions(layers: Sequence[NDArray[np.uint8]], setting: float) -> list[tuple[int, NDArray[np.uint8]]]:
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

        def enough(end: int, k: int = k, whole: NDArray[np.uint8] = whole) -> bool:
            try:
                return np.array_equal(peer.decode(data[:end].ljust(len(data) - 2, b"\0") + data[-2:], k), whole)
            except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
                return False

        found.append((bisect.bisect_left(range(len(data)), True, key=enough) if k else len(data), whole))
    return found
