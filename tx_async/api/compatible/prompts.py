"""Turns messages into the prompt's tokens, off the event loop and in the key's turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from tx_async.api.compatible.conversation import parameters_of, template_messages
from tx_async.api.compatible.families import Family, family_of
from tx_async.api.compatible.fields import ContextExceeded, InvalidField
from tx_async.api.compatible.parsing import Parameters
from tx_async.api.compatible.tokenizer import Tokenizer
from tx_async.api.context import Call
from tx_async.wire.openai import ChatMessage

if TYPE_CHECKING:
    from tx_async.api.compatible.templates import Template

T = TypeVar("T")

_TAKEN = ("messages", "tools", "add_generation_prompt")
"""Values that a template is always given."""


@dataclass(frozen=True)
class Chat:
    """The conversation that a request sends to the model."""

    messages: Sequence[ChatMessage]
    tools: Sequence[dict[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More values for the template (`chat_template_kwargs`)."""
    required: tuple[tuple[str, str], ...] = ()
    """(option, field of the request that sets it): the template must know one of these options, if there are any."""
    continues: bool = False
    """Whether the answer goes on where the last message ends."""


@dataclass(frozen=True)
class ChatPrompt:
    tokens: Sequence[int]
    text: str
    family: Family
    parameters: Parameters


async def compute(call: Call, function: Callable[[Tokenizer], T]) -> T:
    """Run a function that needs the tokenizer, in a thread."""
    tokenizer = await call.api.tokenizer.get()
    async with call.api.bodies.decoding(call.owner):
        return await anyio.to_thread.run_sync(function, tokenizer)


async def chat_prompt(call: Call, chat: Chat) -> ChatPrompt:
    """Raises `InvalidRequest` for a chat that the template cannot render, or that is too long."""
    context = call.scheduler.base_model.max_context_length
    prompt = await compute(call, partial(render, chat=chat, context=context))
    check_length(prompt.tokens, call, "messages")
    return prompt


def check_length(tokens: Sequence[int], call: Call, field: str) -> None:
    context = call.scheduler.base_model.max_context_length
    if len(tokens) >= context:
        raise ContextExceeded(field, f"{len(tokens)} tokens", context)


def encoded_text(tokenizer: Tokenizer, text: str, framed: bool, context: int, field: str) -> list[int]:
    """A client's text as tokens. A text that no tokens of the context can hold is refused before it costs anything; one
    that turns out too long is refused here too, before the next one is encoded."""
    if len(text) > (bytes_max := context * tokenizer.token_bytes_max) or len(text.encode()) > bytes_max:
        raise ContextExceeded(field, f"{len(text)} characters", context)
    tokens = tokenizer.encode(text, framed)
    if len(tokens) > context:
        raise ContextExceeded(field, f"{len(tokens)} tokens", context)
    return tokens


def render(tokenizer: Tokenizer, chat: Chat, context: int) -> ChatPrompt:
    """context: how many tokens it has. Raises `InvalidRequest`."""
    template = tokenizer.template(bool(chat.tools))
    family = family_of(template.source, tokenizer.has)
    parameters = parameters_of(chat.tools)
    if chat.tools and not (family.has_tools and "tools" in template.variables):
        raise InvalidField("tools", "this model's chat template has no way to call tools that is known here.")
    _check_options(template, chat)
    messages = template_messages(
        chat.messages, takes_parts=template.takes_parts, knows_developer="developer" in template.source
    )
    text = template.render(
        messages,
        special_tokens=tokenizer.special_tokens,
        tools=list(chat.tools) or None,
        continues=chat.continues,
        options=chat.options,
    )
    return ChatPrompt(encoded_text(tokenizer, text, False, context, "messages"), text, family, parameters)


def _check_options(template: Template, chat: Chat) -> None:
    if taken := sorted(set(_TAKEN) & chat.options.keys()):
        raise InvalidField(f"chat_template_kwargs.{taken[0]}", "the template gets it from the request's own fields.")
    for option, field_name in chat.required:
        if option not in template.variables:
            raise InvalidField(field_name, f"this model's chat template has no {option}.")
