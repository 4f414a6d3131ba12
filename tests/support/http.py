"""An ASGI app as a client somewhere sees it."""

import httpx
from starlette.types import ASGIApp


def asgi_client(app: ASGIApp, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """address: where its requests come from."""
    transport = httpx.ASGITransport(app=app, client=(address, 40000))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
