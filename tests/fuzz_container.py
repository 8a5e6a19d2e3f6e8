"""Coverage-guided fuzzing of the container with atheris; ``make fuzz`` runs it.

Whatever the bytes are, reading a header and its layers gives values in range or one CompassError.
"""

import struct
import sys
import zlib

import atheris

with atheris.instrument_imports():
    from compass_codec import container
    from compass_codec.errors import CompassError


def check(data: bytes) -> None:
    try:
        header = container.read_header(data)
    except CompassError as e:
        assert str(e) and "\n" not in str(e)
        return
    assert 1 <= len(header.layers) <= container.MAX_LAYERS
    assert all(e.width * e.height <= container.MAX_PIXELS and e.length > 0 for e in header.layers)
    states = container.states(header, data)
    for k, state in enumerate(states):
        try:
            assert len(container.payload(header, data, k)) == header.layers[k].length and state == "ok"
        except CompassError:
            assert state != "ok"
    # what is accepted is written back byte for byte
    sizes = [(e.width, e.height) for e in header.layers]
    if all(state == "ok" for state in states):
        parts = [container.payload(header, data, k) for k in range(len(states))]
        scales, qualities = [e.scale for e in header.layers], [e.quality for e in header.layers]
        again = container.read_header(container.write(header.model, sizes, scales, qualities, parts))
        assert [vars(e) | {"start": 0} for e in again.layers] == [vars(e) | {"start": 0} for e in header.layers]


def one_input(data: bytes) -> None:
    check(data)
    # the checksum keeps a fuzzer out: try the same bytes as a header whose checksum is right
    if len(data) > 20:
        head = container.MAGIC + b"\x01\x00" + data
        check(head + struct.pack("<I", zlib.crc32(head)) + data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
