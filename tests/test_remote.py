"""Files on a web server: what is fetched, and what happens when the server does not behave."""

import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from attach import attach
from conftest import compass

from compass_codec import container, remote
from compass_codec.errors import FormatError, LayerError, LimitError, RemoteError, TruncatedError


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content`` with ranges; ``server.mode`` names one way to misbehave."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, mode = self.server, self.server.mode
        server.requests.append((self.path, dict(self.headers)))
        content = server.content
        if mode == "silent":
            server.stop.wait(5)
            return
        if mode == "no reason":
            self.send_response(404, "")
            self.end_headers()
            return
        if mode == "status":
            self.reply(404, b"<html>no such\nthing</html>")
            return
        if mode == "redirect" and not self.path.startswith("/there"):
            self.reply(302, b"", Location=server.target)
            return
        if mode == "loop":
            self.reply(302, b"", Location=f"/{len(server.requests)}")
            return
        if mode == "ftp":
            self.reply(302, b"", Location="ftp://127.0.0.1/photo.cmps")
            return
        if mode == "gzip":
            self.reply(200, content, **{"Content-Encoding": "gzip"})
            return
        etag = '"v1"' if mode != "changes" or len(server.requests) == 1 else '"v2"'
        tags = {} if mode == "no etag" else {"ETag": "W/" + etag if mode == "weak" else etag}
        if mode == "changes weakly" and len(server.requests) > 1:
            tags = {"ETag": 'W/"v2"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.headers.get("If-Range", etag) != etag:
            match = None
        if match is None or mode in ("no ranges", "short", "chunked", "no length", "negative length"):
            self.whole(content, mode, tags)
            return
        first, stop = int(match[1]), min(int(match[2]) + 1, len(content))
        if first >= len(content):
            self.reply(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            return
        if mode == "piecemeal":
            stop = min(stop, first + 100)
        size = "*" if mode in ("unknown size", "piecemeal") else len(content)
        said = {
            "wrong start": f"bytes {first + 1}-{stop}/{size}",
            "wrong end": f"bytes {first}-{stop + 5}/{size}",
            "nonsense": "bytes all of it",
            "backwards": f"bytes {first}-{max(0, first - 1)}/{size}",
        }.get(mode, f"bytes {first}-{stop - 1}/{size}")
        if mode == "other size" and len(server.requests) > 1:
            said = f"bytes {first}-{stop - 1}/{size + 1}"
        body = content[first:stop]
        tags |= {} if mode == "no content range" else {"Content-Range": said}
        if mode == "short range":
            self.reply(206, body[:-3], length=len(body), **tags)
        else:
            self.reply(206, body, **tags)

    def whole(self, content, mode, tags):
        if mode == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n")
        elif mode == "no length":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
        elif mode == "negative length":
            self.reply(200, content, length=-5)
        elif mode == "short":
            self.reply(200, content[: len(content) // 2], length=len(content), **tags)
        else:
            self.reply(200, content, **tags)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length if length is not None else len(body)))
        self.end_headers()
        try:
            self.server.sent += len(body)
            self.wfile.write(body)
        except OSError:
            pass
        self.close_connection = length is not None


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content, mode):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.mode, self.requests, self.sent = content, mode, [], 0
        self.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/photo.cmps"
        self.target = "/there.cmps"

    def handle_error(self, request, client_address):
        """A client that hangs up early is no news, and must not print into what a test reads from stderr."""


@contextmanager
def serving(content, mode=""):
    with Server(content, mode) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()


def layered(*lengths, side=8) -> bytes:
    """A file whose layers hold bytes without a meaning."""
    sizes = [(side * 2**k, side * 2**k) for k in range(len(lengths))]
    parts = [bytes((i * 7 + k) % 256 for i in range(n)) for k, n in enumerate(lengths)]
    return container.write("00" * 6, sizes, [2.0**k for k in range(len(lengths))], [60] * len(lengths), parts)


BIG = layered(3000, 50_000, 4_000_000)
END = [entry.end for entry in container.read_header(BIG).layers]


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_only_what_a_layer_needs_is_fetched(layer):
    with serving(BIG) as server:
        found = remote.read_prefix(server.url, layer)
        data, header, last = found.data, found.header, found.layer
    assert found.fetched == server.sent and found.size == len(BIG)
    assert last == (2 if layer is None else layer)
    assert data == BIG[: END[last]] and header == container.read_header(BIG)
    assert server.sent == len(data)
    first, second = (headers for _, headers in server.requests)
    assert first["Range"] == "bytes=0-543" and second["Range"] == f"bytes=544-{END[last] - 1}"
    assert second["If-Range"] == '"v1"' and "If-Range" not in first
    assert first["User-Agent"].startswith("compass/")


def test_the_header_alone():
    with serving(BIG) as server, remote.Remote(server.url) as file:
        assert file.header() == container.read_header(BIG)
        assert file.size == len(BIG) and len(file.data) == server.sent == 544


@pytest.mark.parametrize("mode", ["", "no ranges", "unknown size", "piecemeal", "no etag"])
def test_metadata_at_the_end(mode):
    """EXIF and XMP lie behind the layers; what is between is not fetched where the server knows ranges."""
    sections = container.Sections(exif=b"II*\0" + bytes(500), xmp=b"<x/>")
    data = attach(layered(300, 900, 40_000), sections)
    with serving(data, mode) as server:
        found = remote.read_prefix(server.url, 1, metadata=True)
        assert container.sections(found.header, found.data, range(2), found.tail) == sections
        assert found.fetched == (len(data) if mode == "no ranges" else found.header.layers[1].end + 508)
        assert remote.read_prefix(server.url, 1).tail == b""
    with serving(data[:-3], mode) as server:
        found = remote.read_prefix(server.url, 1, metadata=True)
        expected = container.Sections(exif=sections.exif)
        assert container.sections(found.header, found.data, range(2), found.tail) == expected


def test_a_small_file_takes_one_request():
    data = layered(20, 30)
    with serving(data) as server:
        assert remote.read_prefix(server.url, None).data == data
    assert len(server.requests) == 1


@pytest.mark.parametrize("mode", ["no ranges", "chunked", "no length", "negative length"])
def test_a_server_without_ranges_is_read_only_as_far_as_needed(mode):
    with serving(BIG, mode) as server, remote.Remote(server.url) as file:
        header = file.header()
        assert file.read(header.layers[1].end) == BIG[: END[1]]
        assert len(file.data) == END[1] and len(server.requests) == 1
    with serving(BIG, mode) as server:
        found = remote.read_prefix(server.url, None)
        assert (found.data, found.layer) == (BIG, 2)
        assert remote.read_prefix(server.url, 1).data == BIG[: END[1]]


@pytest.mark.parametrize(
    "mode", ["", "no ranges", "chunked", "no length", "unknown size", "no etag", "weak", "piecemeal"]
)
def test_a_file_that_was_cut_off(mode):
    cut = BIG[: END[1] + 700]
    with serving(cut, mode) as server:
        found = remote.read_prefix(server.url, None)
        assert found.layer == 1 and found.data == cut[: END[1]]
        with pytest.raises(TruncatedError, match="layer 2 ends at"):
            remote.read_prefix(server.url, 2)


@pytest.mark.parametrize("mode", ["", "no ranges", "unknown size"])
def test_an_empty_file_and_another_file(mode):
    with serving(b"", mode) as server, pytest.raises(FormatError, match="empty"):
        remote.read_prefix(server.url, None)
    with serving(b"<html>" * 1000, mode) as server, pytest.raises(FormatError, match="not a"):
        remote.read_prefix(server.url, None)
    with serving(BIG[:40], mode) as server, pytest.raises(TruncatedError, match="header"):
        remote.read_prefix(server.url, None)


def test_limits_are_checked_before_anything_else_is_fetched():
    with serving(BIG) as server:
        with pytest.raises(LimitError):
            remote.read_prefix(server.url, 0, max_pixels=500)
        with pytest.raises(LayerError):
            remote.read_prefix(server.url, 7)
        assert server.sent == 2 * 544


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("status", "404"),
        ("no reason", "the server answers 404$"),
        ("loop", "302"),
        ("ftp", "ftp"),
        ("gzip", "gzip"),
        ("short", "the connection ended after 2"),
        ("short range", "the connection ended after 541 bytes"),
        ("wrong start", "another range"),
        ("wrong end", "another range"),
        ("backwards", "another range"),
        ("nonsense", "sends an invalid range"),
        ("no content range", "no Content-Range"),
        ("changes", "changed"),
        ("changes weakly", "changed"),
        ("other size", "changed"),
    ],
)
def test_servers_that_do_not_behave(mode, message):
    with serving(BIG, mode) as server, pytest.raises(RemoteError, match=message) as error:
        remote.read_prefix(server.url, None)
    assert "\n" not in str(error.value)


def test_a_server_that_says_nothing():
    with serving(BIG, "silent") as server, pytest.raises(RemoteError, match=r"silent for 0.2 seconds"):
        remote.read_prefix(server.url, None, timeout=0.2)


def test_redirects_are_followed_once():
    with serving(BIG, "redirect") as server:
        assert remote.read_prefix(server.url, 1).data == BIG[: END[1]]
    assert [path for path, _ in server.requests] == ["/photo.cmps", "/there.cmps", "/there.cmps"]


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RemoteError, match="refused"):
        remote.read_prefix(f"http://127.0.0.1:{port}/photo.cmps", None)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "data://x", "http://", "http://127.0.0.1:x/y", "http://[::1/x",
     "http://127.0.0.1/a b", "http://127.0.0.1/\xe9", "http://a\nb/"],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(RemoteError) as error:
        remote.read_prefix(url, None, timeout=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [("http://h/a/photo.cmps?x=1#y", "photo.cmps"), ("http://h/a%20b.cmps", "a b.cmps"), ("http://h/", "decoded.cmps"),
     ("http://h/x%2F..%2Fetc%2Fpasswd", "passwd"), ("http://h/a%00b", "ab"), ("http://h", "decoded.cmps"),
     ("http://[::1/x.cmps", "decoded.cmps")],
)  # fmt: skip
def test_names_of_outputs(url, name):
    assert str(remote.file_name(url)) == name


def test_decode_from_the_web(tmp_path, monkeypatch, small_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.cmps").write_bytes(small_file)
    assert compass("decode", "local.cmps", "--all").code == 0
    end = container.read_header(small_file).layers[1].end
    with serving(small_file) as server:
        result = compass("decode", server.url, "--layer", 1)
        assert result.code == 0 and result.out == "photo.layer1.png: layer 1, 40 x 30\n"
        fetched = max(end, 544)
        assert result.err == f"note: photo.cmps: {fetched} bytes fetched of {len(small_file)}\n"
        assert server.sent == fetched
        assert (tmp_path / "photo.layer1.png").read_bytes() == (tmp_path / "local.layer1.png").read_bytes()
        assert compass("decode", server.url, "-o", "x.png", "--quiet").err == ""
        assert (tmp_path / "x.png").read_bytes() == (tmp_path / "local.layer2.png").read_bytes()
        assert "exists" in compass("decode", server.url, "-o", "x.png").err
        for args in (["local.cmps"], ["--out-dir", tmp_path], ["--ray"], ["--files-from", "local.cmps"]):
            result = compass("decode", server.url, *args)
            assert result.code == 2 and "for one file alone" in result.err
    with serving(small_file, "status") as server:
        result = compass("decode", server.url)
        assert result.code == 1 and result.err == f"compass: {server.url}: the server answers 404 Not Found\n"
    result = compass("decode", "http://[::1/x.cmps")
    assert result.code == 2
    assert result.err == "compass: Invalid value for '[FILES]...': http://[::1/x.cmps: Invalid IPv6 URL\n"


def test_info_from_the_web(tmp_path, small_file):
    (tmp_path / "local.cmps").write_bytes(BIG)
    local = compass("info", tmp_path / "local.cmps").out.splitlines()
    with serving(BIG) as server:
        result = compass("info", server.url)
        assert server.sent == 544 and result.out.splitlines()[1:] == local[1:]
        assert result.out.startswith(f"{server.url}: compass version 2, {len(BIG)} bytes")
        facts = json.loads(compass("info", server.url, "--json").out)
        assert facts["size"] == len(BIG) and {layer["state"] for layer in facts["layers"]} == {"not read"}
    with serving(BIG[: END[1] + 9]) as server:
        assert "cut off" in compass("info", server.url).out.splitlines()[-1]
    with serving(BIG, "no length") as server:
        assert "unknown bytes" in compass("info", server.url).out
        assert json.loads(compass("info", server.url, "--json").out)["size"] is None
    for url in ("ftp://h/x.cmps", "file:///etc/passwd"):
        result = compass("info", url)
        assert result.code == 1 and result.err == f"compass: {url}: only http and https addresses can be read\n"
