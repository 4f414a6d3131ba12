"""POST /messages and /messages/count_tokens, as Anthropic's clients send them."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct
from starlette.responses import Response

from tx_async.api.compatible import fields, sampling
from tx_async.api.compatible.answering import fed, new_choice, respond
from tx_async.api.compatible.blocks import chat_of, tool_choice
from tx_async.api.compatible.choices import Choice
from tx_async.api.compatible.constraints import Wish, grammar_of
from tx_async.api.compatible.event_stream import named_event
from tx_async.api.compatible.families import Family
from tx_async.api.compatible.fields import ContextExceeded, InvalidField
from tx_async.api.compatible.forms import anthropic_error
from tx_async.api.compatible.models import model_path
from tx_async.api.compatible.parsing import Event, ParsedCall, Reasoning, Text
from tx_async.api.compatible.prompts import Chat, ChatPrompt, chat_prompt
from tx_async.api.compatible.samples import PATIENCE_S, Samples
from tx_async.api.context import Call
from tx_async.wire import anthropic, openai


async def count_tokens(call: Call) -> anthropic.CountTokens:
    request = await fields.read(call, anthropic.CountTokensRequest)
    model_path(call, request.model)
    with _under_own_names():
        prompt = await chat_prompt(call, chat_of(request))
    return anthropic.CountTokens(input_tokens=len(prompt.tokens))


async def messages(call: Call) -> Response:
    request = await fields.read(call, anthropic.MessagesRequest)
    path = model_path(call, request.model)
    sampling.check_max_tokens("max_tokens", request.max_tokens)
    with _under_own_names():
        chat = chat_of(request)
        prompt = await chat_prompt(call, chat)
        is_one_call = request.tool_choice is not None and bool(request.tool_choice.disable_parallel_tool_use)
        grammar = await grammar_of(call, _wish(request, chat, several_calls=not is_one_call), prompt)
        operation = sampling.operation(call, prompt.tokens, _sampling(request), request.max_tokens, grammar=grammar)
    tokenizer = await call.api.tokenizer.get()
    parser = prompt.family.parser(prompt.parameters, with_tools=bool(prompt.parameters), prompt=prompt.text)
    choice = new_choice(call, tokenizer, operation, parser, prompt.family.marks, is_one_call)
    answer = MessageAnswer(request.model, prompt, choice)
    return await respond(call, Samples(call, [operation], path), answer, bool(request.stream))


def _wish(request: anthropic.MessagesRequest, chat: Chat, several_calls: bool) -> Wish:
    given = request.output_config.format if request.output_config else None
    form = None
    if given is not None:
        form = openai.ResponseFormat(type="json_schema", json_schema=openai.JsonSchemaFormat(schema=given.schema))
    wish = Wish(format=form, tools=chat.tools, choice=tool_choice(request, chat.tools), several_calls=several_calls)
    if chat.continues and not wish.is_free:
        raise InvalidField(
            "messages", "the last one must be the user's where output_config or tool_choice says the form."
        )
    return wish


@contextmanager
def _under_own_names() -> Generator[None]:
    """Messages and settings go OpenAI's way; errors name the fields that Anthropic's clients have sent."""
    try:
        yield
    except ContextExceeded:
        raise
    except InvalidField as error:
        name = error.field
        for theirs, own in _OWN_NAMES:
            name = re.sub(theirs, own, name)
        raise InvalidField(name, error.what, error.code) from None


_OWN_NAMES = (
    (r"^stop$", "stop_sequences"),
    (r"^response_format\.json_schema\.schema$", "output_config.format.schema"),
    (r"^(tools\[\d+\])\.function\.parameters$", r"\1.input_schema"),
    (r"^(tools\[\d+\])\.function(?=\.|$)", r"\1"),
)
"""(OpenAI's, Anthropic's) names of fields."""


def _sampling(request: anthropic.MessagesRequest) -> openai.SamplingFields:
    return openai.SamplingFields(
        model=request.model,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop=list(request.stop_sequences or ()),
    )


@dataclass
class MessageAnswer:
    model: str
    prompt: ChatPrompt
    choice: Choice
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")

    def failed(self, status: int, message: str) -> bytes:
        return named_event(anthropic_error(status, message))

    # ---- whole

    async def whole(self, samples: Samples) -> anthropic.AnsweredMessage:
        await fed(samples, lambda _prompt, _index: self.choice)
        events = [event for delta in self.choice.deltas for event in delta.events]
        return self._message(blocks_of(events, self.prompt.family), is_done=True)

    def _message(self, blocks: list[anthropic.AnsweredBlock], is_done: bool) -> anthropic.AnsweredMessage:
        stop = self._stop()
        return anthropic.AnsweredMessage(
            id=self.id,
            model=self.model,
            content=blocks,
            stop_reason=stop.stop_reason if is_done else None,
            stop_sequence=stop.stop_sequence if is_done else None,
            usage=self._usage(),
        )

    def _usage(self) -> anthropic.Usage:
        return anthropic.Usage(input_tokens=len(self.prompt.tokens), output_tokens=self.choice.num_tokens)

    def _stop(self) -> anthropic.StopDelta:
        reason: anthropic.StopReason = "end_turn"
        if self.choice.calls_tools:
            reason = "tool_use"
        elif self.choice.stop_reason != "stop":
            reason = "max_tokens"
        elif self.choice.stream.stop is not None:
            reason = "stop_sequence"
        stop = self.choice.stream.stop if reason == "stop_sequence" else None
        return anthropic.StopDelta(stop_reason=reason, stop_sequence=stop)

    # ---- streamed

    async def events(self, samples: Samples) -> AsyncIterator[bytes]:
        yield named_event(anthropic.MessageStart(message=self._message([], is_done=False)))
        yield named_event(anthropic.Ping())
        blocks = BlockEvents(self.prompt.family)
        async for arrived in samples.pieces(PATIENCE_S):
            if arrived is None:
                yield named_event(anthropic.Ping())
                continue
            for event in self.choice.feed(arrived[1]).events:
                for said in blocks.say(event):
                    yield named_event(said)
        for said in blocks.end():
            yield named_event(said)
        yield named_event(anthropic.MessageDelta(delta=self._stop(), usage=self._usage()))
        yield named_event(anthropic.MessageStop())


def new_block(event: Event, family: Family) -> anthropic.AnsweredBlock:
    """A new, empty block."""
    match event:
        case Text():
            return anthropic.AnsweredText(text="")
        case Reasoning():
            return anthropic.AnsweredThinking(thinking="")
        case ParsedCall():
            return anthropic.AnsweredToolUse(id=family.new_call_id("toolu_"), name=event.name, input={})


def blocks_of(events: list[Event], family: Family) -> list[anthropic.AnsweredBlock]:
    """The events as blocks: adjacent pieces of text, or of reasoning, join in one block."""
    blocks: list[anthropic.AnsweredBlock] = []
    for event in events:
        block = new_block(event, family)
        if not blocks or type(blocks[-1]) is not type(block) or isinstance(event, ParsedCall):
            blocks.append(block)
        match blocks[-1], event:
            case anthropic.AnsweredText() as last, Text(text):
                last.text += text
            case anthropic.AnsweredThinking() as last, Reasoning(text):
                last.thinking += text
            case anthropic.AnsweredToolUse() as last, ParsedCall(_, arguments):
                last.input = msgspec.json.decode(arguments)
            case _:
                raise AssertionError("a block grows only by events of its own kind")
    return blocks


class BlockEvents:
    """The blocks of a stream: each begins, grows and stops before the next one."""

    def __init__(self, family: Family):
        self._family = family
        self._num_blocks = 0
        #: the block that grows
        self._open: anthropic.AnsweredBlock | None = None

    def say(self, event: Event) -> Iterator[Struct]:
        block = new_block(event, self._family)
        if self._open is None or type(self._open) is not type(block) or isinstance(event, ParsedCall):
            yield from self.end()
            self._open = block
            yield anthropic.BlockStart(index=self._num_blocks, content_block=block)
        yield anthropic.BlockDelta(index=self._num_blocks, delta=_delta(event))

    def end(self) -> Iterator[Struct]:
        if self._open is None:
            return
        if isinstance(self._open, anthropic.AnsweredThinking):
            yield anthropic.BlockDelta(index=self._num_blocks, delta=anthropic.SignatureDelta())
        yield anthropic.BlockStop(index=self._num_blocks)
        self._num_blocks, self._open = self._num_blocks + 1, None


def _delta(event: Event) -> anthropic.ContentDelta:
    match event:
        case Text():
            return anthropic.TextDelta(text=event.text)
        case Reasoning():
            return anthropic.ThinkingDelta(thinking=event.text)
        case ParsedCall():
            return anthropic.InputJsonDelta(partial_json=event.arguments)
