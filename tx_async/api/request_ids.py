"""Every request has an id: in its lines of the log, in the headers of its answer, and in Anthropic's errors."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.responses import Response

from tx_async import logs

CHARACTERS_MAX = 64
HEADERS = ("x-request-id", "request-id")


def begin(headers: Headers) -> str:
    """The client's own id, where it is fit for a line of the log, or a new one; from here on the log has it."""
    given = headers.get("x-request-id", "")
    is_fit = given.isascii() and given.isprintable() and 0 < len(given) <= CHARACTERS_MAX
    request_id = given if is_fit else secrets.token_hex(6)
    logs.request_id.set(request_id)
    return request_id


def show(response: Response, request_id: str) -> Response:
    for name in HEADERS:
        response.headers[name] = request_id
    return response
