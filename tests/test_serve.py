"""The image server, over real connections."""

import asyncio
import contextlib
import html
import http.client
import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from attach import attach
from browser import browser, complaints, loaded
from conftest import compass, crop, psnr
from PIL import Image, ImageCms

import compass_codec.pillow  # noqa: F401
from compass_codec import container, remote, weights

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from starlette.requests import Request  # noqa: E402

from compass_codec import page, server  # noqa: E402


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.body))

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert self.headers["content-type"] == "text/plain; charset=utf-8"
        text = self.body.decode()
        assert text.endswith("\n") and len(text.splitlines()) == 1 and "Traceback" not in text
        return text


class Running:
    """An application behind uvicorn on a free port."""

    def __init__(self, app) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=[[self.socket]], daemon=True)
        self.thread.start()

    def get(self, path: str, method: str = "GET", **headers: str | list[str]) -> Answer:
        """A header's lines, where it has several, are a list."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers.items():
                for line in [value] if isinstance(value, str) else value:
                    connection.putheader(name.replace("_", "-"), line)
            connection.endheaders()
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


class Counted:
    """The codec, counting what it decodes; ``gate`` holds it up."""

    def __init__(self, codec) -> None:
        self.codec, self.decoded, self.gate = codec, [], threading.Event()
        self.gate.set()

    def decode(self, data, layer, max_pixels):
        self.decoded.append(layer)
        self.gate.wait(30)
        return self.codec.decode(data, layer, max_pixels)


class Drawn:
    """A codec that draws what the header of any file says, alpha opaque."""

    def decode(self, data, layer, max_pixels):
        header = container.read_header(data, max_pixels)
        entry = header.layers[layer]
        return Image.new("RGB", (entry.width, entry.height), "red")


def made_up(*sizes: tuple[int, int]) -> bytes:
    """A file of such layers whose bytes mean nothing."""
    count = len(sizes)
    return container.write("0123456789ab", sizes, range(1, count + 1), [50] * count, [b"x" * 50] * count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_file) -> Path:
    """photo.cmps, one in a folder below, damaged and cut ones, and files that must not be seen."""
    top = tmp_path_factory.mktemp("served")
    folder = top / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / "photo.cmps").write_bytes(small_file)
    (folder / "more" / "a b,c.cmps").write_bytes(small_file)
    ends = [entry.end for entry in container.read_header(small_file).layers]
    (folder / "cut.cmps").write_bytes(small_file[: ends[1] + 5])
    (folder / "stub.cmps").write_bytes(small_file[: ends[0] - 5])
    (folder / "damaged.cmps").write_bytes(small_file[:-3] + bytes([small_file[-3] ^ 8]) + small_file[-2:])
    (folder / "text.cmps").write_text("no such picture")
    (folder / "notes.txt").write_text("private")
    (top / "secret.cmps").write_bytes(small_file)
    (top / "pictures-too").mkdir()
    (top / "pictures-too" / "secret.cmps").write_bytes(small_file)
    (folder / "link.cmps").symlink_to(top / "secret.cmps")
    (folder / "inside.cmps").symlink_to(folder / "photo.cmps")
    (folder / "circle.cmps").symlink_to(folder / "circle.cmps")
    (folder / "away").symlink_to(top)
    for hidden in (folder / ".hidden.cmps", folder / ".git" / "x.cmps", folder / "more" / ".git" / "x.cmps"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(small_file)
    return folder


@pytest.fixture(scope="module")
def site(folder, codec):
    running = Running(server.make_app(folder, codec))
    yield running
    running.stop()


@pytest.fixture
def start():
    """Start a server with settings of its own."""
    started = []

    def begin(folder, codec, **settings) -> Running:
        started.append(Running(server.make_app(folder, codec, server.Settings(**settings))))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


@pytest.mark.parametrize(
    ("query", "size"),
    [
        ("", (80, 60)),
        ("?w=20", (20, 15)),
        ("?w=40", (40, 30)),
        ("?w=30", (30, 22)),
        ("?h=15", (20, 15)),
        ("?h=21", (28, 21)),
        ("?w=40&h=15", (20, 15)),
        ("?w=20&h=60", (20, 15)),
        ("?w=1", (1, 1)),
        ("?w=5000", (80, 60)),
        ("?w=5000&h=5000", (80, 60)),
        ("?w=60&other=1", (60, 45)),
    ],
)
def test_sizes(site, query, size):
    answer = site.get(f"/photo.png{query}")
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    assert answer.image.format == "PNG" and answer.image.size == size


def test_layers_come_as_they_are(site, codec, small_file):
    for k, width in enumerate((20, 40, 80)):
        assert (np.asarray(site.get(f"/photo.png?w={width}").image) == np.asarray(codec.decode(small_file, k))).all()


def test_a_size_between_is_the_layer_above_reduced(site, codec, small_file):
    top = codec.decode(small_file, 2)
    assert psnr(site.get("/photo.png?w=60").image, top.resize((60, 45), Image.Resampling.BICUBIC)) > 40


def test_the_smallest_layer_that_covers():
    layers = [(20, 15), (40, 30), (40, 30), (80, 61)]
    for width, height, expected in [
        (None, None, (3, (80, 61))),
        (20, None, (0, (20, 15))),
        (21, None, (1, (21, 16))),
        (None, 31, (3, (41, 31))),
        (40, 31, (1, (40, 30))),
        (100, 20, (1, (27, 20))),
        (81, None, (3, (80, 61))),
        (1, 1, (0, (1, 1))),
    ]:
        assert server.choose(layers, width, height) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF")],
)
def test_types(site, codec, small_file, name, kind):
    answer = site.get(f"/photo.{name}", accept="image/gif")
    assert answer.image.format == kind and answer.headers["content-type"] == f"image/{kind.lower()}"
    assert "vary" not in answer.headers
    assert psnr(answer.image.convert("RGB"), codec.decode(small_file, 2)) > 25


CHROME = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (CHROME, "avif"),
        ("image/webp,*/*", "webp"),
        ("*/*", "jpg"),
        ("", "jpg"),
        ("image/*;q=0.5", "jpg"),
        ("image/png,*/*;q=0.5", "png"),
        ("image/avif;q=0, image/webp;q=0.5, image/png;q=0.9", "png"),
        ("image/avif;q=0.1,image/jpeg", "jpg"),
        ("IMAGE/WEBP", "webp"),
        ("image/webp;q=nonsense,image/png", "png"),
        ("text/html", None),
        ("image/gif", None),
    ],
)
def test_negotiation(accept, kind):
    assert server.negotiate(accept) == kind


def test_transparent_pictures_become_jpeg_only_for_those_who_take_nothing_else():
    assert server.negotiate("*/*", opaque=False) == "png"
    assert server.negotiate("image/jpeg, image/png;q=0.1", opaque=False) == "png"
    assert server.negotiate("image/jpeg", opaque=False) == "jpg"
    assert server.negotiate("image/jpeg;q=0", opaque=False) is None
    assert server.negotiate(CHROME, opaque=False) == "avif"


def test_the_type_follows_the_accept_header(site):
    answer = site.get("/photo?w=20", accept=CHROME)
    assert answer.image.format == "AVIF" and answer.headers["vary"] == "Accept"
    other = site.get("/photo?w=20", accept="image/png")
    assert other.image.format == "PNG" and other.headers["etag"] != answer.headers["etag"]
    refused = site.get("/photo", accept="text/html")
    assert refused.status == 406 and "image/png" in refused.line and refused.headers["vary"] == "Accept"


def test_alpha_and_profile(start, tmp_path, codec):
    picture = crop(24, 16).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((24, 16)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "x.cmps", scales=[1, 2], icc_profile=profile, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    site = start(tmp_path, codec)
    for query, accept, kind, mode in [
        (".png", "", "PNG", "RGBA"),
        (".png?w=18", "", "PNG", "RGBA"),
        (".webp", "", "WEBP", "RGBA"),
        (".avif", "", "AVIF", "RGBA"),
        (".jpg", "", "JPEG", "RGB"),
        ("", "*/*", "PNG", "RGBA"),
        ("", CHROME, "AVIF", "RGBA"),
    ]:
        image = site.get(f"/x{query}", accept=accept).image
        assert (image.format, image.mode) == (kind, mode) and image.info["icc_profile"] == profile
        assert not image.getexif(), "not on the web"
    flat = site.get("/x", accept="image/jpeg")
    assert flat.headers["content-type"] == "image/jpeg" and flat.body == site.get("/x.jpg").body


@pytest.mark.parametrize("width", [96, 70, 31])
@pytest.mark.parametrize(("extension", "apart"), [("png", 1), ("webp", 6), ("avif", 6)])
def test_edges_keep_their_colour(width, extension, apart):
    """A disc of one colour on nothing: no other colour comes in from what is hidden."""
    y, x = np.mgrid[:96, :96]
    inside = np.hypot(x - 47.5, y - 47.5) < 40
    colour = np.array([220, 60, 40])
    pixels = np.concatenate([inside[..., None] * colour, inside[..., None] * 255], 2).astype(np.uint8)
    body = server.render(Image.fromarray(pixels, "RGBA"), (width, width), extension)
    got = np.asarray(Image.open(io.BytesIO(body)).convert("RGBA")).astype(int)
    seen = got[got[..., 3] >= 16]
    assert len(seen) > width and 0 in got[..., 3]
    assert np.abs(seen[:, :3] - colour).mean(0).max() <= apart / 2
    assert np.percentile(np.abs(seen[:, :3] - colour), 99) <= apart


def test_types_that_cannot_hold_the_picture(start, tmp_path):
    for name, side in [("webp", 16384), ("avif", 32769), ("jpg", 65501)]:
        (tmp_path / f"{name}.cmps").write_bytes(made_up((1, 9), (1, side)))
    site = start(tmp_path, Drawn())
    for name, accept, kind in [
        ("webp", "image/webp,*/*", "JPEG"),
        ("webp", "image/avif;q=0.9,image/webp", "AVIF"),
        ("avif", CHROME, "JPEG"),
        ("jpg", CHROME, "PNG"),
        ("jpg", "*/*", "PNG"),
    ]:
        image = site.get(f"/{name}", accept=accept).image
        assert image.format == kind and image.size[1] == server.SIDES[name] + 1
        answer = site.get(f"/{name}.{name}")
        assert answer.status == 400 and f"{server.SIDES[name]} pixels" in answer.line
        assert site.get(f"/{name}.{name}?h=9").image.size == (1, 9), "smaller ones it holds"
        assert site.get(f"/{name}?h=9", accept=f"image/{kind.lower()}").image.format == kind
    answer = site.get("/webp", accept="image/webp")
    assert answer.status == 406 and "image/webp" not in answer.line and "image/png" in answer.line


def test_validation(site):
    first = site.get("/photo.png?w=20")
    etag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]+"', etag) and first.headers["cache-control"] == "public, max-age=3600"
    for headers in ({"If_None_Match": etag}, {"If_None_Match": f'"x", W/{etag}'}, {"If_None_Match": "*"},
                    {"If_Modified_Since": first.headers["last-modified"]}):  # fmt: skip
        again = site.get("/photo.png?w=20", **headers)
        assert again.status == 304 and again.body == b"" and again.headers["etag"] == etag
    assert site.get("/photo.png?w=20", If_None_Match='"other"').status == 200
    assert site.get("/photo.png?w=40", If_None_Match=etag).status == 200, "another size, another tag"
    assert site.get("/photo.webp?w=20", If_None_Match=etag).status == 200


def test_a_file_that_changes_has_another_tag(start, tmp_path, codec, small_file):
    (tmp_path / "x.cmps").write_bytes(small_file)
    site = start(tmp_path, codec)
    first = site.get("/x.png")
    (tmp_path / "x.cmps").write_bytes(codec.encode(crop(40, 30), [1], 50).data)
    second = site.get("/x.png", If_None_Match=first.headers["etag"])
    assert second.status == 200 and second.image.size == (40, 30)


def test_head_decodes_nothing_and_knows_no_ranges(start, folder, codec, small_file):
    counted = Counted(codec)
    site = start(folder, counted)
    head = site.get("/photo.png?w=20", method="HEAD")
    assert head.status == 200 and head.body == b"" and counted.decoded == []
    got = site.get("/photo.png?w=20")
    assert "content-length" not in head.headers, "which is not known"
    for name in ("content-type", "etag", "last-modified", "cache-control"):
        assert head.headers[name] == got.headers[name]
    head = site.get("/photo.cmps", method="HEAD", Range="bytes=10-99")
    assert head.status == 200 and head.headers["content-length"] == str(len(small_file))


@pytest.mark.parametrize("path", ["/photo.png?w=20", "/photo?w=20", "/photo.cmps"])
def test_preconditions(site, path):
    first = site.get(path)
    etag, date = first.headers["etag"], first.headers["last-modified"]
    long_ago = "Mon, 01 Jan 2001 00:00:00 GMT"
    for headers in ({"If_Match": '"other"'}, {"If_Match": f"W/{etag}"}, {"If_Unmodified_Since": long_ago},
                    {"If_Match": '"other"', "If_None_Match": etag}):  # fmt: skip
        answer = site.get(path, **headers)
        assert answer.status == 412 and answer.line
    for headers in ({"If_Match": "*"}, {"If_Match": f'"other", {etag}'}, {"If_Match": ['"other"', etag]},
                    {"If_Unmodified_Since": date}, {"If_Unmodified_Since": "nonsense"},
                    {"If_Match": etag, "If_Unmodified_Since": long_ago}):  # fmt: skip
        assert site.get(path, **headers).body == first.body
    assert site.get(path, If_Match=etag, If_None_Match=etag).status == 304
    assert site.get(path, If_None_Match=['"other"', etag]).status == 304, "several lines are one list"


def test_several_accept_lines_are_one_list(site):
    assert site.get("/photo?w=20", accept=["text/html", "image/png"]).image.format == "PNG"
    assert site.get("/photo?w=20", accept=["image/png;q=0.5", "image/webp"]).image.format == "WEBP"


def test_ranges_that_are_ignored(site, small_file):
    for unit in ("pages=1-2", "nonsense", "Bytes", "seconds=0-1, bytes=0-9"):
        answer = site.get("/photo.cmps", Range=unit)
        assert answer.status == 200 and answer.body == small_file, unit
    assert site.get("/photo.cmps", Range="BYTES=0-9").body == small_file[:10]


def test_several_ranges(site, small_file):
    answer = site.get("/photo.cmps", Range="bytes=0-9,100-109,-5")
    assert answer.status == 206 and answer.headers["content-type"].startswith("multipart/byteranges")
    assert all(part in answer.body for part in (small_file[:10], small_file[100:110], small_file[-5:]))


@pytest.mark.parametrize(
    ("path", "headers", "status", "kept"),
    [
        ("/", {}, 200, "no-cache"),
        ("/photo.png?w=20", {}, 200, "public, max-age=3600"),
        ("/photo.png?w=20", {"If_None_Match": "*"}, 304, "public, max-age=3600"),
        ("/photo.cmps", {"If_None_Match": "*"}, 304, "public, max-age=3600"),
        ("/photo.cmps", {"Range": "bytes=0-9"}, 206, "public, max-age=3600"),
        ("/photo.cmps", {"Range": "bytes=9999999-"}, 416, "no-store"),
        ("/photo.cmps", {"Range": "bytes=9-1"}, 400, "no-store"),
        ("/photo.png", {"If_Match": '"other"'}, 412, "no-store"),
        ("/photo", {"accept": "text/html"}, 406, "no-store"),
        ("/photo.png?w=0", {}, 400, "no-store"),
        ("/none", {}, 404, "no-store"),
        ("/photo.png", {"method": "POST"}, 405, "no-store"),
        ("/damaged.png", {}, 500, "no-store"),
    ],
)
def test_what_every_answer_has(site, path, headers, status, kept):
    answer = site.get(path, **headers)
    assert answer.status == status and answer.headers["cache-control"] == kept
    assert answer.headers["x-content-type-options"] == "nosniff" and "content-security-policy" in answer.headers


def test_the_file_itself_in_ranges(site, small_file):
    whole = site.get("/photo.cmps")
    assert whole.body == small_file and whole.headers["content-type"] == "image/x-cmps"
    assert whole.headers["accept-ranges"] == "bytes"
    part = site.get("/photo.cmps", Range="bytes=10-99")
    assert part.status == 206 and part.body == small_file[10:100]
    assert part.headers["content-range"] == f"bytes 10-99/{len(small_file)}"
    etag = whole.headers["etag"]
    assert site.get("/photo.cmps", Range="bytes=10-99", If_Range=etag).status == 206
    assert site.get("/photo.cmps", Range="bytes=10-99", If_Range='"old"').body == small_file
    assert site.get("/photo.cmps", If_None_Match=etag).status == 304
    assert site.get("/photo.cmps", Range=f"bytes={len(small_file)}-").status == 416


def test_metadata_stays_here(start, tmp_path, codec):
    """Not only out of decoded pictures; the rest of the file, alpha and profile too, is as it was."""
    picture = crop(24, 16).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((24, 16)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = attach(codec.encode(picture, [1, 2], 50).data, container.Sections())
    alpha = container.sections(header := container.read_header(full := codec.encode(picture, [1, 2]).data), full).alpha
    assert sorted(alpha) == [0, 1]
    secret = {"exif": b"II*\0\x08\0\0\0\0\0 GPS", "xmp": b"<GPS>"}
    for name, kept in [("all", {"icc": profile, "alpha": alpha}), ("none", {})]:
        there = attach(plain if name == "none" else full, container.Sections(**kept, **secret))
        (tmp_path / f"{name}.cmps").write_bytes(there)
        expected = attach(there, container.Sections(**kept))
        site = start(tmp_path, codec)
        answer = site.get(f"/{name}.cmps")
        assert answer.body == expected and b"GPS" not in answer.body and b"GPS" in there
        assert answer.headers["content-length"] == str(len(expected))
        for first, last in [
            (0, 9),
            (3, len(expected) - 5),
            (header.length, 2 * header.length),
            (5, len(expected) + 99),
        ]:
            assert site.get(f"/{name}.cmps", Range=f"bytes={first}-{last}").body == expected[first : last + 1]
        found = remote.read_prefix(f"http://127.0.0.1:{site.port}/{name}.cmps", None, metadata=True)
        assert found.data == expected and found.tail == b""
        end = container.read_header(there).layers[0].end
        (tmp_path / "cut.cmps").write_bytes(there[: end + 2])
        shorter = site.get("/cut.cmps").body
        assert codec.decode(shorter).size == (12, 8) and expected.startswith(shorter)


def test_our_own_client_reads_it(site, small_file):
    found = remote.read_prefix(f"http://127.0.0.1:{site.port}/photo.cmps", 1)
    assert found.data == small_file[: found.header.layers[1].end]


@pytest.mark.parametrize(
    "path",
    ["/none.png", "/none", "/none.cmps", "/notes.txt", "/.png", "/.cmps", "/../secret.png", "/../secret.cmps",
     "/%2e%2e/secret.png", "/..%2fsecret.cmps", "/more/../../secret.png", "/more/%2e%2e/%2e%2e/secret.cmps",
     "/../pictures-too/secret.png", "/away/secret.png", "/away/secret.cmps", "/link.png", "/link.cmps", "/circle.png",
     "//etc/passwd", "/%00", "/photo%00.png", "/photo.png/", "/more", "/more/", "/" + "x" * 5000, "/%ff.png",
     "/photo.tiff", "/..", "/.", "/.hidden", "/.hidden.png", "/.hidden.cmps", "/.git/x.png", "/.git/x.cmps", "/.git/x",
     "/more/.git/x.png", "/./photo.png", "/photo.cmps/x.png", "/photo.png%0a"],
)  # fmt: skip
def test_nothing_else_is_served(site, path):
    answer = site.get(path)
    assert answer.status == 404 and answer.line


def test_links_and_folders_inside_are_served(site):
    assert site.get("/inside.png?w=20").image.size == (20, 15)
    assert site.get("/more/a%20b%2Cc.png?w=20").image.size == (20, 15)


def test_all_kinds_of_names(start, tmp_path):
    """The page shows all of them, each at an address where it is."""
    names = [
        b"photo",
        b"photo.png",
        b"photo.JPEG",
        b"x.cmps",
        b"new\nline",
        b"bad\xff",
        b"a?b#c%20d",
        "\u00e9".encode(),
    ]
    for width, name in enumerate(names, 10):
        (tmp_path / os.fsdecode(name + b".cmps")).write_bytes(made_up((width, 5)))
    (tmp_path / "UP.CMPS").write_bytes(made_up((8, 5)))
    (tmp_path / "both.cmps").write_bytes(made_up((9, 5)))
    (tmp_path / "both.CMPS").write_bytes(made_up((1, 5)))
    site = start(tmp_path, Drawn())
    answer = site.get("/")
    found = re.findall(r'<img src="(.*?)".* width="(\d+)" *\n? *height="5"', answer.body.decode())
    assert sorted(int(width) for _, width in found) == [8, 9, *range(10, 10 + len(names))]
    for address, width in found:
        answer = site.get(html.unescape(address))
        assert answer.status == 200 and answer.image.size == (int(width), 5), address
    assert site.get("/UP.png").image.size == (8, 5)
    assert site.get("/UP.cmps").body == site.get("/UP.CMPS").body == made_up((8, 5))
    assert site.get("/both.CMPS").body == made_up((1, 5)), "as it is asked for"
    assert site.get("/bad%ff.png").image.size == (15, 5) and site.get("/bad%fe.png").line
    assert site.get("/new%0aline.png").image.size == (14, 5) and site.get("/new%0alines.png").line


def test_too_large_a_size_says_so(site):
    for text in ("10000000", "9" * 6000):
        answer = site.get(f"/photo.png?w={text}")
        assert answer.status == 400 and answer.line == "w is too large; it may be 9999999 pixels at most\n"
    assert site.get("/photo.png?w=00000000020").image.size == (20, 15)


@pytest.mark.parametrize("query", ["w=0", "w=-5", "w=abc", "w=1.5", "h=", "w=00000000", "h=%C2%B2", "w=1e3", "w=+5"])
def test_bad_sizes(site, query):
    answer = site.get(f"/photo.png?{query}")
    assert answer.status == 400 and answer.line.startswith(f"{query[0]} must be a whole number")


def test_bad_methods(site):
    answer = site.get("/photo.png", method="POST")
    assert answer.status == 405 and answer.line


def test_broken_files(site, small_file, caplog):
    assert site.get("/cut.png").image.size == (40, 30), "what is there is served"
    for path, text in [("/damaged.png", "layer 2 is damaged"), ("/stub.png", "layer 0"), ("/text.png", "not a .cmps")]:
        answer = site.get(path)
        assert answer.status == 500 and text in answer.line and answer.headers["cache-control"] == "no-store"
        assert caplog.messages[-1].startswith(f"{path}: ") and text in caplog.messages[-1]
    assert site.get("/damaged.png?w=40").status == 200
    assert "vary" not in answer.headers


def test_weights_that_are_not_here(start, tmp_path, codec, caplog):
    """The client is not told where they were looked for."""
    (tmp_path / "x.cmps").write_bytes(container.write("0123456789ab", [(9, 9)], [1], [50], [b"x" * 50]))
    answer = start(tmp_path, codec).get("/x.png")
    assert (answer.status, answer.line) == (500, "/x.png: made with weights that are not here\n")
    assert "0123456789ab" in caplog.text and str(codec.folder) in caplog.text


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, MemoryError, struct.error, EOFError])
def test_whatever_a_library_raises_is_one_line(start, folder, monkeypatch, caplog, error):
    class Broken:
        def decode(self, *_, **__):
            raise error("secret\nof two lines")

    def answer(codec):
        answer = start(folder, codec).get("/photo.png")
        assert answer.status == 500 and answer.line.startswith("/photo.png: ") and "secret" not in answer.line
        assert answer.headers["cache-control"] == "no-store"

    answer(Broken())
    assert [len(record.getMessage().splitlines()) for record in caplog.records] == [1]
    monkeypatch.setattr(Image.Image, "save", Broken().decode)
    answer(Drawn())
    assert not any(record.exc_info for record in caplog.records)


def test_a_bug_elsewhere_is_one_line_too(start, folder, codec, monkeypatch):
    monkeypatch.setattr(page, "demo", lambda _: 1 / 0)
    answer = start(folder, codec).get("/")
    assert answer.status == 500 and answer.line == "the server failed\n"
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"


def test_the_limit_on_pixels(start, folder, codec):
    site = start(folder, codec, max_pixels=40 * 30)
    assert site.get("/photo.png?w=40").status == 200
    for query in ("", "?w=41"):
        answer = site.get(f"/photo.png{query}")
        assert answer.status == 400 and "80 x 60" in answer.line
    text = site.get("/").body.decode()
    assert "?w=40 40w" in text and "80w" not in text


def test_decoded_layers_are_kept(start, folder, codec):
    counted = Counted(codec)
    site = start(folder, counted, cache=80 * 60 * 3 + 20 * 15 * 3)
    for path in ("/photo.png", "/photo.webp?w=77", "/photo?h=50", "/photo.png?w=20", "/photo.png"):
        assert site.get(path).status == 200
    assert counted.decoded == [2, 0]
    site.get("/photo.png?w=40")
    assert site.get("/photo.png?w=20").status == 200, "layer 1 pushed layer 0 out, which was used longest ago"
    assert counted.decoded == [2, 0, 1, 0]


def test_nothing_is_kept_without_a_cache(start, folder, codec):
    counted = Counted(codec)
    site = start(folder, counted, cache=0)
    assert [site.get("/photo.png?w=20").status for _ in range(2)] == [200, 200]
    assert counted.decoded == [0, 0]


def wait_for(condition, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_busy(start, folder, codec):
    """One decodes, one waits, the next is turned away; and those who ask for the same share one decode."""
    counted = Counted(codec)
    site = start(folder, counted, decodes=1, queue=1)
    counted.gate.clear()
    answers = {}

    def ask(key, path):
        thread = threading.Thread(target=lambda: answers.update({key: site.get(path)}))
        thread.start()
        return thread

    threads = [ask("first", "/photo.png?w=80")]
    wait_for(lambda: counted.decoded == [2])
    threads.append(ask("second", "/photo.png?w=20"))
    jobs = site.server.config.app.state.layers._jobs
    wait_for(jobs.full)
    threads += [ask("shared", "/photo.webp?w=70"), ask("shared too", "/photo.png?w=10")]
    answer = site.get("/photo.png?w=40")
    assert answer.status == 503 and "try again" in answer.line and int(answer.headers["retry-after"]) > 0
    assert site.get("/photo.cmps").status == 200, "files need no decoding"
    counted.gate.set()
    for thread in threads:
        thread.join()
    assert {key: answer.status for key, answer in answers.items()} == dict.fromkeys(
        ["first", "second", "shared", "shared too"], 200
    )
    assert counted.decoded == [2, 0]
    assert site.get("/photo.png?w=40").status == 200


def test_one_who_leaves_does_not_stop_the_others(folder, codec):
    counted = Counted(codec)
    counted.gate.clear()
    app = server.App(folder, counted, server.Settings())
    scope = {"type": "http", "method": "GET", "headers": [], "query_string": b"w=20", "path": "/photo.png",
             "raw_path": b"/photo.png", "path_params": {"name": "photo.png"}}  # fmt: skip

    async def both():
        first, second = (asyncio.create_task(app.picture(Request(scope))) for _ in range(2))
        await asyncio.to_thread(wait_for, lambda: counted.decoded)
        first.cancel()
        await asyncio.sleep(0.05)
        counted.gate.set()
        return await second

    assert Image.open(io.BytesIO(asyncio.run(both()).body)).size == (20, 15)
    assert counted.decoded == [0]


class Waiting:
    """One request holds up the only decode, and another one waits, until ``go``."""

    def __init__(self, start, folder, codec, path: str) -> None:
        (folder / "slow.cmps").write_bytes(made_up((9, 9)))
        self.codec = codec
        codec.gate.clear()
        self.site = start(folder, codec)
        self.answers: dict[str, Answer] = {}
        self.threads = [threading.Thread(target=self.ask, args=[path]) for path in ("/slow.png", path)]
        self.threads[0].start()
        wait_for(lambda: codec.decoded)
        self.threads[1].start()
        wait_for(lambda: self.site.server.config.app.state.layers._jobs.qsize())

    def ask(self, path: str) -> None:
        self.answers[path] = self.site.get(path)

    def go(self) -> None:
        self.codec.gate.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("size", [(5, 9), (3, 2), (9, 5)])
def test_a_file_replaced_while_a_request_waits(start, tmp_path, size):
    """Every answer is made of one file: the one that its ETag stands for."""
    (tmp_path / "x.cmps").write_bytes(made_up((9, 5)))
    (tmp_path / "new").write_bytes(made_up((1, 1), size))
    waiting = Waiting(start, tmp_path, Counted(Drawn()), "/x.png")
    (tmp_path / "new").rename(tmp_path / "x.cmps")
    waiting.go()
    answer = waiting.answers["/x.png"]
    assert answer.status == 200 and answer.image.size == (9, 5)
    after = waiting.site.get("/x.png")
    assert after.image.size == size and after.headers["etag"] != answer.headers["etag"]


def test_a_file_deleted_while_a_request_waits(start, tmp_path):
    (tmp_path / "x.cmps").write_bytes(made_up((9, 5)))
    waiting = Waiting(start, tmp_path, Counted(Drawn()), "/x.png")
    (tmp_path / "x.cmps").unlink()
    waiting.go()
    answer = waiting.answers["/x.png"]
    assert answer.status == 404 and "x" in answer.line


def test_a_file_deleted_between_finding_and_opening(start, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "find", lambda folder, name, suffix="cmps": folder / "gone.cmps")
    site = start(tmp_path, Drawn())
    for path in ("/gone.png", "/gone", "/gone.cmps"):
        answer = site.get(path)
        assert answer.status == 404 and answer.line


def test_a_file_replaced_before_it_is_sent(tmp_path):
    """What is open is sent, with the length and the tag of the same file."""
    (tmp_path / "x.cmps").write_bytes(old := made_up((9, 5)))
    app = server.App(tmp_path, Drawn(), server.Settings())
    scope = {"type": "http", "method": "GET", "headers": [], "raw_path": b"/x.cmps", "asgi": {"spec_version": "2.4"}}
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    async def ask():
        response = await app.picture(Request(scope))
        (tmp_path / "new").write_bytes(made_up((1, 1), (2, 2)))
        (tmp_path / "new").rename(tmp_path / "x.cmps")
        await response(scope, None, send)
        assert response.file.file.opened.closed

    asyncio.run(ask())
    assert b"".join(message["body"] for message in sent[1:]) == old
    assert (b"content-length", str(len(old)).encode()) in sent[0]["headers"]


def test_a_file_cut_off_while_it_is_sent(start, tmp_path, monkeypatch, caplog):
    """The client gets less than was promised, and knows; there is no traceback."""
    path = tmp_path / "x.cmps"
    path.write_bytes(container.write("0123456789ab", [(9, 5)], [1], [50], [b"x" * 100_000]))
    to_response = server.OpenFileResponse.__init__

    def cutting(self, *args):
        to_response(self, *args)
        os.truncate(path, 70_000)

    monkeypatch.setattr(server.OpenFileResponse, "__init__", cutting)
    with pytest.raises(http.client.IncompleteRead):
        start(tmp_path, Drawn()).get("/x.cmps")
    assert not any(record.exc_info for record in caplog.records)


def test_a_file_written_over_while_it_is_read(tmp_path):
    (tmp_path / "x.cmps").write_bytes(made_up((9, 5)))
    for other in (made_up((5, 9)), made_up((9, 5))[:-9]):
        with server.load(tmp_path / "x.cmps") as file:
            (tmp_path / "x.cmps").write_bytes(other)
            with pytest.raises(server.HTTPException) as error:
                file.read(0)
        assert error.value.status_code == 503
        (tmp_path / "x.cmps").write_bytes(made_up((9, 5)))


def test_the_demo_page(site, tmp_path, small_file):
    answer = site.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    text = answer.body.decode()
    assert 'srcset="/photo?w=20 20w, /photo?w=40 40w, /photo?w=80 80w"' in text
    for entry in container.read_header(small_file).layers:
        assert f"<td>{entry.width} x {entry.height}</td><td>{entry.end}</td>" in text
    assert not any(name in text for name in ("secret", "notes", "link.cmps", "hidden", "git"))
    with browser(tmp_path / "profile") as driver:
        driver.get(f"http://127.0.0.1:{site.port}/")
        driver.execute_script("for (const i of document.images) i.loading = 'eager'")
        names = driver.execute_script("return [...document.images].map(i => i.alt)")
        assert names == ["cut", "damaged", "inside", "more/a b,c", "photo"]
        widths = dict(zip(names, loaded(driver), strict=True))
        assert widths["damaged"] == 0 and all(widths[name] > 0 for name in names if name != "damaged")
        assert [line for line in complaints(driver) if "damaged" not in line] == []


def test_the_page_that_the_browser_decodes(site, tmp_path):
    answer = site.get("/app/")
    assert (
        answer.headers["cache-control"] == "no-cache"
        and "worker-src 'self'" in answer.headers["content-security-policy"]
    )
    assert site.get("/app/sw.js").headers["service-worker-allowed"] == "/"
    identity = weights.choose(None, "lean").identity
    assert "immutable" in site.get(f"/app/weights/{identity}.safetensors").headers["cache-control"]
    # a name can come to mean another set, and answers are kept for ever
    for name in ("weights/000000000000.safetensors", "weights/lean.safetensors", "kernels.ts"):
        assert site.get(f"/app/{name}").status == 404
    with browser(tmp_path / "profile") as driver:
        driver.get(f"http://127.0.0.1:{site.port}/app/")
        wait_for(lambda: driver.execute_script("return document.querySelector('[alt=photo]').naturalWidth") == 80, 200)
        wait_for(
            lambda: driver.execute_script("return document.querySelector('[alt=\"more/a b,c\"]').naturalWidth") > 0, 200
        )
        assert [line for line in complaints(driver) if not re.search(r"/(damaged|cut)\.cmps", line)] == []


def test_a_browser_takes_the_layer_that_it_needs(site, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "START_WIDTH", 18)
    with browser(tmp_path / "profile") as driver:
        driver.get(f"http://127.0.0.1:{site.port}/")
        driver.execute_script("for (const i of document.images) i.loading = 'eager'")
        for wanted, taken in [(None, "20"), (33, "40"), (70, "80")]:
            if wanted:
                driver.execute_script(
                    "const slider = document.getElementById('width'); slider.value = arguments[0];"
                    "slider.dispatchEvent(new Event('input'))",
                    wanted,
                )
            wait_for(lambda taken=taken: shown(driver) == taken)
            assert f"/photo?w={taken}" in driver.execute_script("return document.images[4].currentSrc")
            assert driver.execute_script("return document.images[4].clientWidth") == (wanted or 18)
            assert loaded(driver)[4] > 0


def shown(driver) -> str:
    return driver.execute_script(
        "return document.querySelector('img[alt=photo]').closest('section').querySelector('tr.shown')?.dataset.w"
    )


def test_an_empty_folder(start, tmp_path, codec):
    assert "No pictures here" in start(tmp_path, codec).get("/").body.decode()


def command(*args: object, **options) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "compass_codec", "serve", *map(str, args), "--port", "0", "--device", "cpu"]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command(folder):
    with command(folder, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/photo.png?w=20")
        reply = connection.getresponse()
        assert reply.status == 200 and Image.open(io.BytesIO(reply.read())).size == (20, 15)
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == ""
    assert [line for line in err.splitlines() if "GET /photo.png?w=20" not in line] == ["stopped"]


def test_quiet_is_quiet_to_the_end(folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", stop)
    for options, said in (([], "stopped\n"), (["--quiet"], "")):
        result = compass("serve", folder, "--port", "0", *options)
        assert (result.code, result.err, bool(result.out)) == (0, said, bool(said))


def test_ctrl_c_does_not_wait_for_a_decode(tmp_path, folder):
    """A decode that takes long is given up with the process."""
    code = (
        "import sys, time\nfrom compass_codec import cli, codec\n"
        "codec.Codec.decode = lambda *_, **__: time.sleep(60)\n"
        "cli.main(['serve', sys.argv[1], '--port', '0', '--device', 'cpu'])"
    )
    arguments = [sys.executable, "-u", "-c", code, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /photo.png HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err, err


def lines(result) -> list[str]:
    return result.err.splitlines()


def test_what_does_not_start(folder, tmp_path, monkeypatch):
    result = compass("serve", tmp_path / "none")
    assert result.code == 2 and len(lines(result)) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = compass("serve", folder, "--port", taken.getsockname()[1])
        assert result.code == 1 and "in use" in result.err and len(lines(result)) == 1
    result = compass("serve", folder, "--host", "no.such.host.invalid")
    assert result.code == 1 and len(lines(result)) == 1
    result = compass("serve", folder, "--weights", tmp_path)
    assert result.code == 1 and len(lines(result)) == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = compass("serve", folder)
    assert result.code == 1 and "pip install 'compass_codec[serve]'" in result.err and len(lines(result)) == 1
