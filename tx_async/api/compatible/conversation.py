"""Turns OpenAI's messages and tools into the form that chat templates take, or says why they make no sense."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tx_async.api.compatible.fields import InvalidField
from tx_async.api.compatible.json_values import is_object
from tx_async.wire.openai import ChatMessage, ToolCall

PARTS_JOINED_BY = "\n"
_MEDIA = ("image", "image_url", "input_image", "input_audio", "audio", "video", "video_url", "file", "document")


def template_messages(
    messages: Sequence[ChatMessage], *, takes_parts: bool, knows_developer: bool
) -> list[dict[str, Any]]:
    """takes_parts, knows_developer: what the model's chat template can render; otherwise parts are joined, and a
    developer speaks as the system."""
    check_order(messages)
    found: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" and not knows_developer else message.role
        entry: dict[str, Any] = {"role": role, "content": _content(message.content, f"messages[{i}]", takes_parts)}
        if (reasoning := message.reasoning_content or message.reasoning) is not None:
            entry["reasoning_content"] = reasoning
        if message.tool_calls:
            entry["tool_calls"] = [
                _tool_call(call, f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(message.tool_calls)
            ]
        found.append(entry | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))})
    return found


def check_order(messages: Sequence[ChatMessage]) -> None:
    """Check that a tool answers a call of the assistant's message before it, and that every call is answered before
    anybody else speaks. A model's other rules are in its template."""
    if not messages:
        raise InvalidField("messages", "there are none. Send at least one.")
    calls = OpenCalls(_WORDS)
    for i, message in enumerate(messages):
        calls.follow(message, f"messages[{i}]")
        _check_fields(message, f"messages[{i}]")
    calls.end()


class CallWords(NamedTuple):
    """How an API speaks of calls and their results."""

    no_call: str
    """For a result that belongs to no call."""
    no_result: str
    """For calls without a result: {calls} are their ids, {before} is empty at the end of a conversation."""


_WORDS = CallWords(
    "a tool's message must have the tool_call_id of an open call of the assistant before it.",
    "the calls {calls}{before} have no tool's answer.",
)


class OpenCalls:
    """The calls of a conversation that have no result so far."""

    def __init__(self, words: CallWords):
        self._words = words
        self._ids: set[str] = set()

    def follow(self, message: ChatMessage, where: str) -> None:
        """Raises `InvalidField` for a message that may not come next."""
        if message.role == "tool":
            if message.tool_call_id not in self._ids:
                raise InvalidField(where, self._words.no_call)
            self._ids.discard(message.tool_call_id)
        elif self._ids:
            raise InvalidField(where, self._unanswered(" before it"))
        self._ids |= {call.id for call in message.tool_calls or ()}

    def end(self) -> None:
        if self._ids:
            raise InvalidField("messages", self._unanswered(""))

    def _unanswered(self, before: str) -> str:
        return self._words.no_result.format(calls=", ".join(sorted(self._ids)), before=before)


def _check_fields(message: ChatMessage, where: str) -> None:
    if message.tool_calls and message.role != "assistant":
        raise InvalidField(f"{where}.tool_calls", "only the assistant calls tools.")
    if message.tool_call_id and message.role != "tool":
        raise InvalidField(f"{where}.tool_call_id", "only a tool answers a call.")
    has_more = message.tool_calls or message.reasoning_content or message.reasoning
    if message.content is None and not (message.role == "assistant" and has_more):
        raise InvalidField(f"{where}.content", "it must be a text, or a list of text parts.")


def _content(content: str | list[dict[str, Any]] | None, where: str, takes_parts: bool) -> Any:
    if not isinstance(content, list):
        return content
    texts = [text_of_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    if takes_parts:
        return [{"type": "text", "text": text} for text in texts]
    return PARTS_JOINED_BY.join(texts)


def text_of_part(part: Mapping[str, Any], where: str) -> str:
    """The text of a part. Raises `InvalidField` for other kinds."""
    kind = part.get("type")
    if kind in _MEDIA:
        raise InvalidField(where, f"{kind}: only text is served here, no vision or audio model.")
    if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
        raise InvalidField(where, 'a part must be {"type": "text", "text": …}.')
    return part["text"]


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": arguments_of(call.function.arguments, where)}
    return {"id": call.id, "type": "function", "function": function}


def arguments_of(arguments: str | dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments as an object, which templates want; OpenAI's clients send its JSON."""
    if isinstance(arguments, dict):
        return arguments
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not is_object(parsed):
        raise InvalidField(f"{where}.function.arguments", "they must be a JSON object.")
    return parsed


_TOOL = {"type", "function"}
_FUNCTION = {"name", "description", "parameters", "strict"}


def parameters_of(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The name of each tool -> the schemas of its parameters. Raises `InvalidField` for a malformed tool."""
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        where, function = f"tools[{i}]", tool.get("function")
        if tool.get("type") != "function" or not is_object(function):
            raise InvalidField(where, 'a tool must be {"type": "function", "function": {"name": …, …}}.')
        if unknown := sorted((tool.keys() - _TOOL) | (function.keys() - _FUNCTION)):
            raise InvalidField(f"{where}.{unknown[0]}", "this field is not known here, or not supported. Leave it out.")
        name = function.get("name")
        schema: Any = function.get("parameters") or {}
        if not isinstance(name, str) or not name or name in found:
            raise InvalidField(f"{where}.function.name", "every tool needs a name of its own.")
        if not is_object(schema) or not isinstance(function.get("description") or "", str):
            raise InvalidField(f"{where}.function", "parameters must be a JSON Schema, description a text.")
        found[name] = _properties(schema, where)
    return found


def _properties(schema: dict[str, Any], where: str) -> dict[str, Any]:
    properties: Any = schema.get("properties") or {}
    if schema.get("type", "object") != "object" or not is_object(properties):
        raise InvalidField(f"{where}.function.parameters", "it must be the JSON Schema of an object.")
    return {name: entry for name, entry in properties.items() if is_object(entry)}
