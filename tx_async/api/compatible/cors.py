"""Pages from other origins: which of them may call a route and read its answer. None may, unless the operator names
it."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

EXPOSED_HEADERS = ("x-request-id", "request-id", "retry-after")


def open_to(endpoint: ASGIApp, origins: str) -> ASGIApp:
    """origins: separated by commas; `*` means any. No page may send cookies: there are none."""
    listed = [origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()]
    return CORSMiddleware(
        endpoint,
        allow_origins=listed,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED_HEADERS),
    )
