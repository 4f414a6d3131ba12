"""Takes an answer's text apart as it comes: the answer proper, the reasoning, and the calls of tools.

A parser is fed pieces of text and gives out events. Text goes through at once unless a marker may begin in it; a call
is given out when it is complete. Text that only looks like a call stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from msgspec import Struct

WHITESPACE = " \t\r\n"
_State = Literal["text", "reasoning", "block"]


class Text(Struct, frozen=True):
    text: str


class Reasoning(Struct, frozen=True):
    text: str


class ParsedCall(Struct, frozen=True):
    name: str
    arguments: str
    """A JSON object."""


Event = Text | Reasoning | ParsedCall
Parameters = Mapping[str, Mapping[str, Any]]
"""The name of a tool -> the JSON Schemas of its parameters by name."""
Read = Callable[[str, Parameters], list[ParsedCall] | None]
"""The inside of a block -> its calls; None where it is no call."""


def read_nothing(inside: str, parameters: Parameters) -> list[ParsedCall] | None:
    return None


class Parser(Protocol):
    def feed(self, text: str) -> Iterator[Event]: ...

    def finish(self) -> Iterator[Event]:
        """The events that were held back."""
        ...


@dataclass(frozen=True)
class Tags:
    """How a family marks reasoning and calls in its text."""

    thinks: tuple[str, str] | None = None
    calls: tuple[str, str] | None = None
    """The second tag is "" where calls go on to the end."""
    read: Read = read_nothing


class PlainParser:
    """The parser for completions, and for models without markers."""

    def feed(self, text: str) -> Iterator[Event]:
        if text:
            yield Text(text)

    def finish(self) -> Iterator[Event]:
        return iter(())


class Trimmed:
    """A run of text without the characters to trim at its beginning and end."""

    def __init__(self, before: str = "", after: str = ""):
        self._before, self._after = before, after
        #: held back: may be the text's end
        self._held = ""

    def feed(self, text: str) -> str:
        if self._before and not (text := text.lstrip(self._before)):
            return ""
        if text:
            self._before = ""
        text = self._held + text
        given = text.rstrip(self._after) if self._after else text
        self._held = text[len(given) :]
        return given

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


class TagParser:
    """Reasoning between two tags, then text, with calls in blocks between two other tags."""

    def __init__(self, tags: Tags, parameters: Parameters, *, with_tools: bool, in_reasoning: bool = False):
        self._tags = tags
        self._parameters = parameters
        self._calls = tags.calls if with_tools else None
        self._buffer = ""
        self._state: _State = "reasoning" if in_reasoning and tags.thinks else "text"
        self._reasoning = Trimmed("\n", "\n")
        self._text = self._new_text("")
        self._num_calls = 0

    def _new_text(self, before: str) -> Trimmed:
        return Trimmed(before, WHITESPACE if self._calls else "")

    def feed(self, text: str) -> Iterator[Event]:
        self._buffer += text
        goes_on = True
        while goes_on:
            state = self._state
            yield from getattr(self, f"_read_{state}")()
            goes_on = state != self._state

    def _read_text(self) -> Iterator[Event]:
        openers: dict[str, _State] = {}
        if self._tags.thinks:
            openers[self._tags.thinks[0]] = "reasoning"
        if self._calls:
            openers[self._calls[0]] = "block"
        before, opener = self._until(list(openers))
        yield from self._say(before)
        if opener:
            self._state = openers[opener]
            if self._state == "block":
                self._text = self._new_text(WHITESPACE)  # text before the block is dropped with it
            else:
                self._reasoning = Trimmed("\n", "\n")

    def _read_reasoning(self) -> Iterator[Event]:
        assert self._tags.thinks
        before, closer = self._until([self._tags.thinks[1]])
        if given := self._reasoning.feed(before):
            yield Reasoning(given)
        if closer:
            self._state, self._text = "text", self._new_text("\n")

    def _read_block(self) -> Iterator[Event]:
        assert self._calls
        inside, found, rest = self._buffer.partition(self._calls[1]) if self._calls[1] else (self._buffer, "", "")
        if found:
            self._buffer, self._state = rest, "text"
            yield from self._call(inside, found)

    def _call(self, inside: str, closer: str) -> Iterator[Event]:
        assert self._calls
        calls = self._tags.read(inside, self._parameters)
        if calls is None:
            self._text = self._new_text("")
            yield from self._say(self._calls[0] + inside + closer)
        else:
            self._num_calls += len(calls)
            yield from calls

    def _say(self, text: str) -> Iterator[Event]:
        if given := self._text.feed(text):
            yield Text(given)

    def _until(self, marks: list[str]) -> tuple[str, str]:
        """(what comes before the first of the marks, that mark or ""); a possible beginning of a mark is held back."""
        found = [(place, mark) for mark in marks if (place := self._buffer.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            before, self._buffer = self._buffer[:place], self._buffer[place + len(mark) :]
            return before, mark
        kept = overlap(self._buffer, marks)
        before, self._buffer = self._buffer[: len(self._buffer) - kept], self._buffer[len(self._buffer) - kept :]
        return before, ""

    def finish(self) -> Iterator[Event]:
        rest, self._buffer = self._buffer, ""
        match self._state:
            case "block":
                yield from self._call(rest, "")
            case "reasoning":
                if given := self._reasoning.feed(rest):
                    yield Reasoning(given)
            case "text":
                yield from self._say(rest)
        if not self._num_calls and (held := self._text.rest()):
            yield Text(held)


def overlap(text: str, marks: list[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the marks."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
