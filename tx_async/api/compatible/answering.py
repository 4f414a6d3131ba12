"""Sends an answer, whole or as a stream, with what both have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol, TypeVar, cast

import anyio.to_thread
import msgspec
from msgspec import Struct
from starlette.responses import Response

from tx_async.api.compatible import event_stream
from tx_async.api.compatible.choices import Choice, Scored
from tx_async.api.compatible.parsing import Parser
from tx_async.api.compatible.samples import Samples, unless_gone
from tx_async.api.compatible.text_stream import TextStream, name_of
from tx_async.api.compatible.tokenizer import Tokenizer
from tx_async.api.context import Call
from tx_async.api.errors import json_response
from tx_async.wire import openai
from tx_async.wire.operations import Sample

T = TypeVar("T")


class ApiAnswer(Protocol):
    """The answer to one request, in one API's form."""

    def failed(self, status: int, message: str) -> bytes:
        """The event that ends a stream which failed."""
        ...

    async def whole(self, samples: Samples) -> Struct: ...

    def events(self, samples: Samples) -> AsyncIterator[bytes]: ...


async def respond(call: Call, samples: Samples, answer: ApiAnswer, is_streamed: bool) -> Response:
    """Send the answer. The samples end with the response, however that ends."""
    is_taken = False
    try:
        if not is_streamed:
            return json_response(await unless_gone(call.request, answer.whole(samples)))
        await unless_gone(call.request, samples.begin())
        is_taken = True
        return event_stream.EventStream(samples, answer.events(samples), answer.failed, call.api.redact)
    finally:
        if not is_taken:
            await samples.close()


async def encoded(make: Callable[[], T]) -> T:
    """One choice of a whole answer, made and encoded in a thread: with log-probabilities it may have megabytes, and all
    choices at once would hold up everybody. What comes is its JSON, which takes its place in the answer."""
    return cast(T, await anyio.to_thread.run_sync(lambda: msgspec.Raw(msgspec.json.encode(make()))))


def new_choice(
    call: Call,
    tokenizer: Tokenizer,
    operation: Sample,
    parser: Parser,
    shown: Sequence[str] = (),
    is_one_call: bool = False,
) -> Choice:
    """shown: special tokens that the parser wants to see."""
    ends = {*operation.stop_token_ids, *(call.scheduler.base_model.eos_token_ids if operation.use_eos else ())}
    return Choice(TextStream(tokenizer, operation.stop_strings, shown, ends), parser, is_one_call)


async def fed(samples: Samples, choice_of: Callable[[int, int], Choice]) -> None:
    """Feed all pieces to their choices, to the end."""
    async for arrived in samples.pieces():
        if arrived is not None:
            prompt, piece = arrived
            choice = choice_of(prompt, piece.index)
            choice.deltas.append(choice.feed(piece))


def usage(num_prompt_tokens: int, choices: Sequence[Choice]) -> openai.CompletionUsage:
    num_tokens = sum(choice.num_tokens for choice in choices)
    cached = max((choice.cached_tokens for choice in choices), default=0)
    return openai.CompletionUsage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=openai.PromptTokensDetails(cached_tokens=cached),
    )


def chat_logprobs(tokenizer: Tokenizer, scored: Iterable[Scored]) -> openai.ChatLogprobs:
    return openai.ChatLogprobs(
        content=[
            openai.TokenLogprob(
                token=name_of(tokenizer, entry.token),
                logprob=entry.logprob,
                bytes=list(tokenizer.bytes_of(entry.token)),
                top_logprobs=[_top(tokenizer, *cell) for cell in entry.likely],
            )
            for entry in scored
        ]
    )


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> openai.TopLogprob:
    return openai.TopLogprob(token=name_of(tokenizer, token), logprob=logprob, bytes=list(tokenizer.bytes_of(token)))
