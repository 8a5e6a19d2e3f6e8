"""Coverage-guided fuzzing of the container with atheris; ``make fuzz`` runs it.

Whatever the bytes are, reading a header, its layers and its sections gives values in range or one CompassError.
"""

import struct
import sys
import zlib

import atheris

with atheris.instrument_imports():
    from attach import attach

    from compass_codec import container
    from compass_codec.errors import CompassError


def what(header: container.Header) -> list[tuple]:
    """All that a header says of its layers but where they lie."""
    return [(e.width, e.height, e.scale, e.quality, e.length, e.checksum) for e in header.layers]


def check(data: bytes) -> None:
    try:
        header = container.read_header(data)
    except CompassError as e:
        assert str(e) and "\n" not in str(e)
        return
    count = len(header.layers)
    assert 1 <= count <= container.MAX_LAYERS
    assert all(e.width * e.height <= container.MAX_PIXELS for e in header.layers)
    assert all(e.length > 0 for e in header.layers)
    assert all(0 < s.length <= container.KINDS[s.kind].limit and s.layer < count for s in header.sections)
    # one piece after the other, from the header to the end
    pieces = sorted([(e.start, e.length) for e in header.layers] + [(s.start, s.length) for s in header.sections])
    ends = [header.length, *(start + length for start, length in pieces)]
    assert [start for start, _ in pieces] == ends[:-1] and ends[-1] == header.end
    states = container.states(header, data)
    assert len(states) == count + len(header.sections)
    found = container.sections(header, data, best_effort=True)
    try:
        assert container.sections(header, data) == found
    except CompassError:
        assert "damaged" in states[count:]
    for k, entry in enumerate(header.layers):
        if states[k] == "ok":
            assert len(container.payload(header, data, k)) == entry.length
        try:
            small = container.extract(data, k)
        except CompassError as e:
            assert str(e) and "\n" not in str(e) and set(states) != {"ok"}
            continue
        assert set(states[: k + 1]) == {"ok"}
        part = container.read_header(small)
        assert what(part) == what(header)[: k + 1] and part.end == len(small)
        assert container.extract(small, k) == small
    # what is accepted is written back as it was
    if set(states) == {"ok"}:
        whole = attach(data, found)
        again = container.read_header(whole)
        assert what(again) == what(header) and container.sections(again, whole) == found


def one_input(data: bytes) -> None:
    check(data)
    # the checksum keeps a fuzzer out: try the same bytes as a header whose checksum is right
    if len(data) > 20:
        for flags in (b"\x00", b"\x01"):
            head = container.MAGIC + bytes([container.VERSION]) + flags + data
            check(head + struct.pack("<I", zlib.crc32(head)) + data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
