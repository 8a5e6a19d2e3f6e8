"""Pictures of any size over HTTP, out of the .cmps files of one folder: an ASGI application (Starlette)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import os
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, features
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from compass_codec import __version__, container, page, pictures
from compass_codec.errors import CompassError

if TYPE_CHECKING:
    from compass_codec.codec import Codec

HEADER_READ = 4096  # more than any header
MEDIA_TYPE = "image/x-cmps"
TYPES = {"avif": "image/avif", "webp": "image/webp", "jpg": "image/jpeg", "png": "image/png"}  # most wanted first
if not features.check("avif"):
    del TYPES["avif"]
SAVING: dict[str, tuple[str, dict[str, Any]]] = {
    "avif": ("AVIF", {"quality": 70, "speed": 8}),
    "webp": ("WEBP", {"quality": 85}),
    "jpg": ("JPEG", {"quality": 85, "progressive": True}),
    "png": ("PNG", {}),
}
MODERN = {"avif", "webp"}  # sent only to those who name them
RETRY_AFTER = 5  # seconds
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'",
}


class Busy(Exception):
    """As many pictures wait to be decoded as may."""


@dataclass(frozen=True)
class Settings:
    """Limits of a server. ``cache``: bytes of decoded layers kept; ``max_pixels``: of a layer that is decoded;
    ``decodes``: at the same time; ``queue``: how many more may wait; ``max_age``: seconds, for Cache-Control."""

    cache: int = 256 * 2**20
    max_pixels: int = 16_000_000
    decodes: int = 1
    queue: int = 16
    max_age: int = 3600


@dataclass(frozen=True)
class File:
    """A .cmps file and its header as they are now. ``version`` changes whenever the file does."""

    path: Path
    header: container.Header
    size: int
    modified: float
    version: str

    @property
    def layers(self) -> list[container.Layer]:
        """Those that the file holds whole."""
        return [entry for entry in self.header.layers if entry.end <= self.size]


def find(folder: Path, name: str) -> Path | None:
    """The .cmps file ``name`` (without extension) in ``folder``, or None; whatever leads out of the folder is none."""
    try:
        path = (folder / f"{name}.cmps").resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there; a NUL; a circle of links
        return None
    return path if path.is_relative_to(folder) and path.is_file() else None


def load(path: Path) -> File:
    """Read a file's header. Raises CompassError and OSError."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        head = file.read(HEADER_READ)
    header = container.read_header(head, max_pixels=container.MAX_SIDE**2)
    facts = repr((head[: header.length], status.st_size, status.st_mtime_ns))
    version = hashlib.sha256(facts.encode()).hexdigest()[:20]
    return File(path, header, status.st_size, status.st_mtime, version)


def choose(layers: list[tuple[int, int]], width: int | None, height: int | None) -> tuple[int, tuple[int, int]]:
    """The smallest of ``layers`` (width, height each, smallest first) that covers what fits into ``width`` and
    ``height``, where given, and the size to reduce it to. Nothing is enlarged beyond the last layer."""
    if width or height:
        for k, (w, h) in enumerate(layers):
            factor = min(width / w if width else math.inf, height / h if height else math.inf)
            if factor <= 1:
                return k, (max(1, round(w * factor)), max(1, round(h * factor)))
    return len(layers) - 1, layers[-1]


def negotiate(accept: str, opaque: bool = True) -> str | None:
    """The extension in TYPES that a request's Accept header likes best. AVIF and WebP must be named, because many
    programs say */* and read neither; JPEG and PNG are also taken for image/* and */*."""
    weights: dict[str, float] = {}
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        kind, *parameters = (text.strip().lower() for text in part.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            weights[kind] = min(1.0, max(0.0, float(weight)))
        except ValueError:
            weights[kind] = 0.0

    def wanted(extension: str) -> float:
        if extension == "jpg" and not opaque:
            return 0.0
        if TYPES[extension] in weights or extension in MODERN:
            return weights.get(TYPES[extension], 0.0)
        return weights.get("image/*", weights.get("*/*", 0.0))

    best = max(TYPES, key=wanted)
    return best if wanted(best) > 0 else None


class Layers:
    """Decodes layers in threads of its own, a limited number at a time, and keeps those that were used last.

    The threads are daemons: a decode of many seconds does not hold up the end of the program.
    """

    def __init__(self, codec: Codec, settings: Settings) -> None:
        self.codec, self.limit = codec, settings.cache
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Image.Image] = OrderedDict()
        self._running: dict[tuple[str, int], Future[Image.Image]] = {}
        self._jobs: queue.Queue[tuple[File, int, Future[Image.Image]]] = queue.Queue(settings.queue)
        for _ in range(settings.decodes):
            threading.Thread(target=self._work, daemon=True).start()

    async def get(self, file: File, layer: int) -> Image.Image:
        """One layer of ``file``; whoever asks for the same one meanwhile gets the same. Raises Busy when the queue is
        full, and what decoding raises."""
        key = (file.version, layer)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if key not in self._running:
                future: Future[Image.Image] = Future()
                try:
                    self._jobs.put_nowait((file, layer, future))
                except queue.Full:
                    raise Busy from None
                self._running[key] = future
            running = self._running[key]
        # shielded, so that one who goes away does not cancel it for the others
        return await asyncio.shield(asyncio.wrap_future(running))

    def _work(self) -> None:
        while True:
            file, layer, future = self._jobs.get()
            key = (file.version, layer)
            try:
                image = self._decode(file, layer)
            except BaseException as e:
                with self._lock:
                    del self._running[key]
                future.set_exception(e)
            else:
                with self._lock:
                    del self._running[key]
                    self._keep(key, image)
                future.set_result(image)

    def _decode(self, file: File, layer: int) -> Image.Image:
        with file.path.open("rb") as opened:
            data = opened.read(file.header.layers[layer].end)
        image = self.codec.decode(data, layer, max_pixels=container.MAX_SIDE**2)
        image.info["icc_profile"] = container.sections(file.header, data, layer, best_effort=True).icc
        return image

    def _keep(self, key: tuple[str, int], image: Image.Image) -> None:
        self._kept[key] = image
        while sum(kept.width * kept.height * len(kept.getbands()) for kept in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)


def render(image: Image.Image, size: tuple[int, int], extension: str) -> bytes:
    """The picture reduced to ``size`` as a file of the type ``extension``, with its ICC profile."""
    icc = image.info.get("icc_profile")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if extension == "jpg" and image.mode == "RGBA":
        image = pictures.flatten(image)
    buffer = io.BytesIO()
    format, options = SAVING[extension]
    image.save(buffer, format, icc_profile=icc, **options)
    return buffer.getvalue()


class App:
    """The answers to requests; ``make_app`` binds them to paths."""

    def __init__(self, folder: Path, codec: Codec, settings: Settings) -> None:
        self.folder, self.settings = folder.resolve(strict=True), settings
        self.layers = Layers(codec, settings)

    async def demo(self, _: Request) -> Response:
        """A page with every picture of the folder, as <img srcset>."""
        return HTMLResponse(await asyncio.to_thread(self._demo), headers=SECURITY | {"Cache-Control": "no-cache"})

    def _demo(self) -> str:
        shown = []
        for path in sorted(self.folder.rglob("*.cmps")):
            name = path.relative_to(self.folder).as_posix().removesuffix(".cmps")
            if found := find(self.folder, name):
                try:
                    file = load(found)
                except (CompassError, OSError):
                    continue
                sizes = [(e.width, e.height, e.end) for e in file.layers if self._allowed(e)]
                if sizes:
                    shown.append(page.Picture(name, sizes))
        return page.demo(shown)

    def _allowed(self, entry: container.Layer) -> bool:
        return entry.width * entry.height <= self.settings.max_pixels

    async def picture(self, request: Request) -> Response:
        """One picture: name.cmps as it is, name.png and the like decoded, name in the type that the client likes."""
        full = request.path_params["name"]
        stem, _, extension = full.rpartition(".")
        extension = {"jpeg": "jpg"}.get(extension.lower(), extension.lower())
        if extension == "cmps" and stem:
            return self._raw(request, stem)
        named = extension in TYPES and bool(stem)
        name = stem if named else full
        path = find(self.folder, name)
        if path is None:
            raise HTTPException(404, f"no picture {full}")
        file = await asyncio.to_thread(load, path)
        if not file.layers:
            raise HTTPException(500, f"{name}.cmps: cut off inside layer 0")
        sizes = [(entry.width, entry.height) for entry in file.layers]
        layer, size = choose(sizes, _number(request, "w"), _number(request, "h"))
        kind = extension if named else negotiate(request.headers.get("accept", ""), not file.header.has_alpha(layer))
        if kind is None:
            raise HTTPException(406, f"pictures come as {', '.join(TYPES.values())}", {"Vary": "Accept"})
        if not self._allowed(file.layers[layer]):
            needed = f"a layer of {sizes[layer][0]} x {sizes[layer][1]} pixels"
            raise HTTPException(400, f"that size needs {needed}; the limit is {self.settings.max_pixels}")
        facts = f"{file.version} {size} {kind} {__version__} {Image.__version__}"
        headers = self._headers(f'"{hashlib.sha256(facts.encode()).hexdigest()[:24]}"', file.modified)
        if not named:
            headers["Vary"] = "Accept"
        empty = Response(headers=headers, media_type=TYPES[kind])
        if _unchanged(empty, request):
            return NotModifiedResponse(empty.headers)
        try:
            image = await self.layers.get(file, layer)
        except asyncio.CancelledError:
            raise HTTPException(503, "the server stops") from None
        body = await asyncio.to_thread(render, image, size, kind)
        return Response(body, headers=headers, media_type=TYPES[kind])

    def _raw(self, request: Request, name: str) -> Response:
        path = find(self.folder, name)
        if path is None:
            raise HTTPException(404, f"no file {name}.cmps")
        headers = SECURITY | {"Cache-Control": f"public, max-age={self.settings.max_age}"}
        response = FileResponse(path, headers=headers, media_type=MEDIA_TYPE, stat_result=path.stat())
        return NotModifiedResponse(response.headers) if _unchanged(response, request) else response

    def _headers(self, etag: str, modified: float) -> dict[str, str]:
        return SECURITY | {
            "ETag": etag,
            "Last-Modified": formatdate(modified, usegmt=True),
            "Cache-Control": f"public, max-age={self.settings.max_age}",
        }


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and int(text) > 0):
        raise HTTPException(400, f"{name} must be a whole number of pixels, at least 1")
    return int(text)


def _unchanged(response: Response, request: Request) -> bool:
    return StaticFiles.is_not_modified(StaticFiles(check_dir=False), response.headers, request.headers)


def make_app(folder: Path, codec: Codec, settings: Settings | None = None) -> Starlette:
    """The application that serves ``folder``. Raises OSError if there is no such folder."""
    app = App(folder, codec, settings or Settings())

    def line(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        one = " ".join(text.split())
        return PlainTextResponse(f"{one}\n", status, headers=SECURITY | {"Cache-Control": "no-store"} | (headers or {}))

    async def refused(_: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return line(e.status_code, e.detail, dict(e.headers or {}))

    async def busy(_: Request, __: Exception) -> Response:
        return line(503, "too many pictures are being decoded; try again", {"Retry-After": str(RETRY_AFTER)})

    async def broken(request: Request, e: Exception) -> Response:
        return line(500, f"{request.url.path}: {e if isinstance(e, CompassError) else 'cannot be read'}")

    async def failed(_: Request, __: Exception) -> Response:
        return line(500, "the server failed")

    site = Starlette(
        routes=[Route("/", app.demo), Route("/{name:path}", app.picture)],
        exception_handlers={
            HTTPException: refused,
            Busy: busy,
            CompassError: broken,
            OSError: broken,
            Exception: failed,
        },
    )
    site.state.layers = app.layers
    return site
