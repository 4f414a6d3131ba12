"""Server-sent events of an ASGI app, read in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import ASGIApp

Event = tuple[str, Any]


async def read_events(
    app: ASGIApp,
    path: str,
    number: int,
    *,
    key: str = "",
    after_first: Callable[[], object] = lambda: None,
    pages: int = 1,
) -> list[Event]:
    """The first `number` events, or fewer where the stream ends; of the first of several open pages."""
    opened = [asyncio.Event() for _ in range(pages)]
    reading = [_read(app, path, number, key, after_first, opened, place) for place in range(pages)]
    return (await asyncio.gather(*reading))[0]


async def _read(
    app: ASGIApp,
    path: str,
    number: int,
    key: str,
    after_first: Callable[[], object],
    opened: list[asyncio.Event],
    place: int,
) -> list[Event]:
    events: list[Event] = []
    is_enough = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not is_enough.is_set() and not receive_called:
            receive_called.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await is_enough.wait()
        return {"type": "http.disconnect"}

    receive_called: list[bool] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
            return
        for block in message.get("body", b"").decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
            if "data" in fields:
                events.append((fields["event"], msgspec.json.decode(fields["data"])))
        if events and not opened[place].is_set():
            opened[place].set()
            await asyncio.gather(*(other.wait() for other in opened))
            after_first()
        if len(events) >= number:
            is_enough.set()

    await app(scope_of(path, key), receive, send)  # type: ignore[arg-type]
    return events[:number]


def scope_of(path: str, key: str = "") -> dict[str, Any]:
    """The ASGI scope of a GET from this machine."""
    headers = [(b"host", b"127.0.0.1:8000"), *([(b"x-api-key", key.encode())] if key else [])]
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "root_path": "",
        "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }
