"""Pictures of any size over HTTP, out of the .cmps files of one folder: an ASGI application (Starlette)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import math
import os
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate, parsedate
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

import anyio
from PIL import Image, features
from PIL import __version__ as pillow_version
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compass_codec import __version__, container, page, pictures
from compass_codec.errors import CompassError, TruncatedError, WeightsError
from compass_codec.web.routes import routes

if TYPE_CHECKING:
    from compass_codec.codec import Codec

SUFFIXES = ["".join(letters) for letters in product("cC", "mM", "pP", "sS")]  # "cmps" first
MEDIA_TYPE = "image/x-cmps"
TYPES = {"avif": "image/avif", "webp": "image/webp", "jpg": "image/jpeg", "png": "image/png"}  # most wanted first
if not features.check("avif"):
    del TYPES["avif"]
EXTENSIONS = {f".{extension}": extension for extension in TYPES} | {".jpeg": "jpg"}
SAVING: dict[str, tuple[str, dict[str, Any]]] = {
    "avif": ("AVIF", {"quality": 70, "speed": 8}),
    "webp": ("WEBP", {"quality": 85}),
    "jpg": ("JPEG", {"quality": 85, "progressive": True}),
    "png": ("PNG", {}),
}
MODERN = {"avif", "webp"}  # sent only to those who name them
SIDES = {
    "avif": 32768,
    "webp": pictures.WEBP_SIDE,
    "jpg": 65500,
}  # the largest that libavif reads, and that the others write
LARGEST = 9_999_999  # width or height that may be asked for
RETRY_AFTER = 5  # seconds
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'",
}


class Busy(Exception):
    """The queue of pictures to decode is full."""


@dataclass(frozen=True)
class Settings:
    """Limits of a server. ``cache``: bytes of decoded layers kept; ``max_pixels``: of a layer that is decoded;
    ``decodes``: at the same time; ``queue``: how many more may wait; ``max_age``: seconds, for Cache-Control;
    ``weights``: folder of a set that browsers may fetch besides those installed."""

    cache: int = 256 * 2**20
    max_pixels: int = 16_000_000
    decodes: int = 1
    queue: int = 16
    max_age: int = 3600
    weights: Path | None = None


@dataclass(frozen=True)
class File:
    """An open .cmps file. All data of an answer is read through it, even if another file takes its name meanwhile.
    ``version`` changes whenever the file does."""

    opened: io.FileIO
    head: bytes
    header: container.Header
    size: int
    modified: float
    version: str

    @property
    def layers(self) -> list[container.Layer]:
        """The layers that the file holds whole."""
        return [entry for entry in self.header.layers if entry.end <= self.size]

    def read(self, layer: int) -> bytes:
        """The first bytes of the file, to the end of ``layer``. The header holds checksums of all that follows, so that
        a file which was written over since is noticed."""
        end = self.header.layers[layer].end
        self.opened.seek(0)
        data = self.opened.read(end)
        if len(data) < end or not data.startswith(self.head):
            raise HTTPException(503, "the file is being written; try again", {"Retry-After": str(RETRY_AFTER)})
        return data

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


def find(folder: Path, name: str, suffix: str = "cmps") -> Path | None:
    """The file ``name.suffix`` in ``folder``, or the same with other capitals in .cmps, or None. Whatever is hidden
    (its name, or that of a folder on the way, begins with a dot) or leads out of the folder is none."""
    if any(part.startswith(".") for part in f"{name}.{suffix}".split("/")):
        return None
    for spelled in dict.fromkeys([suffix, *SUFFIXES]):
        try:
            path = (folder / f"{name}.{spelled}").resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # not there; a NUL; a circle of links
            continue
        if path.is_relative_to(folder) and path.is_file():
            return path
    return None


def load(path: Path) -> File:
    """Open a file and read its header. Raises CompassError and OSError."""
    file = path.open("rb", buffering=0)  # a buffer would hold what is no longer there
    try:
        status = os.fstat(file.fileno())
        head = file.read(container.MAX_HEADER)
        header = container.read_header(head, max_pixels=container.MAX_SIDE**2)
    except BaseException:
        file.close()
        raise
    head = head[: header.length]
    facts = repr((head, status.st_size, status.st_mtime_ns))
    version = hashlib.sha256(facts.encode()).hexdigest()[:20]
    return File(file, head, header, status.st_size, status.st_mtime, version)


class Stripped(io.RawIOBase):
    """The bytes of a .cmps file without EXIF and XMP, which lie behind its layers: another header, then the layers."""

    def __init__(self, file: File) -> None:
        self.file, self.at = file, 0
        self.head = container.strip_header(file.header, file.head)
        self.size = len(self.head) + min(file.size, file.header.layers[-1].end) - len(file.head)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.head[self.at : self.at + len(buffer)]
        if not part:
            self.file.opened.seek(self.at - len(self.head) + len(self.file.head))
            part = self.file.opened.read(min(len(buffer), max(0, self.size - self.at)))
            if not part and self.at < self.size:
                raise EOFError("the file was cut off while it was sent")
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def close(self) -> None:
        self.file.opened.close()
        super().close()


class OpenFileResponse(FileResponse):
    """Starlette's answer with a file, ranges and all, for one that is open already. It closes the file."""

    def __init__(self, file: Stripped, headers: Mapping[str, str], media_type: str) -> None:
        self.file = file
        status = os.stat_result((0, 0, 0, 0, 0, 0, file.size, 0, file.file.modified, 0))
        super().__init__(os.devnull, headers=headers, media_type=media_type, stat_result=status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.file, suppress(EOFError):  # the server then breaks the connection off
            await super().__call__({**scope, "extensions": {}}, receive, send)  # no server may send the path

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        yield anyio.wrap_file(io.BufferedReader(self.file))


def choose(layers: list[tuple[int, int]], width: int | None, height: int | None) -> tuple[int, tuple[int, int]]:
    """The smallest of ``layers`` (width, height each, smallest first) that covers what fits into ``width`` and
    ``height``, where given, and the size to reduce it to. Nothing is enlarged beyond the last layer."""
    if width or height:
        for k, (w, h) in enumerate(layers):
            factor = min(width / w if width else math.inf, height / h if height else math.inf)
            if factor <= 1:
                return k, (max(1, round(w * factor)), max(1, round(h * factor)))
    return len(layers) - 1, layers[-1]


def negotiate(accept: str, opaque: bool = True, side: int = 1) -> str | None:
    """The extension in TYPES that a request's Accept header likes best, of those that hold a picture whose larger side
    is ``side``. AVIF and WebP must be named, because many programs say */* and read neither; JPEG and PNG are also
    taken for image/* and */*. Only those who take nothing else get a JPEG, on white, of a picture with alpha."""
    weights: dict[str, float] = {}
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        kind, *parameters = (text.strip().lower() for text in part.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            weights[kind] = min(1.0, max(0.0, float(weight)))
        except ValueError:
            weights[kind] = 0.0

    def wanted(extension: str) -> float:
        if (extension == "jpg" and not opaque) or not holds(extension, side):
            return 0.0
        if TYPES[extension] in weights or extension in MODERN:
            return weights.get(TYPES[extension], 0.0)
        return weights.get("image/*", weights.get("*/*", 0.0))

    best = max(TYPES, key=wanted)
    if wanted(best) > 0:
        return best
    return None if opaque else negotiate(accept, True, side)


def holds(extension: str, side: int) -> bool:
    """Whether the type holds a picture whose larger side is ``side``."""
    return side <= SIDES.get(extension, math.inf)


class Layers:
    """Decodes layers in threads of its own, a limited number at a time, and keeps those that were used last.

    The threads are daemons: a decode of many seconds does not hold up the end of the program.
    """

    def __init__(self, codec: Codec, settings: Settings) -> None:
        self.codec, self.limit = codec, settings.cache
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, int], Future[Image.Image]] = OrderedDict()  # those that run among them
        self._jobs: queue.Queue[tuple[tuple[str, int], bytes, Future[Image.Image]]] = queue.Queue(settings.queue)
        for _ in range(settings.decodes):
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, file: File, layer: int) -> Future[Image.Image]:
        """One layer of ``file``; whoever asks for the same one meanwhile gets the same. What it needs is read at once:
        the file may change while the layer waits. Raises Busy when the queue is full; the future raises what decoding
        raises."""
        key = (file.version, layer)
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
            if self._jobs.full():  # only this puts, under the lock
                raise Busy
            future: Future[Image.Image] = Future()
            self._jobs.put_nowait((key, file.read(layer), future))
            self._found[key] = future
            return future

    def _work(self) -> None:
        while True:
            key, data, future = self._jobs.get()
            try:
                image = self._decode(data, key[1])
            except BaseException as e:
                with self._lock:
                    del self._found[key]
                future.set_exception(e)
            else:
                with self._lock:
                    future.set_result(image)
                    self._forget()

    def _decode(self, data: bytes, layer: int) -> Image.Image:
        image = self.codec.decode(data, layer, max_pixels=container.MAX_SIDE**2)
        header = container.read_header(data, container.MAX_SIDE**2)
        image.info["icc_profile"] = container.sections(header, data, (), best_effort=True).icc
        return image

    def _forget(self) -> None:
        """Drop those that were used longest ago until the others fit."""
        done = {key: future.result() for key, future in self._found.items() if future.done()}
        total = sum(image.width * image.height * len(image.getbands()) for image in done.values())
        for key, image in done.items():
            if total <= self.limit:
                return
            total -= image.width * image.height * len(image.getbands())
            del self._found[key]


def render(image: Image.Image, size: tuple[int, int], extension: str) -> bytes:
    """The picture reduced to ``size`` as a file of the type ``extension``, with its ICC profile."""
    icc = image.info.get("icc_profile")
    if extension == "jpg" and image.mode == "RGBA":
        image = pictures.flatten(image)
    if image.size != size or extension in MODERN:  # which mix hidden colours into edges
        image = pictures.reduced(image, size)
    buffer = io.BytesIO()
    format, options = SAVING[extension]
    image.save(buffer, format, icc_profile=icc, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Wanted:
    """An answer whose picture is still to come: a layer of the file ``name``, reduced to ``size``, as a ``kind``."""

    name: str
    layer: Future[Image.Image]
    size: tuple[int, int]
    kind: str
    headers: dict[str, str]


class App:
    """The answers to requests; ``make_app`` binds them to paths."""

    def __init__(self, folder: Path, codec: Codec, settings: Settings) -> None:
        self.folder, self.settings = folder.resolve(strict=True), settings
        self.layers = Layers(codec, settings)

    async def demo(self, _: Request) -> Response:
        """A page with every picture of the folder, as <img srcset>."""
        return HTMLResponse(await asyncio.to_thread(self._demo), headers={"Cache-Control": "no-cache"})

    def _demo(self) -> str:
        shown = []
        for name, _, sizes in self._sound():
            # "photo.png" asks for photo.cmps as PNG, so that photo.png.cmps needs one more
            address = f"{name}.png" if Path(name).suffix.lower() in (".cmps", *EXTENSIONS) else name
            shown.append(page.Picture(name, f"/{quote(os.fsencode(address))}", sizes))
        return page.demo(shown)

    def addresses(self) -> list[tuple[str, str]]:
        """Name and address of every file that the demo page shows."""
        return [(name, f"/{quote(os.fsencode(name))}{path.suffix}") for name, path, _ in self._sound()]

    def _sound(self) -> Iterator[tuple[str, Path, list[tuple[int, int, int]]]]:
        """The files whose header can be read: name, path, and width, height and end of each layer that may be asked
        for."""
        for name, path in sorted(self._names()):
            try:
                with load(path) as file:
                    sizes = [(e.width, e.height, e.end) for e in file.layers if self._allowed(e)]
            except (CompassError, OSError):
                continue
            if sizes:
                yield name, path, sizes

    def _names(self) -> Iterator[tuple[str, Path]]:
        """The files that can be asked for, without .cmps."""
        for where, folders, files in os.walk(self.folder):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            for file in files:
                name, _, suffix = (Path(where) / file).relative_to(self.folder).as_posix().rpartition(".")
                if suffix in SUFFIXES and (path := find(self.folder, name, suffix)) == find(self.folder, name) and path:
                    yield name, path

    def _allowed(self, entry: container.Layer) -> bool:
        return entry.width * entry.height <= self.settings.max_pixels

    async def picture(self, request: Request) -> Response:
        """One picture: name.cmps as it is, name.png and the like decoded, name in the type that the client likes."""
        try:
            found = await asyncio.to_thread(self._answer, request)
            if isinstance(found, Response):
                return found
            # shielded, so that one who goes away does not cancel it for the others
            image = await asyncio.shield(asyncio.wrap_future(found.layer))
            body = await asyncio.to_thread(render, image, found.size, found.kind)
            await asyncio.to_thread(self._find, found.name)  # nobody keeps a picture that was taken away meanwhile
            return Response(body, headers=found.headers, media_type=TYPES[found.kind])
        except asyncio.CancelledError:
            raise HTTPException(503, "the server stops") from None
        except (HTTPException, Busy, CompassError, OSError):
            raise
        except Exception as e:  # whatever a library says of one file's bytes
            raise CompassError(f"cannot be decoded ({type(e).__name__})") from e

    def _find(self, name: str, suffix: str = "cmps") -> Path:
        path = find(self.folder, name, suffix)
        if path is None:
            raise HTTPException(404, f"no picture {name}")
        return path

    def _load(self, name: str, suffix: str = "cmps") -> File:
        path = self._find(name, suffix)
        try:
            return load(path)
        except FileNotFoundError:
            raise HTTPException(404, f"no picture {name}") from None

    def _answer(self, request: Request) -> Response | Wanted:
        full = _name(request)
        stem, _, suffix = full.rpartition(".")
        extension = EXTENSIONS.get(f".{suffix.lower()}")
        if suffix in SUFFIXES and stem:
            return self._raw(request, stem, suffix)
        name = stem if extension and stem else full
        with self._load(name) as file:
            if not file.layers:
                raise TruncatedError("cut off inside layer 0")
            sizes = [(entry.width, entry.height) for entry in file.layers]
            layer, size = choose(sizes, _number(request, "w"), _number(request, "h"))
            if name == full:
                opaque = not file.header.has_alpha(layer)
                extension = negotiate(request.headers.get("accept", ""), opaque, max(size))
            if extension is None:
                held = [kind for extension, kind in TYPES.items() if holds(extension, max(size))]
                raise HTTPException(406, f"this picture comes as {', '.join(held)}", {"Vary": "Accept"})
            if not holds(extension, max(size)):
                limit = f"{extension} holds {SIDES[extension]} pixels a side"
                raise HTTPException(400, f"the picture would be {size[0]} x {size[1]}; {limit}")
            if not self._allowed(file.layers[layer]):
                needed = f"a layer of {sizes[layer][0]} x {sizes[layer][1]} pixels"
                raise HTTPException(400, f"that size needs {needed}; the limit is {self.settings.max_pixels}")
            facts = f"{file.version} {size} {extension} {__version__} {pillow_version}"
            headers = self._headers(hashlib.sha256(facts.encode()).hexdigest()[:24], file)
            if name == full:
                headers["Vary"] = "Accept"
            empty = Response(headers=headers, media_type=TYPES[extension])
            if _unchanged(empty, request):
                return NotModifiedResponse(empty.headers)
            if request.method == "HEAD":
                del empty.headers["content-length"]  # which only decoding tells
                return empty
            return Wanted(name, self.layers.start(file, layer), size, extension, headers)

    def _raw(self, request: Request, name: str, suffix: str) -> Response:
        file = Stripped(self._load(name, suffix))
        try:
            response = OpenFileResponse(file, self._headers(file.file.version, file.file), MEDIA_TYPE)
            if _unchanged(response, request):
                file.close()
                return NotModifiedResponse(response.headers)
        except BaseException:
            file.close()
            raise
        return response

    def _headers(self, etag: str, file: File) -> dict[str, str]:
        return {
            "ETag": f'"{etag}"',
            "Last-Modified": formatdate(file.modified, usegmt=True),
            "Cache-Control": f"public, max-age={self.settings.max_age}",
        }


def _name(request: Request) -> str:
    """The path behind the first slash, as a file name: its bytes are those that were sent, UTF-8 or not."""
    raw = request.scope.get("raw_path")  # with root_path, as Starlette's own path
    if raw is None:
        return str(request.path_params["name"])
    root = os.fsencode(request.scope.get("root_path", ""))
    return os.fsdecode(unquote_to_bytes(raw.partition(b"?")[0]).removeprefix(root).removeprefix(b"/"))


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and text.strip("0")):
        raise HTTPException(400, f"{name} must be a whole number of pixels, at least 1")
    text = text.lstrip("0")
    if len(text) > len(str(LARGEST)):
        raise HTTPException(400, f"{name} is too large; it may be {LARGEST} pixels at most")
    return int(text)


def _unchanged(response: Response, request: Request) -> bool:
    """Whether 304 will do for ``response``. Raises HTTPException 412 if a precondition does not hold."""
    asked, etag = request.headers, response.headers["etag"]
    if "if-match" in asked:
        same = bool({"*", etag} & {tag.strip() for tag in asked["if-match"].split(",")})
    else:
        since, modified = parsedate(asked.get("if-unmodified-since")), parsedate(response.headers["last-modified"])
        same = since is None or modified is None or modified <= since
    if not same:
        raise HTTPException(412, "the picture has changed since")
    return StaticFiles.is_not_modified(StaticFiles(check_dir=False), response.headers, asked)


class AnyPath(Convertor[str]):
    """Starlette's "path", and new lines."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any_path", AnyPath())


class Fields:
    """Middleware: what RFC 9110 says of header fields whatever the answer is, and what every answer has.

    Several lines of one field are one list (5.3). Range is for GET alone, and unknown units are ignored (14.2).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        fields: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            fields.setdefault(name, []).append(value)
        if scope["method"] != "GET" or not re.match(rb"bytes\s*=", fields.get(b"range", [b""])[0], re.IGNORECASE):
            fields.pop(b"range", None)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _always(message["status"]).items():
                    headers.setdefault(name, value)
            await send(message)

        joined = [(name, b", ".join(values)) for name, values in fields.items()]
        await self.app({**scope, "headers": joined}, receive, sending)


def _always(status: int) -> dict[str, str]:
    """Header fields of every answer of this status, unless it has others."""
    return SECURITY | ({"Cache-Control": "no-store"} if status >= 400 else {})


def make_app(folder: Path, codec: Codec, settings: Settings | None = None) -> Starlette:
    """The application that serves ``folder``. Raises OSError if there is no such folder."""
    app = App(folder, codec, settings or Settings())

    def line(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
        one = " ".join(os.fsencode(text).decode(errors="replace").split())  # names need not be UTF-8
        return PlainTextResponse(f"{one}\n", status, headers=_always(status) | dict(headers or {}))

    async def refused(_: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return line(e.status_code, e.detail, e.headers)

    async def busy(_: Request, __: Exception) -> Response:
        return line(503, "too many pictures are being decoded; try again", {"Retry-After": str(RETRY_AFTER)})

    async def broken(request: Request, e: Exception) -> Response:
        cause = f" {e.__cause__!r}" if e.__cause__ else ""
        logging.getLogger(__name__).error("%s", " ".join(f"{request.url.path}: {e}{cause}".split()))
        # where the server looked for weights, or which file failed, is no client's business
        why = "made with weights that are not here" if isinstance(e, WeightsError) else e
        return line(500, f"{request.url.path}: {why if isinstance(e, CompassError) else 'cannot be read'}")

    async def failed(_: Request, __: Exception) -> Response:
        return line(500, "the server failed")

    site = Starlette(
        routes=[
            Route("/", app.demo),
            *routes(app.addresses, app.settings.weights),
            Route("/{name:any_path}", app.picture),
        ],
        middleware=[Middleware(Fields)],
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
