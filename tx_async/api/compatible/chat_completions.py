"""POST /chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from msgspec import UNSET
from starlette.responses import Response

from tx_async.api.compatible import fields, sampling
from tx_async.api.compatible.answering import chat_logprobs, encoded, fed, new_choice, respond, usage
from tx_async.api.compatible.choices import Choice, Delta, Scored
from tx_async.api.compatible.constraints import Wish, grammar_of, openai_choice
from tx_async.api.compatible.event_stream import COMMENT, DONE, data_event
from tx_async.api.compatible.fields import InvalidField
from tx_async.api.compatible.forms import openai_error
from tx_async.api.compatible.models import fingerprint, model_path
from tx_async.api.compatible.parsing import Event, ParsedCall, Reasoning, Text
from tx_async.api.compatible.prompts import Chat, ChatPrompt, chat_prompt
from tx_async.api.compatible.samples import PATIENCE_S, Samples
from tx_async.api.compatible.tokenizer import Tokenizer
from tx_async.api.context import Call
from tx_async.wire import openai
from tx_async.wire.ids import new_id
from tx_async.wire.openai import AnsweredChatMessage, ChatRequest

EFFORT = "reasoning_effort"


async def chat_completions(call: Call) -> Response:
    request = await fields.read(call, ChatRequest)
    path = model_path(call, request.model)
    num_likely = check(request)
    chat = chat_of(request)
    prompt = await chat_prompt(call, chat)
    grammar = await grammar_of(call, wish_of(request, chat), prompt)
    max_tokens = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    operation = sampling.operation(
        call, prompt.tokens, request, max_tokens, topk_sample_logprobs=num_likely, grammar=grammar
    )
    tokenizer = await call.api.tokenizer.get()
    choices = [
        new_choice(
            call,
            tokenizer,
            operation,
            prompt.family.parser(prompt.parameters, with_tools=bool(prompt.parameters), prompt=prompt.text),
            prompt.family.marks,
            is_one_call=request.parallel_tool_calls is False,
        )
        for _ in range(operation.num_samples)
    ]
    answer = ChatAnswer(request, prompt, tokenizer, choices, fingerprint(call), int(call.api.clock.now()))
    return await respond(call, Samples(call, [operation], path), answer, bool(request.stream))


def check(request: ChatRequest) -> int:
    """How many of the likeliest tokens it wants with each token. Raises `InvalidField` for fields that contradict each
    other."""
    sampling.check_stream_options(request)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidField("max_tokens", "it differs from max_completion_tokens. Send one of them.")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidField("top_logprobs", "it goes with logprobs: true only.")
    for name in ("max_tokens", "max_completion_tokens"):
        sampling.check_max_tokens(name, getattr(request, name), ", or absent for as many as fit")
    return sampling.check_top_logprobs("top_logprobs", request.top_logprobs)


def chat_of(request: ChatRequest) -> Chat:
    options, required = dict(request.chat_template_kwargs or {}), ()
    if request.reasoning_effort is not None:
        options[EFFORT], required = request.reasoning_effort, ((EFFORT, EFFORT),)
    tools = () if request.tool_choice == "none" else tuple(request.tools or ())
    return Chat(request.messages, tools, options, required)


def wish_of(request: ChatRequest, chat: Chat) -> Wish:
    return Wish(
        format=request.response_format,
        grammar=request.grammar,
        tools=chat.tools,
        choice=openai_choice(request.tool_choice, request.tools or ()),
        several_calls=request.parallel_tool_calls is not False,
    )


@dataclass
class ChatAnswer:
    request: ChatRequest
    prompt: ChatPrompt
    tokenizer: Tokenizer
    choices: list[Choice]
    fingerprint: str
    created: int
    id: str = field(default_factory=lambda: new_id("chatcmpl"))

    def failed(self, status: int, message: str) -> bytes:
        return data_event(openai_error(status, message))

    # ---- whole

    async def whole(self, samples: Samples) -> openai.ChatCompletion:
        await fed(samples, lambda _prompt, index: self.choices[index])
        return openai.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            system_fingerprint=self.fingerprint,
            choices=[await encoded(partial(self._choice, index, choice)) for index, choice in enumerate(self.choices)],
            usage=self._usage(),
            prompt_token_ids=list(self.prompt.tokens) if self.request.return_token_ids else UNSET,
        )

    def _choice(self, index: int, choice: Choice) -> openai.ChatChoice:
        scored = [entry for delta in choice.deltas for entry in delta.scored]
        return openai.ChatChoice(
            index=index,
            message=self._message([event for delta in choice.deltas for event in delta.events]),
            logprobs=self._logprobs(scored),
            finish_reason=_finish_reason(choice),
            token_ids=[entry.token for entry in scored] if self.request.return_token_ids else UNSET,
        )

    def _message(self, events: list[Event]) -> AnsweredChatMessage:
        text = "".join(event.text for event in events if isinstance(event, Text))
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        calls = [self._call(event) for event in events if isinstance(event, ParsedCall)]
        return AnsweredChatMessage(
            role="assistant",
            content=text or (None if calls else ""),
            refusal=None,
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )

    def _call(self, call: ParsedCall) -> openai.AnsweredCall:
        function = openai.AnsweredFunction(name=call.name, arguments=call.arguments)
        return openai.AnsweredCall(id=self.prompt.family.new_call_id("call_"), function=function)

    def _usage(self) -> openai.CompletionUsage:
        return usage(len(self.prompt.tokens), self.choices)

    def _logprobs(self, scored: Iterable[Scored]) -> openai.ChatLogprobs | None:
        return chat_logprobs(self.tokenizer, scored) if self.request.logprobs else None

    # ---- streamed

    async def events(self, samples: Samples) -> AsyncIterator[bytes]:
        for index in range(len(self.choices)):
            first = openai.ChunkChoice(index=index, delta=AnsweredChatMessage(role="assistant", content=""))
            yield self._chunk(first, has_prompt=index == 0)
        async for arrived in samples.pieces(PATIENCE_S):
            if arrived is None:
                yield COMMENT
                continue
            index, choice = arrived[1].index, self.choices[arrived[1].index]
            num_calls = choice.num_calls
            delta = choice.feed(arrived[1])
            for chunk in self._chunks(index, delta, num_calls):
                yield self._chunk(chunk)
            if delta.stop_reason is not None:
                reason = _finish_reason(choice)
                yield self._chunk(openai.ChunkChoice(index=index, delta=AnsweredChatMessage(), finish_reason=reason))
        if sampling.includes_usage(self.request):
            yield data_event(self._chunk_of([], self._usage()))
        yield DONE

    def _chunks(self, index: int, delta: Delta, num_calls: int) -> Iterator[openai.ChunkChoice]:
        """num_calls: calls before this delta. Log-probabilities go with the first chunk."""
        messages: list[AnsweredChatMessage] = []
        for event in delta.events:
            messages.append(self._delta(event, num_calls))
            num_calls += isinstance(event, ParsedCall)
        if not messages and len(delta.scored) and (self.request.logprobs or self.request.return_token_ids):
            messages.append(AnsweredChatMessage())
        for i, message in enumerate(messages):
            chunk = openai.ChunkChoice(index=index, delta=message)
            if i == 0:
                chunk.logprobs = self._logprobs(delta.scored)
                chunk.token_ids = delta.scored.tokens if self.request.return_token_ids else UNSET
            yield chunk

    def _delta(self, event: Event, num_calls: int) -> AnsweredChatMessage:
        match event:
            case Text():
                return AnsweredChatMessage(content=event.text)
            case Reasoning():
                return AnsweredChatMessage(reasoning_content=event.text)
            case ParsedCall():
                call = self._call(event)
                call.index = num_calls
                return AnsweredChatMessage(tool_calls=[call])

    def _chunk(self, choice: openai.ChunkChoice, has_prompt: bool = False) -> bytes:
        chunk = self._chunk_of([choice], None)
        if has_prompt and self.request.return_token_ids:
            chunk.prompt_token_ids = list(self.prompt.tokens)
        return data_event(chunk)

    def _chunk_of(self, choices: list[openai.ChunkChoice], used: openai.CompletionUsage | None) -> openai.ChatChunk:
        return openai.ChatChunk(
            id=self.id,
            created=self.created,
            model=self.request.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=used if sampling.includes_usage(self.request) else UNSET,
        )


def _finish_reason(choice: Choice) -> openai.FinishReason:
    return "tool_calls" if choice.calls_tools else choice.stop_reason or "length"
