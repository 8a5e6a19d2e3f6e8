"""The HTML pages: one that compares the layers of a file, and the demo page of the server."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from compass_codec.pictures import WEBP_SIDE

if TYPE_CHECKING:
    from PIL import Image

START_WIDTH = 240  # of a picture on the demo page


@dataclass(frozen=True)
class Pane:
    """One picture to compare: its name, a line about it, and its pixels."""

    name: str
    about: str
    image: Image.Image


@dataclass(frozen=True)
class Picture:
    """One picture that the server has: its name, its address, and (width, height, bytes of file needed) of each
    size."""

    name: str
    address: str
    sizes: list[tuple[int, int, int]]


def fill(template: str, **values: str) -> str:
    """A page out of a template, named by its path in the package. Where the name of a file is not UTF-8, U+FFFD stands
    for what cannot be shown."""
    folder = resources.files("compass_codec")
    style = (folder / "templates" / "style.css").read_text(encoding="utf-8")
    html = Template((folder / template).read_text(encoding="utf-8")).substitute(values, style=style)
    return os.fsencode(html).decode(errors="replace")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table's rows, the first one its heads."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join(lines)


def data_uri(image: Image.Image) -> str:
    """The picture without loss as a data: address, as WebP, or PNG where it is too large for that."""
    kind = "webp" if max(image.size) <= WEBP_SIDE else "png"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def view(title: str, summary: str, panes: Sequence[Pane], rows: Sequence[Sequence[str]]) -> str:
    """A page that needs no network: ``panes`` side by side, the same spot enlarged in each, and a table."""
    widest = max(panes, key=lambda pane: pane.image.width).image
    figures = [
        f'<figure><div class="pane"><img src="{data_uri(pane.image)}" alt="{escape(pane.name)}"></div>\n'
        f"<figcaption>{escape(pane.name)}<br><span>{escape(pane.about)}</span></figcaption></figure>"
        for pane in panes
    ]
    return fill(
        "templates/view.html",
        title=escape(title),
        summary=escape(summary),
        ratio=f"{widest.width} / {widest.height}",
        panes="\n".join(figures),
        table=_table(rows),
    )


def demo(pictures: Sequence[Picture]) -> str:
    """The server's page: every picture as <img srcset>, and the bytes that each size needs."""
    count = f"{len(pictures)} picture{'s' if len(pictures) != 1 else ''}" if pictures else "No pictures here"
    return fill(
        "templates/demo.html",
        count=count,
        pictures="\n".join(_section(picture) for picture in pictures),
        widest=str(max([START_WIDTH, *(picture.sizes[-1][0] for picture in pictures)])),
        width=str(START_WIDTH),
    )


def _section(picture: Picture) -> str:
    address = escape(picture.address)
    top, whole = picture.sizes[-1][0], picture.sizes[-1][2]
    # layers of one width need one entry, or the browser complains
    widths = sorted({w for w, _, _ in picture.sizes})
    srcset = ", ".join(f"{address}?w={w} {w}w" for w in widths)
    rows = "\n".join(
        f'<tr data-w="{w}"><td>{w} x {h}</td><td>{end}</td><td>{100 * end / whole:.0f} %</td></tr>'
        for w, h, end in picture.sizes
    )
    return (
        f"<section><h2>{escape(picture.name)}.cmps</h2>\n"
        f'<img src="{address}?w={top}" srcset="{srcset}" sizes="{START_WIDTH}px" width="{top}" '
        f'height="{picture.sizes[-1][1]}" alt="{escape(picture.name)}" loading="lazy">\n'
        f"<table><tr><th>size</th><th>bytes of the file</th><th></th></tr>\n{rows}</table></section>"
    )
