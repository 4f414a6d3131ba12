"""Bodies of requests: fields without effect are dropped, fields that are not supported are refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from tx_async.api import body, measure
from tx_async.api.compatible.json_values import is_list, is_object
from tx_async.api.context import Call
from tx_async.config import ServerConfig
from tx_async.errors import InvalidRequest, NotFound

WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "user_profile_id",
    }
)
"""Accepted, because they change no answer: they say who asks, and what is kept or cached elsewhere."""
WITHOUT_EFFECT_ANYWHERE = frozenset({"cache_control", "eager_input_streaming"})
"""The same within messages, their parts, `system` and `tools`."""
_DEFAULTS = (("modalities", ["text"]), ("function_call", "none"), ("suffix", ""))
"""Fields that are not supported, with values that ask for nothing."""
_NESTED = ("messages", "content", "system", "tools")
BODY_BYTES_MIN, BODY_BYTES_PER_TOKEN = 16 * 2**20, 64
"""A body may be this large, or have this many bytes for each token of the context: a larger one is not a prompt. The
first is for short contexts: a body may have hundreds of prompts. `prompts.encoded_text` limits each of them."""

T = TypeVar("T")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<path>[^`]*)`)?")
_SOME_KEY = "[...]"
"""What msgspec puts for the key of a value in a dictionary."""
_INVALID = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)


class InvalidField(InvalidRequest):
    """One field of the request is invalid."""

    def __init__(self, field: str, what: str, code: str | None = None):
        super().__init__(f"{field}: {what}")
        self.field, self.what, self.code = field, what, code


class ContextExceeded(InvalidField):
    """The prompt does not fit the context."""

    def __init__(self, field: str, length: str, num_tokens_max: int):
        """length: how long it is, with the unit."""
        what = f"the prompt has {length}; the context, answer included, is {num_tokens_max} tokens. Send less of it."
        super().__init__(field, what, "context_length_exceeded")


class ModelNotServed(NotFound):
    """No model or checkpoint of that name is served here."""

    field, code = "model", "model_not_found"


async def read(call: Call, kind: type[T]) -> T:
    """The body as a struct. Large bodies are decoded in a thread."""
    context = call.scheduler.base_model.max_context_length
    bytes_max = max(BODY_BYTES_MIN, BODY_BYTES_PER_TOKEN * context)
    content = await body.read(call.request, min(bytes_max, call.api.config.request_body_bytes_max), call.hold)
    request = await call.hold.compute(decode, len(content), content, kind, call.api.config)
    call.hold.release()  # from here on it takes as long as the answer
    return request


def decode(content: bytes, kind: type[T], config: ServerConfig) -> T:
    measure.check_values(content, config.json_values_max)
    value = body.decode_json(content, dict[str, Any], config.json_depth_max)
    given = {key: item for key, item in value.items() if key not in WITHOUT_EFFECT and (key, item) not in _DEFAULTS}
    try:
        return msgspec.convert(_plain(given), kind)
    except msgspec.ValidationError as error:
        raise named(str(error), kind=kind) from None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value without fields that have no effect anywhere, and without nulls: clients send those for all that they
    leave open, also in fields that are not known here. Schemas and arguments of tools are data and stay as they are."""
    kept = {key: item for key, item in value.items() if item is not None and key not in WITHOUT_EFFECT_ANYWHERE}
    for key in _NESTED:
        if is_list(items := kept.get(key)):
            kept[key] = [_plain(item) if is_object(item) else item for item in items]
    return kept


def named(what: str, where: str = "", kind: Any = None) -> InvalidField:
    """msgspec's error, with the field's name first. where: the place of the value that was converted. kind: what it was
    converted to, which says what else a field may be."""
    if found := _UNKNOWN.fullmatch(what):
        name = ".".join(filter(None, (where, found["path"], found["name"])))
        return InvalidField(name, "this field is not known here, or not supported. Leave it out.")
    found = _INVALID.fullmatch(what)
    assert found
    path = (found["path"] or "").removesuffix(_SOME_KEY)
    missing = re.search(r"missing required field `([^`]*)`", found["what"])
    name = ".".join(filter(None, (where, path, missing and missing[1])))
    choices = _choices(kind, path) if found["what"].startswith("Invalid enum value") else []
    allowed = f"; it must be {', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else ""
    return InvalidField(name or "body", f"{found['what']}{allowed}.")


def _choices(kind: Any, path: str) -> list[str]:
    """The texts that the field at that place may be, where they are a few."""
    for part in path.split("."):
        struct = next((inner for inner in _within(kind) if isinstance(inner, type) and issubclass(inner, Struct)), None)
        kind = get_type_hints(struct).get(part.partition("[")[0]) if struct else None
    return [text for inner in _within(kind) if get_origin(inner) is Literal for text in get_args(inner)]


def _within(kind: Any) -> Iterator[Any]:
    """A type, and the types that it is made of."""
    yield kind
    for inner in get_args(kind):
        yield from _within(inner)
