"""The page's own files, as they are in `static/`: nothing is built, and nothing comes from another host."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tx_async.api.owner import is_loopback
from tx_async.config import ServerConfig

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def is_on(config: ServerConfig) -> bool:
    return is_loopback(config.host) if config.dashboard is None else config.dashboard


def page_routes(wants_key: bool) -> list[Route]:
    """`/` is the page, also for who looks under `/dashboard`; its files lie below, after the other routes there. A page
    that knows that a key is wanted asks for it at once, not after a refusal."""
    files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.suffix in TYPES}
    if wants_key:
        files["index.html"] = files["index.html"].replace(b"<body>", b"<body data-wants-key>")
    routes = [Route("/", _answer("index.html", files["index.html"]), methods=["GET"])]
    routes += [Route(path, _to_the_page, methods=["GET"]) for path in ("/dashboard", "/dashboard/")]
    return routes + [Route(f"/dashboard/{name}", _answer(name, file), methods=["GET"]) for name, file in files.items()]


async def _to_the_page(request: Request) -> Response:
    return RedirectResponse("/", headers=HEADERS)


def _answer(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    headers = {
        **HEADERS,
        "content-type": TYPES[Path(name).suffix],
        "etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return answer
