"""OpenAPI 3.1 from the route table: `generate()` is what `schemas/openapi.json` holds, and a test compares the two."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tx_async.api.endpoint import Row
from tx_async.api.routes import ROUTES

_REFERENCE = "#/components/schemas/{name}"


def generate() -> dict[str, Any]:
    structs = {kind for row in ROUTES for kind in (_request_struct(row), row.response, row.error) if _is_struct(kind)}
    named = sorted(structs, key=lambda kind: (kind.__name__, kind.__module__))
    schemas, components = msgspec.json.schema_components(named, ref_template=_REFERENCE)
    of = dict(zip(named, schemas, strict=True))
    paths: dict[str, Any] = {}
    for row in ROUTES:
        path = re.sub(r":path}", "}", row.path)
        paths.setdefault(path, {})[row.method.lower()] = _operation(row, of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tx_async", "version": "1", "description": "The Tinker API, self-hosted."},
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
        "paths": dict(sorted(paths.items())),
    }


def render() -> bytes:
    """The file's bytes."""
    return msgspec.json.format(msgspec.json.encode(generate(), order="deterministic"), indent=1) + b"\n"


def operation_id(row: Row) -> str:
    """The handler's name; for a route with several paths, with a suffix that tells them apart."""
    paths = [other.path for other in ROUTES if other.handler is row.handler]
    if len(paths) == 1:
        return row.handler.__name__
    return f"{row.path.split('/')[1]}_{row.handler.__name__}"


def _operation(row: Row, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": operation_id(row),
        "summary": row.summary,
        "responses": {
            "200": {"description": "OK"} | _answer(row, schema_of),
            "default": {"description": "An error"} | _content(row.error, schema_of),
        },
    }
    if parameters := re.findall(r"{(\w+)(?::path)?}", row.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if isinstance(row.request, str):
        content: dict[str, dict[str, Any]] = {"application/x-protobuf": {}, "application/json": {}}
        operation["requestBody"] = {"description": row.request, "content": content}
    elif struct := _request_struct(row):
        operation["requestBody"] = {"required": True} | _content(struct, schema_of)
    if not row.public:
        operation["security"] = [{"apiKey": []}, {"bearer": []}]
    return operation


def _answer(row: Row, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content = _content(row.response, schema_of).get("content", {}) | {kind: {} for kind in row.media_types}
    return {"content": content} if content else {}


def _content(kind: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:
    """Handlers that answer a raw response choose its form by the request."""
    return {"content": {"application/json": {"schema": schema_of[kind]}}} if _is_struct(kind) else {}


def _request_struct(row: Row) -> Any:
    return row.request if _is_struct(row.request) else row.decodes


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
