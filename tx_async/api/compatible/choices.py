"""One answer as it grows: its tokens, their log-probabilities, its text, and the events parsed from the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tx_async.api.compatible.parsing import Event, ParsedCall, Parser
from tx_async.api.compatible.text_stream import TextStream
from tx_async.scheduler.interface import LivePiece
from tx_async.wire.results import EMPTY_LOGPROB, TopkLogprobs

Likely = list[tuple[int, float]]
"""(token, log-probability), likeliest first."""


@dataclass
class Scored:
    """A token with its log-probability, the likeliest ones in its place, and where it begins in the text."""

    token: int
    logprob: float
    likely: Likely
    offset: int
    is_prompt: bool = False


@dataclass(frozen=True)
class ScoredTokens:
    """Some `Scored`, which are made when they are looked at. An answer may have a million of the likeliest tokens, and
    Python's garbage collector would stop everybody while it goes over them."""

    token_ids: bytes = b""
    """int32"""
    logprobs: bytes = b""
    """fp32"""
    topk: TopkLogprobs | None = None
    offsets: Sequence[int] = ()
    is_prompt: bool = False

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Scored]:
        logprobs: list[float] = np.frombuffer(self.logprobs, "<f4").tolist()
        rows = rows_of(self.topk, len(self))
        for entry in zip(self.tokens, logprobs, rows, self.offsets, strict=True):
            yield Scored(*entry, is_prompt=self.is_prompt)

    @property
    def tokens(self) -> list[int]:
        return np.frombuffer(self.token_ids, "<i4").tolist()


@dataclass
class Delta:
    """The part that one piece added to an answer."""

    scored: ScoredTokens
    text: str
    events: list[Event]
    stop_reason: Literal["stop", "length"] | None


@dataclass
class Choice:
    stream: TextStream
    parser: Parser
    is_one_call: bool = False
    """Only the first call counts (`parallel_tool_calls` is false)."""
    #: calls so far
    num_calls: int = 0
    #: tokens so far
    num_tokens: int = 0
    stop_reason: Literal["stop", "length"] | None = None
    #: how many tokens of the prompt were in the cache
    cached_tokens: int = 0
    #: of the whole answer
    deltas: list[Delta] = field(default_factory=list[Delta])

    def feed(self, piece: LivePiece) -> Delta:
        tokens: list[int] = np.frombuffer(piece.tokens, "<i4").tolist()
        text, offsets = self.stream.feed(tokens, piece.stop_reason)
        events = list(self.parser.feed(text))
        if piece.stop_reason is not None:
            events += self.parser.finish()
            self.stop_reason, self.cached_tokens = piece.stop_reason, piece.cached_tokens
        self.num_tokens += len(tokens)
        scored = ScoredTokens(piece.tokens, piece.logprobs, piece.topk, offsets)
        return Delta(scored, text, [event for event in events if self._counts(event)], piece.stop_reason)

    def _counts(self, event: Event) -> bool:
        self.num_calls += isinstance(event, ParsedCall)
        return not (isinstance(event, ParsedCall) and self.is_one_call and self.num_calls > 1)

    @property
    def calls_tools(self) -> bool:
        """Whether it ended, rather than being cut off, with calls in it."""
        return self.num_calls > 0 and self.stop_reason == "stop"


def rows_of(topk: TopkLogprobs | None, length: int) -> Iterator[Likely]:
    if topk is None or not topk.k:
        yield from ([] for _ in range(length))
        return
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(-1, topk.k)
    values = np.frombuffer(topk.logprobs, "<f4").reshape(-1, topk.k)
    for row in zip(ids, values, strict=True):
        cells = zip(*(numbers.tolist() for numbers in row), strict=True)
        yield [(token, value) for token, value in cells if value > EMPTY_LOGPROB]
