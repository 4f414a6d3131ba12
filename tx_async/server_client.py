"""What commands ask of a running server, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import IO, Any

from tx_async.errors import ConfigError

TIMEOUT_S = 3600


def call(
    base_url: str, api_key: str, method: str, path: str, body: IO[bytes] | None = None, **headers: str
) -> dict[str, Any]:
    """The JSON that it answers. Raises `ConfigError`: what it says is wrong, or that it is not there."""
    if not base_url:
        raise ConfigError("Which server? Give --base-url URL.")
    if api_key:
        headers["x-api-key"] = api_key
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        request = urllib.request.Request(base_url.rstrip("/") + path, body, named, method=method)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{base_url} says: {_detail(error)}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConfigError(f"{base_url} cannot be reached: {error}.") from error


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code}."
