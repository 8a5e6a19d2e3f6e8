"""What ``compass serve`` answers below /app/: a page whose pictures the browser decodes, and what it needs for that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import lru_cache
from html import escape
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from compass_codec import web
from compass_codec.errors import WeightsError
from compass_codec.page import fill
from compass_codec.weights import IDENTITY, choose

TYPES = {".js": "text/javascript", ".wasm": "application/wasm"}
PAGE = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'self'; worker-src 'self'"
WORKER = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self'"


def routes(addresses: Callable[[], Iterable[tuple[str, str]]], folder: Path | None) -> list[Route]:
    """``addresses`` gives name and address of each .cmps file; ``folder`` is a set of weights besides those
    installed."""

    async def page(_: Request) -> Response:
        html = await asyncio.to_thread(lambda: _page(addresses()))
        return HTMLResponse(html, headers={"Cache-Control": "no-cache", "Content-Security-Policy": PAGE})

    async def script(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": WORKER, "Service-Worker-Allowed": "/"}
        return Response(web.script(name), media_type=TYPES[Path(name).suffix], headers=headers)

    async def weights(request: Request) -> Response:
        identity = request.path_params["identity"]
        try:
            data = await asyncio.to_thread(_weights, folder, identity)
        except WeightsError as e:
            raise HTTPException(404, f"no weights {identity}") from e
        lasting = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(data, media_type="application/octet-stream", headers=lasting)

    return [
        Route("/app/", page),
        *(Route(f"/app/{name}", script) for name in web.SCRIPTS),
        Route(f"/app/{web.weights_name('{identity}')}", weights),
    ]


@lru_cache(maxsize=2)
def _weights(folder: Path | None, identity: str) -> bytes:
    if not IDENTITY.fullmatch(identity):  # a name, which can come to mean another set
        raise WeightsError(f"{identity} is no identity")
    return web.weights_of(choose(folder, identity))


def _page(pictures: Iterable[tuple[str, str]]) -> str:
    figure = '<figure><img data-cmps="{1}" alt="{0}"><figcaption>{0}</figcaption></figure>'
    shown = [figure.format(escape(name), escape(address)) for name, address in pictures]
    return fill("web/app.html", pictures="\n".join(shown))
