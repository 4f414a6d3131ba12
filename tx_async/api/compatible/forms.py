"""Errors in the form of the API that is served below a path."""

from __future__ import annotations

from msgspec import Struct

from tx_async import logs
from tx_async.wire import anthropic, openai, tinker

ANTHROPIC_PREFIXES = ("/anthropic/api/v1", "/services/tinker-prod/anthropic/api/v1", "/v1/messages")
OPENAI_PREFIXES = ("/oai/api/v1", "/services/tinker-prod/oai/api/v1", "/v1")

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_OPENAI_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def speaks_anthropic(path: str) -> bool:
    return _is_below(path, ANTHROPIC_PREFIXES)


def speaks_openai(path: str) -> bool:
    return not speaks_anthropic(path) and _is_below(path, OPENAI_PREFIXES)


def _is_below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def error_body(path: str, status: int, message: str, category: str, error: Exception | None = None) -> Struct:
    """error: its `field` and `code`, where it has them, appear in OpenAI's form."""
    if speaks_anthropic(path):
        return anthropic_error(status, message)
    if speaks_openai(path):
        return openai_error(status, message, error)
    return tinker.ErrorBody(detail=message, category=category)  # type: ignore[arg-type]


def anthropic_error(status: int, message: str) -> anthropic.AnthropicErrorBody:
    usual = "api_error" if status >= 500 else "invalid_request_error"
    return anthropic.AnthropicErrorBody(
        error=anthropic.AnthropicError(type=_ANTHROPIC_TYPES.get(status, usual), message=message),
        request_id=logs.request_id.get() or None,
    )


def openai_error(status: int, message: str, error: Exception | None = None) -> openai.OpenaiErrorBody:
    usual = "server_error" if status >= 500 else "invalid_request_error"
    return openai.OpenaiErrorBody(
        error=openai.OpenaiError(
            message=message,
            type=_OPENAI_TYPES.get(status, usual),
            param=getattr(error, "field", None),
            code=getattr(error, "code", None) or _OPENAI_CODES.get(status),
        )
    )
