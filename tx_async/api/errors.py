"""Errors as HTTP, in the form of the API that is served below the path: always JSON, never an empty body (the SDK takes
an empty 400 for a network glitch and retries)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tx_async.api import request_ids
from tx_async.api.compatible.forms import error_body
from tx_async.errors import BodyTimeout, Category, TxError

RETRY_AFTER_S = 1
"""The seconds that 429 and 503 suggest; the SDK honours up to 60."""

_REASONS = {
    404: "There is no such route: this server speaks the Tinker API under /api/v1, OpenAI's under /oai/api/v1 and "
    "Anthropic's under /anthropic/api/v1.",
    405: "This route exists, but not for this method.",
}
_encode = msgspec.json.Encoder().encode


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(value), status, headers, media_type="application/json")


def error_response(error: TxError, redact: Callable[[str], str] = str, path: str = "") -> Response:
    """redact: removes from a server failure what is not its tenants' business."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    if isinstance(error, BodyTimeout):
        headers = {"connection": "close"}
    message = error.message if error.category == "user" else redact(error.message)
    return _response(path, error.status, message, error.category, headers, error)


def internal_error_response(path: str = "") -> Response:
    """For an exception that nobody foresaw: its text stays in the server's log."""
    return _response(path, 500, "The server failed on this request; its log says why.", "server")


async def http_exception_response(request: Request, error: Exception) -> Response:
    """The router's own 404 and 405."""
    assert isinstance(error, HTTPException)
    request_id = request_ids.begin(request.headers)
    message = _REASONS.get(error.status_code, str(error.detail))
    response = _response(request.url.path, error.status_code, message, "user", dict(error.headers or {}))
    return request_ids.show(response, request_id)


def _response(
    path: str,
    status: int,
    message: str,
    category: Category,
    headers: dict[str, str] | None = None,
    error: Exception | None = None,
) -> Response:
    return json_response(error_body(path, status, message, category, error), status, headers)
