"""The file format: what is written is read back, and nothing else is accepted."""

import struct
import zlib

import pytest

from compass_codec import container
from compass_codec.errors import (
    CompassError,
    DamagedError,
    FormatError,
    LayerError,
    LimitError,
    OptionError,
    TruncatedError,
)
from compass_codec.side import Side

MODEL = "0123456789ab"
SIZES = [(20, 15), (40, 30), (64, 48)]
PAYLOADS = [b"base", b"first enhancement", b"second"]


def example() -> bytes:
    return container.write(MODEL, SIZES, [1, 2.0, 3.2], [60, 60, 55.25], PAYLOADS)


def resigned(data: bytes, length: int, at: int, value: bytes) -> bytes:
    """The file with header bytes replaced and the header's checksum made right again."""
    head = data[: length - 4]
    head = head[:at] + value + head[at + len(value) :]
    return head + struct.pack("<I", zlib.crc32(head)) + data[length:]


def test_round_trip():
    data = example()
    header = container.read_header(data)
    assert header.model == MODEL
    assert [(e.width, e.height) for e in header.layers] == SIZES
    assert [e.scale for e in header.layers] == [1, 2.0, 3.2]
    assert [e.quality for e in header.layers] == [60, 60, 55.25]
    assert [container.payload(header, data, k) for k in range(3)] == PAYLOADS
    assert header.layers[-1].end == len(data)


@pytest.mark.parametrize("scales", [[1, 2, 3.2], [1.2345678, 7.6543219, 12345.678], [1e-6, 0.33333333, 1e6]])
def test_header_of_three_layers_is_at_most_80_bytes(scales):
    big = 2**28 - 1
    sizes = [(2**21 - 1, 80), (2**21 - 1, 80), (2**21 - 1, 85)]
    data = container.write(MODEL, sizes, scales, [99.99] * 3, [b"x"] * 3)
    longest = len(container._varint(big)) - 1  # what three lengths of 256 MB would add each
    assert container.read_header(data).length + 3 * longest <= 80
    assert [e.scale for e in container.read_header(data).layers] == scales


def test_scales_keep_eight_digits():
    assert container.check_scales([1, 2 / 3 + 1]) == [1.0, 1.6666667]


@pytest.mark.parametrize(
    "scales", [[], [1] * 17, [2, 1], [0, 1], [-1, 1], [float("nan")], [1, float("inf")], [1e-7, 1], [1, 1e7]]
)
def test_bad_scales(scales):
    with pytest.raises(OptionError):
        container.check_scales(scales)


def test_every_truncation_keeps_the_complete_layers():
    data = example()
    header = container.read_header(data)
    for size in range(len(data) + 1):
        part = data[:size]
        if size < header.length:
            with pytest.raises((TruncatedError, FormatError)):
                container.read_header(part)
            continue
        complete = [k for k, e in enumerate(header.layers) if e.end <= size]
        if not complete:
            with pytest.raises(TruncatedError):
                container.pick(header, size, None)
            continue
        assert container.pick(header, size, None) == complete[-1]
        for k in complete:
            assert container.payload(container.read_header(part), part, k) == PAYLOADS[k]
        with pytest.raises((TruncatedError, LayerError)):
            container.pick(header, size, complete[-1] + 1)


def test_every_flipped_bit_is_found():
    data = example()
    for i in range(8 * len(data)):
        broken = bytearray(data)
        broken[i // 8] ^= 1 << i % 8
        with pytest.raises(CompassError):
            header = container.read_header(bytes(broken))
            for k in range(3):
                container.payload(header, bytes(broken), k)


def test_damage_names_the_layers_that_decode():
    data = bytearray(example())
    data[-1] ^= 1
    header = container.read_header(data)
    with pytest.raises(DamagedError, match=r"layer 2 is damaged .* layers 0 to 1 decode"):
        container.payload(header, bytes(data), 2)


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, b"PNG!", FormatError),
        (4, b"\x02", FormatError),  # version
        (5, b"\x02", FormatError),  # flags
        (5, b"\xff", FormatError),
        (12, b"\x00", FormatError),  # layers
        (12, b"\x11", FormatError),
        (13, b"\x00", FormatError),  # width 0
        (13, b"\x80", FormatError),  # a longer form of a number than it needs, or a width that swallows the height
        (13, b"\x7f", FormatError),  # layer 0 wider than layer 1
        (15, b"\x00", FormatError),  # scale 0
        (16, b"\x7f", FormatError),  # scale 1e127
    ],
)
def test_forged_headers(at, value, error):
    data = example()
    with pytest.raises(error):
        container.read_header(resigned(data, container.read_header(data).length, at, value))


def test_pixel_limit():
    with pytest.raises(LimitError):
        container.read_header(example(), max_pixels=64 * 48 - 1)
    assert container.read_header(example(), max_pixels=64 * 48)


def test_layer_out_of_range():
    header = container.read_header(example())
    for layer in (-1, 3):
        with pytest.raises(LayerError):
            container.pick(header, 10**6, layer)


@pytest.mark.parametrize(("digits", "exponent"), [(10**7, 6), (99999999, 6), (1, -16), (10, 0)])
def test_every_scale_that_is_read_can_be_written(digits, exponent):
    """Files may hold scale factors that this writer would refuse or write shorter."""
    scale = container._from_decimal(digits, exponent)
    data = container.write(MODEL, SIZES[:1], [scale], [60], PAYLOADS[:1])
    assert container.read_header(data).layers[0].scale == scale


SIDES = [Side(), Side(gain=0), Side(empty=True)]


def with_sides(sides=SIDES, sections=None) -> bytes:
    payloads = [b"" if side.empty else part for side, part in zip(sides, PAYLOADS, strict=True)]
    return container.write(MODEL, SIZES, [1, 2.0, 3.2], [60, 60, 55.25], payloads, sections, sides)


@pytest.mark.parametrize(
    ("sides", "table"),
    [
        (SIDES, b"\x01\x02\x01\x02\x00\x02\x01"),
        ([Side(empty=True), Side(15, True), Side(7)], b"\x01\x03\x00\x01\x01\x03\x0f\x02\x02\x07"),
        ([Side(filter=b"ab"), Side(3, True, b"c"), Side()], b"\x01\x02\x00\x04\x02ab\x01\x07\x03\x01c"),
        ([Side(strength=0), Side(3, strength=32), Side()], b"\x01\x02\x00\x08\x00\x01\x0a\x03\x20"),
        ([Side(), Side(3, False, b"c", 17), Side()], b"\x01\x01\x01\x0e\x03\x11\x01c"),
        ([Side(), Side(), Side(filter=b"f" * 127)], b"\x01\x01\x02\x04\x7f" + b"f" * 127),
    ],
)
def test_side_information(sides, table):
    """Its bytes lie behind the layer entries, and it comes along whatever becomes of the file."""
    data = with_sides(sides)
    header = container.read_header(data)
    assert [e.side for e in header.layers] == sides and data[5] == container.WITH_SIDE
    assert data[: header.length - 4].endswith(table)
    assert header.end == len(data) and container.states(header, data) == ["ok"] * 3
    for k, side in enumerate(sides):
        assert container.payload(header, data, k) == (b"" if side.empty else PAYLOADS[k])
        small = container.extract(data[: header.layers[k].end], k)
        assert [e.side for e in container.read_header(small).layers] == sides[: k + 1]
        assert container.extract(small, k, strip=True) == small
    full = container.attach(data, container.Sections(icc=b"icc", xmp=b"xmp", alpha={0: b"a", 2: b"b"}))
    assert full[5] == container.WITH_SIDE | container.WITH_SECTIONS
    assert [e.side for e in container.read_header(full).layers] == sides
    assert container.attach(full, container.Sections()) == data


def test_bits_of_side_information():
    """What is said of a layer, without the two bytes that begin it all."""
    for side in (Side(), Side(3), Side(empty=True), Side(filter=b"abc"), Side(0, True, b"a"), Side(strength=5)):
        more = len(with_sides([Side(), Side(gain=9), side])) - len(with_sides([Side(), Side(gain=9), Side()]))
        assert side.bits == 8 * (more + (len(PAYLOADS[2]) if side.empty else 0))


def test_no_side_information_no_byte():
    assert with_sides([Side()] * 3) == example()
    # nor in a file of the lower layers, where it is of a layer above
    assert container.extract(with_sides(), 0) == container.extract(example(), 0)


@pytest.mark.parametrize("sections", [None, container.Sections(alpha={1: b"alpha"})])
def test_every_flipped_bit_of_side_information_is_found(sections):
    data = with_sides(sections=sections)
    header = container.read_header(data)
    for i in range(8 * header.length):
        broken = bytearray(data)
        broken[i // 8] ^= 1 << i % 8
        with pytest.raises(CompassError):
            container.read_header(bytes(broken))
    for size in range(header.length):
        with pytest.raises(CompassError):
            container.read_header(data[:size])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"\x00\x01\x01\x02\x00", "version 0; this program reads version 1"),
        (b"\x02\x01\x01\x02\x00", "version 2"),
        (b"\x01\x00", "is empty"),
        (b"\x01\x01\x03\x02\x00", "of layer 3 where"),  # no such layer
        (b"\x01\x01\xff\x02\x00", "of layer 255 where"),
        (b"\x01\x02\x01\x02\x00\x01\x02\x00", "of layer 1 where"),  # twice
        (b"\x01\x02\x02\x02\x00\x01\x02\x00", "of layer 1 where"),  # not rising
        (b"\x01\x01\x01\x00", "layer 1 is out of range"),  # says nothing
        (b"\x01\x01\x01\x10", "layer 1 is out of range"),  # a bit that is not known
        (b"\x01\x01\x01\x08\x10", "strength of restoration of layer 1"),  # the full one
        (b"\x01\x01\x00\x08\x21", "strength of restoration of layer 0"),
        (b"\x01\x01\x01\x09\x08", "strength of restoration of layer 1"),  # of an empty layer
        (b"\x01\x01\x01\x04\x00", "filter of layer 1 has 0 bytes"),
        (b"\x01\x01\x01\x04\x80" + b"f" * 128, "filter of layer 1 has 128 bytes"),
        (b"\x01\x01\x01\x82\x00", "layer 1 is out of range"),
        (b"\x01\x01\x00\x02\x00", "gain of layer 0"),
        (b"\x01\x01\x01\x02\x10", "gain of layer 1"),  # the full one
        (b"\x01\x01\x01\x02\x11", "gain of layer 1"),
        (b"\x01\x01\x01\x02\xff", "gain of layer 1"),
        (b"\x01\x01\x01\x01", "layer 1 17 bytes and calls it empty"),
        (b"\x01\x11" + b"\x01\x02\x00" * 17, "layer 1 where"),
    ],
)
def test_forged_side_information(table, words):
    plain = example()
    length = container.read_header(plain).length
    head = plain[:5] + bytes([container.WITH_SIDE]) + plain[6 : length - 4] + table
    with pytest.raises(FormatError, match=words):
        container.read_header(head + struct.pack("<I", zlib.crc32(head)) + plain[length:])


def test_no_bytes_only_where_the_header_says_so():
    """A length of 0 without the bit, with and without a table."""
    data = with_sides()
    head = bytearray(data[: container.read_header(data).length - 4])
    for forged in (head[:5] + b"\x00" + head[6:-7], head[:-7] + b"\x01\x01" + head[-5:-2]):
        with pytest.raises(FormatError, match="layer 2 0 bytes and calls it not empty"):
            container.read_header(bytes(forged) + struct.pack("<I", zlib.crc32(forged)) + data[len(head) + 4 :])
    with pytest.raises(AssertionError):
        container.write(MODEL, SIZES, [1, 2, 3], [60] * 3, [b"", b"x", b"y"])


def test_an_empty_layer_is_there_as_soon_as_the_one_below_it():
    data = with_sides()
    header = container.read_header(data)
    assert header.layers[2].end == header.layers[1].end and container.pick(header, header.layers[1].end, None) == 2
    assert container.pick(header, header.layers[1].end - 1, None) == 0


def test_empty():
    with pytest.raises(FormatError, match="empty"):
        container.read_header(b"")
