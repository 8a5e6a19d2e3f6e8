"""One HTML page that holds everything: crops of the original, ours and the peers at the same accumulated bits."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING

from compass_codec.measure.peers import PEERS, Gap
from compass_codec.measure.protocol import OURS, Scales, kind_of, layers_of, model_of, sizes_of, title
from compass_codec.measure.tables import TESTED, Results, set_title
from compass_codec.measure.task import Original, Record, Settings, Task, load
from compass_codec.page import data_uri

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, width, height
Middle = tuple[float, float]  # of a crop, in parts of width and height
Shown = tuple[Original, Box]
SIDE = 208  # samples of a crop
PICTURES = 3  # on the page


def crop(job: Task, layers: Sequence[NDArray[np.uint8]], settings: Settings) -> Record:
    """In a worker: the crop of the top layer as ``job.method`` gives it, what it cost, and its PSNR (of the whole)."""
    from compass_codec.metrics import psnr

    if kind_of(job.method) == OURS:
        total, decoded = _ours(job, layers, settings)
    else:
        total, decoded = _nearest(job, layers)
    return {"crop": _data_url(decoded, job.box), "bytes": total, "psnr": psnr(layers[-1], decoded)}


def _ours(job: Task, layers: Sequence[NDArray[np.uint8]], settings: Settings) -> tuple[int, NDArray[np.uint8]]:
    """Through the file, with ``target`` the largest that is not above it. The tables take the encoder's word for what a
    decoder sees; here it is checked."""
    import numpy as np

    from compass_codec import container
    from compass_codec.codec import shared
    from compass_codec.jobs.targets import Target, search

    ours = shared(settings.device, settings.weights, model=model_of(job.method), engine="torch")
    scales = [s / job.scales[0] for s in job.scales]
    if job.target:
        target, pixels = Target("size", job.target), layers[-1].shape[0] * layers[-1].shape[1]
        encode = partial(ours.encode_layers, layers, scales)
        encoded = search(target, pixels, encode, lambda e: (len(e.data), 0)).result
    else:
        encoded = ours.encode_layers(layers, scales, job.setting)
    header = container.read_header(encoded.data)
    decoded = list(ours.decode_layers(encoded.data, header, len(layers) - 1))
    if not all(np.array_equal(a, b) for a, b in zip(decoded, encoded.layers, strict=True)):
        raise Gap("the file does not decode to what the encoder saw")
    return len(encoded.data), decoded[-1]


def _nearest(job: Task, layers: Sequence[NDArray[np.uint8]]) -> tuple[int, NDArray[np.uint8]]:
    """A file for each layer, all at the setting that takes them nearest to the bytes wanted."""
    peer = PEERS[job.method]
    files: dict[int, list[bytes]] = {}

    def total(i: int) -> int:
        if i not in files:
            files[i] = [peer.encode(layer, peer.grid[i]) for layer in layers]
        return sum(map(len, files[i]))

    above = bisect.bisect_left(range(len(peer.grid) - 1), job.target, key=total)
    best = min({max(0, above - 1), above}, key=lambda i: abs(total(i) - job.target))
    return total(best), peer.decode(files[best][-1])


def _data_url(picture: NDArray[np.uint8], box: Box | None) -> str:
    """The box of a picture, without loss, inside a URL."""
    from PIL import Image

    assert box is not None
    left, top, width, height = box
    return data_uri(Image.fromarray(picture[top : top + height, left : left + width]))


def _box(source: Original, scales: Scales, middle: Middle | None) -> Box:
    """What is shown of the top layer, around ``middle``, or around its own."""
    ((width, height),) = sizes_of(source.size, scales[-1:])
    w, h = min(SIDE, width), min(SIDE, height)
    x, y = (round(part * side) for part, side in zip(middle or (0.5, 0.5), (width, height), strict=True))
    return min(max(0, x - w // 2), width - w), min(max(0, y - h // 2), height - h), w, h


def shown(results: Results, scales: Scales, crops: Sequence[tuple[str, Middle | None]] = ()) -> list[Shown]:
    """The crops on the page: those named by picture and middle, or else of the first pictures."""
    sources = {source.path.name: source for source in results.sources}
    chosen = [(sources[name], middle) for name, middle in crops]
    chosen = chosen or [(source, None) for source in results.sources[:PICTURES]]
    return [(source, _box(source, scales, middle)) for source, middle in chosen]


def our_jobs(results: Results, scales: Scales, crops: Sequence[Shown]) -> list[Task]:
    """Ours, at every quality."""
    return [Task(source, OURS, scales, quality, box) for source, box in crops for quality in results.qualities]


def peer_jobs(ours: Sequence[Task], results: Results, peers: Sequence[str]) -> list[Task]:
    """Crops of the ``peers``, or of our other sets, at the bytes of ours, which must have been run."""
    return [
        Task(job.source, peer, job.scales, box=job.box, target=results.records[job]["bytes"])
        for job in ours
        if "gap" not in results.records[job]
        for peer in peers
    ]


def html(results: Results, scales: Scales, peers: Sequence[str], crops: Sequence[Shown]) -> str:
    """The page, from the records of ``our_jobs`` and ``peer_jobs``."""
    ours = our_jobs(results, scales, crops)
    others = {(job.source, job.box, job.target, job.method): job for job in peer_jobs(ours, results, peers)}
    pictures = []
    for source, box in crops:
        points = []
        ((width, height),) = sizes_of(source.size, scales[-1:])
        for job in (job for job in ours if (job.source, job.box) == (source, box)):
            record = results.records[job]
            tiles = [_tile(TESTED, record, record.get("bytes", 0))]
            for peer in peers:
                name = _name(peer, len(scales) > 1)
                other = others.get((source, box, record.get("bytes", 0), peer))
                tiles.append(_tile(name, results.records[other] if other else record, record.get("bytes", 0)))
            rate = f"{8 * record['bytes'] / width / height:.3f} bpp, " if "bytes" in record else ""
            points.append({"label": f"{rate}quality {job.setting:g} of COMPASS", "tiles": tiles})
        (top,) = layers_of(load(source.path), scales[-1:])
        name = f"{source.path.name}, {box[0]}, {box[1]}"
        pictures.append({"name": name, "original": _data_url(top, box), "points": points})
    note = (
        f"Crops of the largest layer, with left and top; layers: {title(scales)}. The bytes are those of all the "
        "layers together: one file for COMPASS, a file for each layer for other codecs, at the setting that comes "
        "nearest. PSNR is that of the whole layer. Choose a picture below to set it against COMPASS."
    )
    # "<" could end the script; JSON may write it as an escape
    data = json.dumps({"note": note, "pictures": pictures}).replace("<", "\\u003c")
    page = resources.files("compass_codec.measure").joinpath("compare.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", data)


def _name(method: str, layered: bool) -> str:
    """Of a tile."""
    if model := model_of(method):
        return set_title(model)
    return f"simulcast {PEERS[method].title}" if layered else PEERS[method].title


def _tile(name: str, record: Record, wanted: int) -> dict[str, str]:
    if "gap" in record:
        return {"name": name, "gap": record["gap"]}
    share = f" ({100 * record['bytes'] / wanted:.0f} %)" if record["bytes"] != wanted else ""
    return {"name": name, "src": record["crop"], "text": f"{record['bytes']} bytes{share}, {record['psnr']:.2f} dB"}
