"""Sections of the file: alpha, ICC, EXIF and XMP, around layers that stay as they are."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import test_pictures
from attach import attach
from conftest import GOLDEN, compass, crop
from PIL.PngImagePlugin import PngInfo
from test_container import MODEL, PAYLOADS, SIZES, example
from test_pictures import exif_bytes, mask

import compass_codec
from compass_codec import container, pictures
from compass_codec.container import Sections
from compass_codec.errors import CompassError, DamagedError, FormatError, LayerError, LimitError, TruncatedError

FULL = Sections(b"profile", b"II*\0 exif", b"<x:xmpmeta/>", {0: b"a0", 1: b"alpha 1", 2: b"alpha of 2"})
ICC, EXIF, XMP, ALPHA = 1, 2, 3, 4
PROFILE, XMP_TEXT = test_pictures.ICC, test_pictures.XMP


def with_table(table: bytes, body: bytes) -> bytes:
    """The example's header with this table of sections (its count included), and ``body`` behind it."""
    plain = example()
    head = plain[: container.read_header(plain).length - 4]
    head = head[:5] + b"\x01" + head[6:] + table
    return head + struct.pack("<I", zlib.crc32(head)) + body


def entry(kind: int, layer: int, data: bytes, length: bytes | None = None) -> bytes:
    return bytes([kind, layer]) + (length or bytes([len(data)])) + struct.pack("<I", zlib.crc32(data))


@pytest.mark.parametrize(
    "sections",
    [
        Sections(),
        Sections(icc=b"profile"),
        Sections(exif=b"II*\0"),
        Sections(xmp=b"<x/>"),
        Sections(alpha={1: b"only one layer"}),
        Sections(alpha={2: b"c", 0: b"a"}),
        FULL,
    ],
)
def test_what_is_attached_is_read_back(sections):
    data = attach(example(), sections)
    header = container.read_header(data)
    assert container.sections(header, data) == sections
    assert header.end == len(data)
    assert [container.payload(header, data, k) for k in range(3)] == PAYLOADS
    assert set(container.states(header, data)) == {"ok"}
    # and taken off again, the file is what it was
    assert attach(data, Sections()) == example()
    assert attach(attach(data, FULL), sections) == data


def test_no_sections_no_byte():
    assert container.write(MODEL, SIZES, [1, 2.0, 3.2], [60, 60, 55.25], PAYLOADS, Sections()) == example()
    assert attach(example(), Sections(icc=b"", alpha={0: b""})) == example()


def test_places():
    """ICC, then each layer and its alpha, then EXIF and XMP, with nothing between."""
    data = attach(example(), FULL)
    header = container.read_header(data)
    order = [FULL.icc, PAYLOADS[0], b"a0", PAYLOADS[1], b"alpha 1", PAYLOADS[2], b"alpha of 2", FULL.exif, FULL.xmp]
    assert data[header.length :] == b"".join(order)
    assert [(s.kind, s.layer) for s in header.sections] == [
        (ICC, 0), (ALPHA, 0), (ALPHA, 1), (ALPHA, 2), (EXIF, 0), (XMP, 0)
    ]  # fmt: skip
    assert header.layers[1].end == header.sections[2].end


def test_every_prefix_gives_what_is_whole_in_it():
    data = attach(example(), FULL)
    header = container.read_header(data)
    for size in range(header.length, len(data) + 1):
        part = data[:size]
        got = container.sections(container.read_header(part), part)
        complete = [k for k, e in enumerate(header.layers) if e.end <= size]
        if complete:
            assert container.pick(header, size, None) == complete[-1]
            assert got.icc == FULL.icc and all(got.alpha[k] == FULL.alpha[k] for k in complete)
        assert got.exif == (FULL.exif if size >= header.sections[-2].end else None)
        assert got.xmp == (FULL.xmp if size == len(data) else None)
        states = container.states(header, part)
        assert states[:3] == ["ok" if e.end <= size else "cut off" for e in header.layers]
        assert states[3:] == ["ok" if s.end <= size else "cut off" for s in header.sections]


def test_tail_completes_a_prefix():
    data = attach(example(), FULL)
    header = container.read_header(data)
    for k, layer in enumerate(header.layers):
        got = container.sections(header, data[: layer.end], range(k + 1), data[header.layers[-1].end :])
        assert got == dataclasses.replace(FULL, alpha={i: FULL.alpha[i] for i in range(k + 1)})


def test_every_flipped_bit_is_found():
    data = attach(example(), FULL)
    for i in range(8 * len(data)):
        broken = bytearray(data)
        broken[i // 8] ^= 1 << i % 8
        with pytest.raises(CompassError):
            header = container.read_header(bytes(broken))
            for k in range(3):
                container.payload(header, bytes(broken), k)
            container.sections(header, bytes(broken))


def test_damage_is_named_and_can_be_left_out():
    data = attach(example(), FULL)
    header = container.read_header(data)
    for i, section in enumerate(header.sections):
        broken = bytearray(data)
        broken[section.start] ^= 1
        with pytest.raises(DamagedError, match=f"the {section.name} is damaged"):
            container.sections(header, bytes(broken))
        rest = container.sections(header, bytes(broken), best_effort=True)
        assert len(container._laid_out(rest, 3)) == len(header.sections) - 1
        states = container.states(header, bytes(broken))
        assert states[3 + i] == "damaged" and states[3:].count("damaged") == 1
        # a layer is as good as what belongs to it
        assert [k for k in range(3) if states[k] == "damaged"] == ([section.layer] if section.kind == ALPHA else [])
    # what lies above the layer that is wanted does no harm
    broken = bytearray(data)
    broken[header.sections[3].start] ^= 1
    assert container.sections(header, bytes(broken), range(2)).alpha == {0: b"a0", 1: b"alpha 1"}


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (b"\x00", FormatError, "empty"),
        (b"\x01" + entry(0, 0, b"x"), FormatError, "kind 0"),
        (b"\x01" + entry(5, 0, b"x"), FormatError, "kind 5"),
        (b"\x01" + entry(255, 0, b"x"), FormatError, "kind 255"),
        (b"\x01" + entry(ICC, 1, b"x"), FormatError, "of layer 1"),
        (b"\x01" + entry(XMP, 255, b"x"), FormatError, "of layer 255"),
        (b"\x01" + entry(ALPHA, 3, b"x"), FormatError, "of layer 3"),
        (b"\x02" + 2 * entry(ICC, 0, b"x"), FormatError, "repeated"),
        (b"\x02" + 2 * entry(ALPHA, 1, b"x"), FormatError, "repeated"),
        (b"\x02" + entry(ALPHA, 1, b"x") + entry(ALPHA, 0, b"x"), FormatError, "out of order"),
        (b"\x02" + entry(EXIF, 0, b"x") + entry(ICC, 0, b"x"), FormatError, "out of order"),
        (b"\x02" + entry(XMP, 0, b"x") + entry(EXIF, 0, b"x"), FormatError, "out of order"),
        (b"\x02" + entry(EXIF, 0, b"x") + entry(ALPHA, 0, b"x"), FormatError, "out of order"),
        (b"\x01" + entry(ICC, 0, b"x", b"\x00"), FormatError, "out of range"),
        (b"\x01" + entry(ICC, 0, b"x", b"\x81\x00"), FormatError, "out of range"),  # 1, in a longer form
        (b"\x01" + entry(ICC, 0, b"x", b"\x80\x80\x80\x08"), FormatError, "out of range"),  # 16 MiB
        (b"\x01" + entry(EXIF, 0, b"x", b"\xff\xff\xff\x7f"), FormatError, "out of range"),
        (b"\x01" + entry(ALPHA, 0, b"x", b"\x80\x80\x80\x80\x01"), FormatError, "out of range"),  # 256 MiB
        (b"\xff" + entry(ICC, 0, b"x"), CompassError, "."),  # more than there are
    ],
)
def test_forged_tables(table, error, words):
    with pytest.raises(error, match=words):
        container.read_header(with_table(table, b"x" * 1000))


def test_sections_longer_than_the_file_cost_nothing():
    """Only what is there is ever sliced: 16 alphas of 255 MB that are claimed and not there."""
    sixteen = container.write(MODEL, [(4, 4)] * 16, range(1, 17), [50] * 16, [b"x"] * 16)
    head = bytearray(sixteen[: container.read_header(sixteen).length - 4])
    head[5] = 1
    head.append(16)
    for k in range(16):
        head += entry(ALPHA, k, b"x", b"\xff\xff\xff\x7f")
    data = bytes(head) + struct.pack("<I", zlib.crc32(head)) + b"x" * 17
    header = container.read_header(data)
    assert header.end > 2**32 and container.states(header, data)[0] == "cut off"
    assert container.sections(header, data) == Sections()
    with pytest.raises(TruncatedError):
        container.extract(data, 0)


def test_flag_and_table_go_together():
    data = attach(example(), FULL)
    head = bytearray(data[: container.read_header(data).length - 4])
    head[5] = 0
    with pytest.raises(DamagedError):
        container.read_header(bytes(head) + struct.pack("<I", zlib.crc32(head)) + data[len(head) + 4 :])


def test_too_large_to_write():
    with pytest.raises(LimitError, match="ICC profile"):
        attach(example(), Sections(icc=bytes(2**24)))
    with pytest.raises(LayerError, match="alpha for layer 3"):
        attach(example(), Sections(alpha={3: b"x"}))


@pytest.mark.parametrize("sections", [Sections(), FULL])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_extract(sections, layer):
    data = attach(example(), sections)
    header = container.read_header(data)
    small = container.extract(data, layer)
    got = container.read_header(small)
    assert [(e.width, e.height, e.scale, e.quality, e.length) for e in got.layers] == [
        (e.width, e.height, e.scale, e.quality, e.length) for e in header.layers[: layer + 1]
    ]
    assert got.model == header.model and got.end == len(small)
    assert [container.payload(got, small, k) for k in range(layer + 1)] == PAYLOADS[: layer + 1]
    alpha = {k: v for k, v in sections.alpha.items() if k <= layer}
    assert container.sections(got, small) == dataclasses.replace(sections, alpha=alpha)
    # the same from the parts that are needed, and again from the result
    end = header.layers[-1].end
    assert container.extract(data[: header.layers[layer].end], layer, data[end:]) == small
    assert container.extract(small, layer) == small
    assert (small == data) == (layer == 2)
    bare = container.extract(data, layer, strip=True)
    assert container.sections(container.read_header(bare), bare) == Sections(alpha=alpha)


def test_extract_from_broken_files():
    data = attach(example(), FULL)
    header = container.read_header(data)
    with pytest.raises(LayerError):
        container.extract(data, 3)
    with pytest.raises(TruncatedError, match="layer 1 ends at"):
        container.extract(data[: header.layers[1].end - 1], 1)
    for at, words in ((header.layers[1].start, "layer 1 is damaged"), (header.sections[2].start, "alpha of layer 1")):
        broken = bytearray(data)
        broken[at] ^= 1
        assert container.extract(bytes(broken), 0) == container.extract(data, 0)
        with pytest.raises(DamagedError, match=words):
            container.extract(bytes(broken), 1)


def test_the_example_with_sections_in_the_format_document():
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    block = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[-2]
    data = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    header = container.read_header(data)
    assert set(container.states(header, data)) == {"ok"} and header.end == len(data)
    found = container.sections(header, data)
    assert found.xmp == b"<x/>" and list(found.alpha) == [0]
    assert attach(data, Sections()) == (GOLDEN / "small.cmps").read_bytes()


def test_golden_files_stay_as_they_are():
    for path in GOLDEN.glob("*.cmps"):
        data = path.read_bytes()
        assert attach(data, Sections()) == data
        assert container.extract(data, len(container.read_header(data).layers) - 1) == data


@pytest.fixture
def full(tmp_path) -> Path:
    path = tmp_path / "full.cmps"
    path.write_bytes(attach((GOLDEN / "portrait.cmps").read_bytes(), FULL))
    return path


def test_info_shows_sections(full):
    data = full.read_bytes()
    facts = json.loads(compass("info", full, "--json").out)
    assert [(s["kind"], s["layer"]) for s in facts["sections"]] == [
        ("icc", None), ("alpha", 0), ("alpha", 1), ("alpha", 2), ("exif", None), ("xmp", None)
    ]  # fmt: skip
    for s, content in zip(facts["sections"], [FULL.icc, *FULL.alpha.values(), FULL.exif, FULL.xmp], strict=True):
        assert data[s["start"] : s["end"]] == content and s["length"] == len(content) and s["state"] == "ok"
    for k, layer in enumerate(facts["layers"]):
        assert layer["range"] == f"bytes=0-{layer['end'] - 1}"
        assert layer["end"] == facts["sections"][k + 1]["end"]
    text = compass("info", full).out
    for words in ("ICC profile", "alpha of layer 2", "EXIF", "XMP", facts["layers"][1]["range"]):
        assert words in text
    full.write_bytes(data[: facts["sections"][-1]["start"]])
    assert compass("info", full).out.count("cut off") == 1
    full.write_bytes(data[:-1] + b"?")
    assert compass("info", full).out.count("damaged") == 1
    assert json.loads(compass("info", GOLDEN / "small.cmps", "--json").out)["sections"] == []


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_extract_command(full, layer, tmp_path):
    result = compass("extract", full, "--layer", layer)
    small = tmp_path / f"full.layer{layer}.cmps"
    assert result.code == 0 and str(small) in result.out
    assert small.read_bytes() == container.extract(full.read_bytes(), layer)
    assert json.loads(compass("info", small, "--json").out)["layers"][-1]["layer"] == layer
    before = small.read_bytes()
    result = compass("extract", full, "--layer", layer, "--strip")
    assert result.code == 1 and "exists" in result.err and small.read_bytes() == before
    assert compass("extract", full, "--layer", layer, "--strip", "--force", "--quiet").out == ""
    assert {s.kind for s in container.read_header(small.read_bytes()).sections} == {ALPHA}


def test_extract_between_pipes_loads_neither_torch_nor_numpy(full):
    code = (
        "import sys; from compass_codec.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'compressai', 'numpy', 'constriction'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "extract", "-", "--layer", "1"]
    done = subprocess.run(command, input=full.read_bytes(), capture_output=True)
    assert done.stdout == container.extract(full.read_bytes(), 1) and done.stderr.split() == [b"[]"]


def test_extract_from_the_web(full, tmp_path, monkeypatch):
    from test_remote import serving

    monkeypatch.chdir(tmp_path)
    data = full.read_bytes()
    with serving(data) as server:
        for layer in (0, 2):
            assert compass("extract", server.url, "--layer", layer).code == 0
            assert (tmp_path / f"photo.layer{layer}.cmps").read_bytes() == container.extract(data, layer)
        assert compass("extract", server.url, "--layer", 1, "--strip", "-o", "small.cmps").code == 0
        assert (tmp_path / "small.cmps").read_bytes() == container.extract(data, 1, strip=True)
        result = compass("extract", server.url, "--layer", 3)
        assert result.code == 1 and result.err.startswith(f"compass: {server.url}: no layer 3")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_extract_reads_only_what_it_needs(tmp_path):
    """The top layer has 30 MB, which are not read; the EXIF behind it is."""
    big = 30_000_000
    sizes, rest = [(20, 15), (40, 30)], {"scales": [1, 2], "qualities": [50, 50]}
    like = container.write(MODEL, sizes, payloads=[b"base", bytes(big)], sections=Sections(exif=b"II*\0"), **rest)
    header = container.read_header(like)
    path = tmp_path / "big.cmps"
    with path.open("wb") as file:
        file.write(like[: header.layers[0].end])
        file.seek(header.layers[1].end)
        file.write(b"II*\0")
    del like

    def read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    assert compass("extract", path, "--layer", 0).code == 0
    assert read() - before < 2_000_000  # modules that are imported count too
    small = (tmp_path / "big.layer0.cmps").read_bytes()
    assert container.sections(container.read_header(small), small) == Sections(exif=b"II*\0")


def test_bad_extracts_are_one_line_and_leave_nothing(full, tmp_path):
    data = full.read_bytes()
    header = container.read_header(data)
    (tmp_path / "cut.cmps").write_bytes(data[: header.layers[0].end + 3])
    (tmp_path / "text.cmps").write_bytes(b"this is no layered file")
    damaged = bytearray(data)
    damaged[header.sections[1].start] ^= 1
    (tmp_path / "damaged.cmps").write_bytes(damaged)
    before = sorted(tmp_path.iterdir())
    for args, code in (
        (["full.cmps", "--layer", 3], 1),
        (["full.cmps", "--layer", -1], 2),
        (["full.cmps"], 2),
        (["full.cmps", "--layer", 1, "-o", "full.cmps", "--force"], 1),
        (["full.cmps", "--layer", 1, "-o", "no/such.cmps"], 1),
        (["missing.cmps", "--layer", 0], 1),
        (["cut.cmps", "--layer", 1], 1),
        (["text.cmps", "--layer", 0], 1),
        (["damaged.cmps", "--layer", 0], 1),
        ([".", "--layer", 0], 1),
    ):
        args = [tmp_path / a if isinstance(a, str) and not a.startswith("-") else a for a in args]
        result = compass("extract", *args)
        assert (result.code, result.out, len(result.err.splitlines())) == (code, "", 1), (args, result)
        assert sorted(tmp_path.iterdir()) == before and full.read_bytes() == data
    assert compass("extract", tmp_path / "cut.cmps", "--layer", 0).code == 0
    assert compass("extract", "/", "--layer", 0).code == 1


def test_the_fuzzers_checks_hold_for_files_with_sections(monkeypatch):
    class Stub:
        @staticmethod
        def instrument_imports():
            import contextlib

            return contextlib.nullcontext()

    monkeypatch.setitem(sys.modules, "atheris", Stub)
    import fuzz_container

    data = attach(example(), FULL)
    for size in range(len(data) + 1):
        fuzz_container.one_input(data[:size])
    head = data[6 : container.read_header(data).length - 4]
    for i in range(len(head)):
        for value in (0, 1, 4, 5, 127, 128, 255, head[i] ^ 1):
            fuzz_container.one_input(head[:i] + bytes([value]) + head[i + 1 :])


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """Half transparent, turned by its EXIF, with profile and XMP."""
    path = tmp_path_factory.mktemp("picture") / "in.png"
    image, text = crop(48, 32), PngInfo()
    image.putalpha(mask(image.size))
    text.add_itxt("XML:com.adobe.xmp", XMP_TEXT.decode())
    image.save(path, icc_profile=PROFILE, exif=b"Exif\0\0" + exif_bytes(6), pnginfo=text)
    return path


@pytest.fixture(scope="module")
def encoded(picture) -> Path:
    result = compass("encode", picture, "--scales", "1,2,4", "--verify", "--device", "cpu")
    assert result.code == 0 and "verified" in result.out, result.err
    return picture.with_suffix(".cmps")


@pytest.mark.parametrize("name", ["png", "webp", "avif", "tif", "jpg"])
def test_pictures_come_back_with_all_they_had(picture, encoded, tmp_path, name):
    original = pictures.read(picture)
    assert compass("decode", encoded, "--all", "-o", tmp_path / f"out.{name}").code == 0
    for k, size in enumerate([(8, 12), (16, 24), (32, 48)]):
        source = pictures.read(tmp_path / f"out.layer{k}.{name}")
        assert source.image.size == size and source.icc == PROFILE and source.xmp == XMP_TEXT
        # AVIF and TIFF have no place for EXIF just as it is
        assert source.exif == exif_bytes(1) if name in ("png", "webp", "jpg") else b"Cam\0" in source.exif
        assert (source.alpha is None) == (name == "jpg")
        if name in ("png", "tif", "webp"):
            _, (alpha,) = pictures.pyramid_alpha(original, [size])
            assert (np.asarray(source.alpha) == alpha).all()


def test_strip_drops_metadata_and_keeps_alpha(picture, encoded, tmp_path):
    assert compass("decode", encoded, "--layer", 1, "--strip", "-o", tmp_path / "bare.png").code == 0
    bare = pictures.read(tmp_path / "bare.png")
    assert (bare.icc, bare.exif, bare.xmp) == (None, None, None) and bare.alpha is not None
    assert compass("encode", picture, "--scales", "1,2", "--strip", "-o", tmp_path / "bare.cmps").code == 0
    assert {s.kind for s in container.read_header((tmp_path / "bare.cmps").read_bytes()).sections} == {ALPHA}


def test_alpha_and_metadata_through_pipes_extracts_and_cut_files(encoded, tmp_path):
    data = encoded.read_bytes()
    command = [sys.executable, "-m", "compass_codec", "decode", "-", "-o", "-", "--layer", "0"]
    piped = subprocess.run(command, input=data, capture_output=True).stdout
    assert compass("decode", encoded, "--layer", 0, "-o", tmp_path / "read.png").code == 0
    assert (tmp_path / "read.png").read_bytes() == piped
    assert compass("extract", encoded, "--layer", 0, "-o", tmp_path / "small.cmps").code == 0
    assert compass("decode", tmp_path / "small.cmps", "-o", tmp_path / "extracted.png").code == 0
    assert (tmp_path / "extracted.png").read_bytes() == piped
    # the bytes that a client fetches for layer 1 hold its alpha and the profile, and no EXIF
    (tmp_path / "cut.cmps").write_bytes(data[: container.read_header(data).layers[1].end])
    result = compass("decode", tmp_path / "cut.cmps", "-o", tmp_path / "cut.png")
    assert result.code == 0 and "the EXIF is cut off" in result.err and "the XMP is cut off" in result.err
    assert (
        compass("decode", tmp_path / "cut.cmps", "--strip", "-f", "-o", tmp_path / "cut2.png").err.count("cut off") == 0
    )
    source = pictures.read(tmp_path / "cut.png")
    assert source.image.size == (16, 24) and source.alpha is not None and source.icc == PROFILE and source.exif is None


@pytest.mark.parametrize(("index", "best"), [(0, 2), (1, 2), (2, 2), (3, 1), (4, 2), (5, 2)])
def test_damaged_sections(encoded, tmp_path, index, best):
    """What is damaged is named; --best-effort gives the highest layer whose pixels and alpha are sound. The alpha of a
    lower layer does no harm."""
    data = bytearray(encoded.read_bytes())
    section = container.read_header(data).sections[index]
    data[section.start] ^= 1
    (tmp_path / "d.cmps").write_bytes(data)
    result = compass("decode", tmp_path / "d.cmps", "-o", tmp_path / "out.png")
    if index in (1, 2):
        assert (result.code, result.err) == (0, "")
        assert compass_codec.decode(bytes(data)).mode == "RGBA"
    else:
        assert result.code == 1 and f"{section.name} is damaged" in result.err and len(result.err.splitlines()) == 1
    result = compass("decode", tmp_path / "d.cmps", "--best-effort", "--force", "-o", tmp_path / "out.png")
    assert result.code == 0 and f"layer {best}," in result.out
    assert (f"the {section.name} is damaged, and left out" in result.err) == (index in (0, 4, 5))
    if index in (4, 5):  # which is not asked for
        for command in (("decode", "--strip", "-f"), ("extract", "--layer", 2, "--strip", "-f")):
            result = compass(*command, tmp_path / "d.cmps", "-o", tmp_path / "bare.cmps.png")
            assert (result.code, result.err) == (0, "")
        data_of = container.extract(bytes(data), 1, strip=True)
        assert container.sections(container.read_header(data_of), data_of).exif is None
    if index in (0, 4, 5):  # which pixels do not need
        assert compass_codec.decode(bytes(data)).size == (32, 48)
    source = pictures.read(tmp_path / "out.png")
    assert source.alpha is not None
    assert [source.icc is None, source.exif is None, source.xmp is None] == [index == 0, index == 4, index == 5]
