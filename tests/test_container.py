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


def test_the_longest_header():
    """Every field as long as it can be, but for lengths: of 1 byte here, of 4 at most, in 16 layers and 19 sections."""
    layers = container.MAX_LAYERS
    sections = container.Sections(b"x", b"x", b"x", dict.fromkeys(range(layers), b"x"))
    sizes = [(container.MAX_SIDE, container.MAX_SIDE)] * layers
    data = container.write(MODEL, sizes, [9.9999999] * layers, [100] * layers, [b"x"] * layers, sections)
    header = container.read_header(data, container.MAX_SIDE**2)
    assert header.length + 3 * (layers + len(header.sections)) == container.MAX_HEADER


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
        (4, b"\x01", FormatError),  # version
        (4, b"\x03", FormatError),
        (5, b"\x02", FormatError),  # flags
        (5, b"\xff", FormatError),
        (12, b"\x00", FormatError),  # layers
        (12, b"\x11", FormatError),
        (13, b"\x00", FormatError),  # width 0
        (13, b"\x80", FormatError),  # a longer form of a number than it needs, or a width that swallows the height
        (13, b"\x7f", FormatError),  # layer 0 wider than layer 1
        (15, b"\x00", FormatError),  # scale 0
        (16, b"\x7f", FormatError),  # scale 1e127
        (19, b"\x00", FormatError),  # a layer without bytes
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


def test_empty():
    with pytest.raises(FormatError, match="empty"):
        container.read_header(b"")
