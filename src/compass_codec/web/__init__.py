"""The decoder for browsers: JavaScript, a WebAssembly module, and the weights that decoding needs.

kernels.wasm is made of kernels.ts by ``make wasm``. Nothing of Python runs in the browser.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from compass_codec.errors import WeightsError

if TYPE_CHECKING:
    from compass_codec.weights import ModelSet

SCRIPTS = ("compass.js", "container.js", "gpu.js", "kernels.wasm", "lean.js", "png.js", "sw.js")
TRAINING = ("h_", "context.", "bottleneck.", "y_scale")  # what of a codec no decoder needs


def script(name: str) -> bytes:
    """One of SCRIPTS."""
    return (resources.files("compass_codec.web") / name).read_bytes()


def weights_name(identity: str) -> str:
    """Where sw.js looks for the weights of a set."""
    return f"weights/{identity}.safetensors"


def weights_of(found: ModelSet) -> bytes:
    """What decoding needs of a set, as one safetensors file: tensors are named part.name. Raises WeightsError for a set
    of another backbone than lean, and for files that cannot be read."""
    from safetensors.numpy import load, save

    from compass_codec.networks.numbers import CONTEXT
    from compass_codec.weights import tensors_of

    if found.backbone != "lean":
        raise WeightsError(f"{found.folder}: browsers decode with the backbone lean, not with {found.backbone}")
    parts = tensors_of(found, load)
    if any(found.spec.get(part, {}).get("entropy", CONTEXT) != CONTEXT for part in parts):
        raise WeightsError(f"{found.folder}: browsers decode with the context model of four steps alone")
    if "transforms" not in found.spec.get("residual", {}):
        raise WeightsError(
            f"{found.folder}: browsers decode enhancement layers with the transforms of the base codec alone"
        )
    kept = {
        f"{part}.{name}": value
        for part, tensors in parts.items()
        for name, value in tensors.items()
        if not name.startswith(TRAINING)
    }
    return save(kept)
