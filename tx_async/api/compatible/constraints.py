"""What a request says about the form of its answer, as the grammar that the answer obeys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from tx_async.api.compatible.answer_grammars import AskedAnswer, AskedTool
from tx_async.api.compatible.fields import InvalidField
from tx_async.api.compatible.prompts import ChatPrompt
from tx_async.api.context import Call
from tx_async.grammar import GrammarError
from tx_async.wire.openai import NamedFunction, ResponseFormat

FORMAT, SCHEMA = "response_format", "response_format.json_schema.schema"
_ANY_OBJECT = {"type": "object"}


class ForcedCall(Struct, frozen=True):
    """Whether, and what, the model must call."""

    is_forced: bool = False
    name: str = ""
    """The only tool to call; "" = any."""


class Wish(Struct, frozen=True, kw_only=True):
    """All that a request says about the form of its answer."""

    format: ResponseFormat | None = None
    grammar: str | None = None
    tools: Sequence[dict[str, Any]] = ()
    choice: ForcedCall = ForcedCall()
    several_calls: bool = True

    @property
    def is_free(self) -> bool:
        return self.grammar is None and not self.choice.is_forced and _type_of(self.format) == "text"


def openai_choice(given: str | dict[str, Any] | None, tools: Sequence[dict[str, Any]]) -> ForcedCall:
    """Raises `InvalidField`."""
    if given in (None, "none", "auto"):
        check_tools(given == "auto", tools)
        return ForcedCall()
    if given == "required":
        check_tools(True, tools)
        return ForcedCall(is_forced=True)
    try:
        named = msgspec.convert(given, NamedFunction)
    except msgspec.ValidationError:
        raise InvalidField(
            "tool_choice", 'it must be none, auto, required, or {"type": "function", "function": {"name": …}}.'
        ) from None
    return named_choice(named.function.name, tools)


def named_choice(name: str, tools: Sequence[dict[str, Any]]) -> ForcedCall:
    """Raises `InvalidField` for a tool that the request does not have."""
    check_tools(True, tools)
    if name not in [tool["function"]["name"] for tool in tools]:
        raise InvalidField("tool_choice", f"tools has no {name}.")
    return ForcedCall(is_forced=True, name=name)


def check_tools(is_needed: bool, tools: Sequence[dict[str, Any]]) -> None:
    if is_needed and not tools:
        raise InvalidField("tool_choice", "it goes with tools only.")


async def grammar_of(call: Call, wish: Wish, prompt: ChatPrompt | None = None) -> str:
    """The grammar of the answer; "" where anything may be said. Raises `InvalidField` for one that cannot be used."""
    if wish.is_free:
        return ""
    asked = asked_answer(wish, prompt)
    try:
        return await call.api.grammars.grammar(call.owner, asked)
    except GrammarError as error:
        raise InvalidField(_field(wish), error.message) from None


def asked_answer(wish: Wish, prompt: ChatPrompt | None) -> AskedAnswer:
    schema = _schema(wish)
    calls = wish.tools if wish.choice.is_forced or wish.tools else ()
    named = [tool["function"] for tool in calls if wish.choice.name in ("", tool["function"]["name"])]
    family = prompt.family if prompt else None
    said = prompt.text.rstrip() if prompt else ""
    thinks = family.tags.thinks if family and family.name != "gpt-oss" else None
    if thinks and said.endswith(thinks[1]):
        thinks = None  # the prompt says that there is no more to think
    return AskedAnswer(
        schema=None if wish.choice.is_forced else schema,
        grammar=None if wish.choice.is_forced else wish.grammar,
        tools=tuple(AskedTool(function["name"], function.get("parameters") or {}) for function in named),
        several_calls=wish.several_calls and not wish.choice.name,
        family=family.name if family else "plain",
        thinks=thinks,
        in_reasoning=thinks is not None and said.endswith(thinks[0]),
    )


def _schema(wish: Wish) -> dict[str, Any] | bool | None:
    kind = _type_of(wish.format)
    if kind == "text":
        return None
    if wish.grammar is not None:
        raise InvalidField("grammar", "it does not go with response_format: an answer obeys one of them.")
    given = wish.format.json_schema if wish.format else None
    if kind == "json_object":
        if given is not None:
            raise InvalidField(f"{FORMAT}.json_schema", "it goes with the type json_schema only.")
        return _ANY_OBJECT
    if given is None:
        raise InvalidField(f"{FORMAT}.json_schema", "it is missing.")
    return given.schema


def _type_of(form: ResponseFormat | None) -> str:
    return form.type if form is not None else "text"


def _field(wish: Wish) -> str:
    if wish.choice.is_forced:
        return "tools" if wish.tools else "tool_choice"
    if wish.grammar is not None:
        return "grammar"
    return SCHEMA if _type_of(wish.format) == "json_schema" else FORMAT
