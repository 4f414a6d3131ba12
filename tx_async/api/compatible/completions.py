"""POST /completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio.to_thread
import numpy as np
from msgspec import UNSET
from starlette.responses import Response

from tx_async.api.compatible import fields, sampling
from tx_async.api.compatible.answering import encoded, new_choice, respond, usage
from tx_async.api.compatible.choices import Choice, Delta, Scored, ScoredTokens
from tx_async.api.compatible.constraints import Wish, grammar_of
from tx_async.api.compatible.event_stream import COMMENT, DONE, data_event
from tx_async.api.compatible.fields import InvalidField
from tx_async.api.compatible.forms import openai_error
from tx_async.api.compatible.json_values import is_list
from tx_async.api.compatible.models import fingerprint, model_path
from tx_async.api.compatible.parsing import PlainParser
from tx_async.api.compatible.prompts import check_length, compute, encoded_text
from tx_async.api.compatible.samples import PATIENCE_S, Samples
from tx_async.api.compatible.text_stream import TextStream, name_of
from tx_async.api.compatible.tokenizer import Tokenizer
from tx_async.api.context import Call
from tx_async.wire import openai
from tx_async.wire.ids import new_id
from tx_async.wire.openai import CompletionRequest
from tx_async.wire.results import TopkLogprobs

MAX_TOKENS = 16
"""OpenAI's own default."""


async def completions(call: Call) -> Response:
    request = await fields.read(call, CompletionRequest)
    path = model_path(call, request.model)
    check(request)
    grammar = await grammar_of(call, Wish(format=request.response_format, grammar=request.grammar))
    given = prompts_of(request.prompt)
    _check_num_answers(len(given), request.n, call.api.config.sample_num_samples_max)
    context = call.scheduler.base_model.max_context_length
    prompts = await compute(call, partial(_tokens_of, prompts=given, context=context))
    operations = [_operation(call, request, tokens, grammar) for tokens in prompts]
    tokenizer = await call.api.tokenizer.get()
    choices = [
        [new_choice(call, tokenizer, operation, PlainParser()) for _ in range(operation.num_samples)]
        for operation in operations
    ]
    answer = CompletionAnswer(request, prompts, tokenizer, choices, fingerprint(call), int(call.api.clock.now()))
    return await respond(call, Samples(call, operations, path), answer, bool(request.stream))


def check(request: CompletionRequest) -> None:
    sampling.check_stream_options(request)
    sampling.check_top_logprobs("logprobs", request.logprobs)
    if request.max_tokens == 0 and not request.echo:
        raise InvalidField("max_tokens", "it may be 0 only with echo.")
    sampling.check_max_tokens("max_tokens", request.max_tokens or None, f", or absent, which means {MAX_TOKENS}")
    if request.best_of not in (None, request.n or 1):
        raise InvalidField("best_of", f"it is {request.best_of}; here it can only be n, so leave it out.")


def _check_num_answers(num_prompts: int, n: int | None, limit: int) -> None:
    if (n or 1) > limit:
        raise InvalidField("n", f"it is {n}; allowed are 1 to {limit}.")
    if num_prompts * (n or 1) > limit:
        each = f" with {n} answers each" if (n or 1) > 1 else ""
        raise InvalidField("prompt", f"{num_prompts} prompts{each} are too many; allowed are {limit} answers.")


def prompts_of(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts in whichever of the four forms was sent."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(entry) is int for entry in prompt):
        return [prompt]
    if not prompt or not all(isinstance(entry, str) or _is_tokens(entry) for entry in prompt):
        raise InvalidField("prompt", "it must be a text, a list of texts, token ids, or a list of lists of token ids.")
    return prompt


def _is_tokens(entry: Any) -> bool:
    return is_list(entry) and all(type(token) is int for token in entry)


def _tokens_of(tokenizer: Tokenizer, prompts: list[str | list[int]], context: int) -> list[list[int]]:
    found: list[list[int]] = []
    for entry in prompts:
        tokens = encoded_text(tokenizer, entry, True, context, "prompt") if isinstance(entry, str) else entry
        if not tokens:
            raise InvalidField("prompt", "it is empty. Send at least one token.")
        if not (min(tokens) >= 0 and max(tokens) < 2**31):
            raise InvalidField("prompt", "it has a number that is not a token id.")
        found.append(tokens)
    return found


def _operation(call: Call, request: CompletionRequest, tokens: list[int], grammar: str) -> Any:
    """With echo, the log-probabilities of the prompt are part of the answer."""
    scores = bool(request.echo) and request.logprobs is not None
    if not scores:
        check_length(tokens, call, "prompt")
    max_tokens = MAX_TOKENS if request.max_tokens is None else request.max_tokens or 1
    return sampling.operation(
        call,
        tokens,
        request,
        max_tokens,
        topk_sample_logprobs=request.logprobs or 0,
        prompt_logprobs=scores,
        grammar=grammar,
        topk_prompt_logprobs=(request.logprobs or 0) if scores else 0,
    )


def text_of_prompt(tokenizer: Tokenizer, tokens: list[int], given: str | list[int]) -> tuple[str, list[int]]:
    """The text that echo shows, special tokens included, and where each token begins in it. A text stays as it was
    given, without tokens that the tokenizer puts before it."""
    text, offsets = TextStream(tokenizer, shown=set(tokenizer.special.values())).feed(tokens, "length")
    if isinstance(given, list):
        return text, offsets
    before = max(text.find(given), 0)
    return given, [min(max(offset - before, 0), len(given)) for offset in offsets]


@dataclass
class CompletionAnswer:
    request: CompletionRequest
    prompts: list[list[int]]
    tokenizer: Tokenizer
    #: by prompt, then by sample
    choices: list[list[Choice]]
    fingerprint: str
    created: int
    id: str = field(default_factory=lambda: new_id("cmpl"))
    #: the scored tokens of each prompt, where they were asked for
    scored: dict[int, ScoredTokens] = field(default_factory=dict[int, ScoredTokens])
    #: the text of each prompt, and where its tokens begin in it
    prompt_texts: dict[int, tuple[str, list[int]]] = field(default_factory=dict[int, tuple[str, list[int]]])

    def failed(self, status: int, message: str) -> bytes:
        return data_event(openai_error(status, message))

    @property
    def _scores_prompt(self) -> bool:
        return bool(self.request.echo) and self.request.logprobs is not None

    # ---- whole

    async def whole(self, samples: Samples) -> openai.Completion:
        async for _ in self._deltas(samples, None):
            pass
        choices = [choice async for choice in self._whole_choices()]
        return self._completion(choices, self._usage())

    async def _deltas(self, samples: Samples, timeout_s: float | None) -> AsyncIterator[tuple[int, int, Delta] | None]:
        """(prompt, sample, its delta)"""
        async for arrived in samples.pieces(timeout_s):
            if arrived is None:
                yield None
                continue
            prompt, piece = arrived
            choice = self.choices[prompt][piece.index]
            delta = choice.feed(piece)
            choice.deltas.append(delta)
            if piece.prompt:
                self.scored[prompt] = await anyio.to_thread.run_sync(self._prompt_scored, prompt, piece.prompt)
            yield prompt, piece.index, delta

    async def _whole_choices(self) -> AsyncIterator[openai.CompletionChoice]:
        for prompt, choices in enumerate(self.choices):
            for index, choice in enumerate(choices):
                yield await encoded(partial(self._whole_choice, prompt, index, choice))

    def _whole_choice(self, prompt: int, index: int, choice: Choice) -> openai.CompletionChoice:
        text = "" if self.request.max_tokens == 0 else "".join(delta.text for delta in choice.deltas)
        scored = [entry for delta in choice.deltas for entry in delta.scored] if self.request.max_tokens != 0 else []
        before = self._said(prompt)[0] if self.request.echo else ""
        made = self._choice(prompt, index, before + text, [*self.scored.get(prompt, ()), *scored], len(before))
        made.token_ids = [entry.token for entry in scored] if self.request.return_token_ids else UNSET
        made.prompt_token_ids = self.prompts[prompt] if self.request.return_token_ids else UNSET
        made.finish_reason = "length" if self.request.max_tokens == 0 else choice.stop_reason
        return made

    def _choice(
        self, prompt: int, index: int, text: str, scored: Iterable[Scored], begin: int
    ) -> openai.CompletionChoice:
        """begin: where the answer begins in the text."""
        logprobs = None if self.request.logprobs is None else self._logprobs(scored, begin)
        return openai.CompletionChoice(index=prompt * (self.request.n or 1) + index, text=text, logprobs=logprobs)

    def _logprobs(self, tokens: Iterable[Scored], begin: int) -> openai.Logprobs:
        named, scored = partial(name_of, self.tokenizer), list(tokens)
        return openai.Logprobs(
            tokens=[named(entry.token) for entry in scored],
            token_logprobs=[None if np.isnan(entry.logprob) else entry.logprob for entry in scored],
            top_logprobs=[self._likely(entry) for entry in scored] if self.request.logprobs else None,
            text_offset=[entry.offset if entry.is_prompt else entry.offset + begin for entry in scored],
        )

    def _likely(self, entry: Scored) -> dict[str, float] | None:
        """The likeliest tokens, and the token itself. Of tokens with the same text the likeliest counts."""
        if np.isnan(entry.logprob):
            return None
        found: dict[str, float] = {}
        for token, value in (*entry.likely, (entry.token, entry.logprob)):
            name = name_of(self.tokenizer, token)
            found[name] = max(value, found.get(name, value))
        return found

    # ---- the prompt

    def _said(self, prompt: int) -> tuple[str, list[int]]:
        if prompt not in self.prompt_texts:
            given = prompts_of(self.request.prompt)[prompt]
            self.prompt_texts[prompt] = text_of_prompt(self.tokenizer, self.prompts[prompt], given)
        return self.prompt_texts[prompt]

    def _prompt_scored(self, prompt: int, said: dict[str, Any]) -> ScoredTokens:
        tokens, (_, offsets) = np.array(self.prompts[prompt], "<i4").tobytes(), self._said(prompt)
        topk: TopkLogprobs | None = said.get("topk_prompt_logprobs")
        return ScoredTokens(tokens, said["prompt_logprobs"], topk, offsets, is_prompt=True)

    # ---- streamed

    async def events(self, samples: Samples) -> AsyncIterator[bytes]:
        if self._scores_prompt:  # known with the last piece, like everything else
            async for event in self._events_at_the_end(samples):
                yield event
        else:
            async for event in self._events_as_they_come(samples):
                yield event
        if sampling.includes_usage(self.request):
            yield data_event(self._completion([], self._usage()))
        yield DONE

    async def _events_at_the_end(self, samples: Samples) -> AsyncIterator[bytes]:
        async for arrived in self._deltas(samples, PATIENCE_S):
            if arrived is None:
                yield COMMENT
        async for choice in self._whole_choices():
            yield data_event(self._completion([choice], None))

    async def _events_as_they_come(self, samples: Samples) -> AsyncIterator[bytes]:
        if self.request.echo:
            for prompt, choices in enumerate(self.choices):
                for index in range(len(choices)):
                    yield self._event(self._choice(prompt, index, self._said(prompt)[0], (), 0))
        async for arrived in self._deltas(samples, PATIENCE_S):
            if arrived is None:
                yield COMMENT
            elif (made := self._piece(*arrived)) is not None:
                yield self._event(made)

    def _piece(self, prompt: int, index: int, delta: Delta) -> openai.CompletionChoice | None:
        if self.request.max_tokens == 0:
            delta = Delta(ScoredTokens(), "", [], "length" if delta.stop_reason else None)
        self.choices[prompt][index].deltas.clear()
        begin = len(self._said(prompt)[0]) if self.request.echo else 0
        made = self._choice(prompt, index, delta.text, delta.scored, begin)
        made.token_ids = delta.scored.tokens if self.request.return_token_ids else UNSET
        made.finish_reason = delta.stop_reason
        says = delta.text or delta.stop_reason or (len(delta.scored) and (made.logprobs or made.token_ids))
        return made if says else None

    def _event(self, choice: openai.CompletionChoice) -> bytes:
        return data_event(self._completion([choice], None))

    def _usage(self) -> openai.CompletionUsage:
        used = usage(sum(map(len, self.prompts)), [choice for choices in self.choices for choice in choices])
        if self.request.max_tokens == 0:  # the engine samples one at least, which nobody sees
            used.completion_tokens, used.total_tokens = 0, used.prompt_tokens
        return used

    def _completion(
        self, choices: list[openai.CompletionChoice], used: openai.CompletionUsage | None
    ) -> openai.Completion:
        return openai.Completion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=used if used is not None or sampling.includes_usage(self.request) else UNSET,
        )
