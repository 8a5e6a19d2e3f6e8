"""A .cmps file on a web server: only the bytes that a layer needs are fetched, with HTTP Range requests."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from urllib.parse import unquote, urlsplit

from compass_codec import __version__, container
from compass_codec.errors import RemoteError

TIMEOUT = 30.0  # seconds without a byte


def file_name(url: str) -> Path:
    """The local name of the file at ``url``; any address has one, also one that ``Remote`` refuses."""
    try:
        path = urlsplit(url).path
    except ValueError:  # half a bracket
        path = ""
    return Path(Path(unquote(path).replace("\0", "")).name or "decoded.cmps")


class Remote:
    """The first part of a file on a web server, fetched as it is asked for.

    ``data`` is the first part so far, ``size`` the bytes of the whole file, or None where the server does not say, and
    ``fetched`` counts bytes. A server that knows no ranges sends everything: it is read as far as needed, then the
    connection is closed.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        """Nothing is fetched yet. Raises RemoteError unless ``url`` begins with http:// or https://."""
        self.url, self.timeout = url, timeout
        self.data: bytes = b""
        self.size: int | None = None
        self.fetched = 0
        self._version: tuple[str | None, ...] = ()
        self._whole: http.client.HTTPResponse | None = None
        with self._in_one_line():
            if urlsplit(url).scheme.lower() not in ("http", "https"):
                raise RemoteError("only http and https addresses can be read")

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        if self._whole is not None:
            self._whole.close()

    def read(self, end: int) -> bytes:
        """The first ``end`` bytes of the file, or all of it where it is shorter. Raises RemoteError."""
        while len(self.data) < end and len(self.data) != self.size:
            self.data += self._fetch(len(self.data), end)
        return self.data[:end]

    def part(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``, as far as they are there; those before only if the server knows no ranges."""
        if self._whole is not None or start <= len(self.data):
            return self.read(end)[start:]
        found = b""
        while start + len(found) < end and (self.size is None or start + len(found) < self.size):
            if not (more := self._fetch(start + len(found), end)):
                break
            found += more
        return found

    def header(self, max_pixels: int = container.MAX_PIXELS) -> container.Header:
        """The file's header, as ``container.read_header`` gives it."""
        return container.read_header(self.read(container.MAX_HEADER), max_pixels)

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes from ``start`` on, at most to ``end``. None at all mean that the file ends there; ``size`` says so."""
        with self._in_one_line():
            if self._whole is None:
                answer = self._ask(start, end)
                if answer is None:
                    return b""
                if answer.status == 206:
                    with answer:
                        return self._take(answer, start, self._range(answer.headers, start, end))
                self._whole = answer
            part = self._take(self._whole, start, end if self.size is None else min(end, self.size))
            if not part:
                self.size = start
            return part

    def _ask(self, start: int, end: int) -> http.client.HTTPResponse | None:
        """Send a request for bytes ``start`` to ``end``; None means that the file ends before."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        etag = self._version[0] if self._version else None
        if etag and not etag.startswith("W/"):
            headers["If-Range"] = etag
        request = urllib.request.Request(self.url, headers={"User-Agent": f"compass/{__version__}", **headers})
        try:
            answer: http.client.HTTPResponse = _opener().open(request, timeout=self.timeout)
        except urllib.error.HTTPError as e:
            if e.code != 416:
                raise
            if self.size is not None:
                raise RemoteError("the file changed on the server while it was read") from e
            self.size = start
            return None
        if answer.status not in (200, 206):
            raise RemoteError(f"the server answers {answer.status} {answer.reason}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise RemoteError(
                f"the server compresses it ({answer.headers['Content-Encoding']}), so byte ranges cannot be read"
            )
        version = (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        if start and (answer.status == 200 or version != self._version):
            raise RemoteError("the file changed on the server while it was read")
        self._version, self.url = version, answer.url
        if answer.status == 200 and (length := answer.headers.get("Content-Length", "")).isdecimal():
            self.size = int(length)
        return answer

    def _range(self, headers: Message, start: int, end: int) -> int:
        """The end of the range that the server says it sends, and the file's size; both checked."""
        text = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text)
        if not match:
            raise RemoteError(f"the server sends an invalid range ({text[:60] or 'no Content-Range'})")
        first, stop = int(match[1]), int(match[2]) + 1
        size = None if match[3] == "*" else int(match[3])
        if first != start or not start < stop <= end or (size is not None and stop > size):
            raise RemoteError(f"the server sends another range than was asked for ({text[:60]})")
        if start and size != self.size:
            raise RemoteError("the file changed on the server while it was read")
        self.size = size
        return stop

    def _take(self, answer: http.client.HTTPResponse, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` out of an answer; less only where nobody promised more."""
        part = answer.read(end - start)
        self.fetched += len(part)
        if len(part) < end - start and (answer.status == 206 or self.size is not None):
            raise RemoteError(
                f"the connection ended after {start + len(part)} bytes, before the length that the server announced"
            )
        return part

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turn every failure of the transfer into a RemoteError of one line."""
        try:
            yield
        except RemoteError:
            raise
        except urllib.error.HTTPError as e:
            with e:
                raise RemoteError(f"the server answers {e.code} {' '.join(str(e.reason).split())}".strip()) from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            cause = e.reason if isinstance(e, urllib.error.URLError) else e
            if isinstance(cause, TimeoutError):
                raise RemoteError(f"the server is silent for {self.timeout:g} seconds") from e
            text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise RemoteError(f"cannot be fetched ({' '.join(text.split())})") from e


def _opener() -> urllib.request.OpenerDirector:
    """One that follows redirects and proxies, and knows http and https alone (urlopen would follow to ftp)."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@dataclass(frozen=True)
class Prefix:
    """The part of a file that a layer needs: its first bytes, the header, the layer's index, and the metadata behind
    the layers if that was asked for. ``fetched`` of ``size`` bytes (None: unknown) were read from the server."""

    data: bytes
    header: container.Header
    layer: int
    tail: bytes
    fetched: int
    size: int | None


def read_prefix(
    url: str,
    layer: int | None,
    max_pixels: int = container.MAX_PIXELS,
    metadata: bool = False,
    timeout: float = TIMEOUT,
) -> Prefix:
    """Fetch the part of the file at ``url`` that ``layer`` needs (default: the highest that the file holds whole), and
    with ``metadata`` EXIF and XMP, which lie at its end.

    The header comes first, and nothing more if it breaks a limit. Raises RemoteError and what
    ``container.read_header`` and ``container.pick`` raise.
    """
    with Remote(url, timeout) as remote:
        header = remote.header(max_pixels)
        behind = header.layers[-1].end
        end = behind if layer is None else header.layers[min(layer, len(header.layers) - 1)].end
        size = len(remote.read(end)) if remote.size is None else remote.size
        last = container.pick(header, size, layer)
        data = remote.read(header.layers[last].end)
        tail = remote.part(behind, header.end) if metadata and header.end > behind else b""
        return Prefix(data, header, last, tail, remote.fetched, remote.size)
