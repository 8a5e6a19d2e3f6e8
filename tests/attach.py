"""Other sections for a .cmps file."""

from __future__ import annotations

from compass_codec import container


def attach(data: bytes, sections: container.Sections) -> bytes:
    """The file with these sections in place of those that it has."""
    header = container.read_header(data, container.MAX_SIDE**2)
    layers = header.layers
    return container.write(
        header.model,
        [(entry.width, entry.height) for entry in layers],
        [entry.scale for entry in layers],
        [entry.quality for entry in layers],
        [container.payload(header, data, k) for k in range(len(layers))],
        sections,
    )
