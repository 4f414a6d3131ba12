"""HTTP calls that commands make to a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import IO, Any, TypeVar

import msgspec

from tx_async.errors import ConfigError

TIMEOUT_S = 3600
PAGE = 1000

Entry = TypeVar("Entry")


def call(
    base_url: str, api_key: str, method: str, path: str, body: IO[bytes] | None = None, **headers: str
) -> dict[str, Any]:
    """The JSON that the server answers. Raises `ConfigError` with what it says is wrong, or when it is not there."""
    content = fetch(base_url, api_key, method, path, body, **headers)
    try:
        return json.loads(content or b"{}")
    except ValueError as error:
        raise ConfigError(f"{base_url} does not answer with JSON: is it a server of the Tinker API?") from error


def everything(base_url: str, api_key: str, path: str, field: str, kind: type[Entry], number: int = 0) -> list[Entry]:
    """All entries of a listing that comes in pages, or the first `number`, in the server's order. field: the entries'
    name in its answers."""
    found: list[Entry] = []
    while True:
        limit = min(PAGE, number - len(found)) if number > 0 else PAGE
        page = call(base_url, api_key, "GET", f"{path}?limit={limit}&offset={len(found)}").get(field, [])
        found += msgspec.convert(page, list[kind])
        if len(page) < limit or len(found) == number:
            return found


def fetch(base_url: str, api_key: str, method: str, path: str, body: IO[bytes] | None = None, **headers: str) -> bytes:
    """The server's raw answer. Raises `ConfigError` as `call` does."""
    if not base_url:
        raise ConfigError("Which server? Give --base-url URL.")
    if api_key:
        headers["x-api-key"] = api_key
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        request = urllib.request.Request(base_url.rstrip("/") + path, body, named, method=method)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{base_url} says: {_detail(error)}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConfigError(f"{base_url} cannot be reached: {error}.") from error


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code}."
