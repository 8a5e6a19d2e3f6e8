"""Time and peak memory of encoding and decoding, each in a process of its own, one after the other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compass_codec.measure.peers import J2K, PEERS, Gap
from compass_codec.measure.protocol import LEVELS, OURS, Scales, kind_of, layers_of, model_of, sets_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compass_codec.codec import Codec

ENOUGH = 2.0  # seconds: what is quicker is repeated, and the best of the runs counts
MOST = 5  # runs


@dataclass(frozen=True)
class Cost:
    """Seconds and MB of peak resident memory (with Python and its libraries in it) of one picture."""

    encode_seconds: float
    encode_mb: float
    decode_seconds: float
    decode_mb: float


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it forgets what the parent had before this program started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let ``peak_mb`` count from now on, where the system can: Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cost(method: str, picture: Path, scales: Scales, setting: float, weights: Path | None, device: str) -> Cost:
    """Encode all layers of ``picture`` to one file, or a file each, and decode them. Raises Gap when that fails."""
    if len(sets_of(method)) > 1:
        raise Gap("no file holds layers of two sets")
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "method": method,
            "picture": str(picture),
            "scales": scales,
            "setting": setting,
            "weights": weights and str(weights),
            "device": device,
            "folder": folder,
        }
        found = []
        for step in ("encode", "decode"):
            command = [sys.executable, "-m", "compass_codec.measure.cost", json.dumps(task | {"step": step})]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Gap(f"{step}: {(done.stderr.strip().splitlines() or ['its process was killed'])[-1]}")
            found += json.loads(done.stdout)
    return Cost(*found)


def _files(task: dict[str, Any], layers: list[NDArray[np.uint8]]) -> list[bytes]:
    method, scales, setting = task["method"], task["scales"], task["setting"]
    if kind_of(method) == OURS:
        return [_codec(task).encode_layers(layers, [s / scales[0] for s in scales], setting).data]
    if method == LEVELS:
        return [PEERS[J2K].encode(layers[-1], setting)]
    return [PEERS[method].encode(layer, setting) for layer in layers]


def _pictures(task: dict[str, Any], files: list[bytes]) -> None:
    method = task["method"]
    if kind_of(method) == OURS:
        from compass_codec import container

        (data,) = files
        header = container.read_header(data)
        for _ in _codec(task).decode_layers(data, header, len(header.layers) - 1):
            pass
        return
    if method == LEVELS:
        for s in task["scales"]:
            PEERS[J2K].decode(files[0], round(math.log2(task["scales"][-1] / s)))
        return
    for data in files:
        PEERS[method].decode(data)


def _codec(task: dict[str, Any]) -> Codec:
    from compass_codec.codec import shared

    weights = Path(task["weights"]) if task["weights"] else None
    return shared(task["device"], weights, model=model_of(task["method"]), engine="torch")


def main() -> None:
    """In the child: do one step, print [seconds, MB]."""
    from PIL import Image

    task = json.loads(sys.argv[1])
    folder, decode = Path(task["folder"]), task["step"] == "decode"
    if decode:
        files = [file.read_bytes() for file in sorted(folder.iterdir())]
    else:
        with Image.open(task["picture"]) as image:
            layers = layers_of(image, tuple(task["scales"]))
    if kind_of(task["method"]) == OURS:
        _codec(task)  # loading the weights is not what is timed
    else:
        PEERS[J2K if task["method"] == LEVELS else task["method"]].load()
    best, total = float("inf"), 0.0
    for _ in range(MOST):
        started = time.perf_counter()
        if decode:
            _pictures(task, files)
        else:
            files = _files(task, layers)
        seconds = time.perf_counter() - started
        best, total = min(best, seconds), total + seconds
        if total > ENOUGH:
            break
    peak = peak_mb()
    if not decode:
        for k, data in enumerate(files):
            (folder / f"{k:02d}").write_bytes(data)
    print(json.dumps([best, peak]))


if __name__ == "__main__":
    main()
