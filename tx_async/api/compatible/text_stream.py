"""A sequence's tokens as text, as they come: only whole characters, no part of a stop string, no special tokens."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tx_async.api.compatible.tokenizer import Tokenizer


class _HeldText(NamedTuple):
    text: str
    is_hidden: bool


class TextStream:
    """The text of one sample. Feed it tokens; it gives out the text that is certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        shown: Collection[str] = (),
        ends: Collection[int] = (),
    ):
        """shown: special tokens that somebody wants to see. ends: tokens that end a sample, never shown at its end."""
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._hidden = {token for token, name in tokenizer.special.items() if name not in shown}
        self._ends = frozenset(ends)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        #: decoded, but a stop string may begin in it
        self._held: list[_HeldText] = []
        #: how many visible characters were decoded so far, held ones included
        self._num_characters = 0
        self.stop: str | None = None
        """The stop string that ended it; no text comes after one."""

    def feed(self, tokens: Sequence[int], stop_reason: str | None = None) -> tuple[str, list[int]]:
        """(new text, where in the whole text each token begins). stop_reason: set with the last tokens."""
        offsets: list[int] = []
        for i, token in enumerate(tokens):
            offsets.append(self._num_characters)
            is_end = stop_reason == "stop" and i == len(tokens) - 1 and token in self._ends
            self._add(token, is_hidden=is_end or token in self._hidden)
        if stop_reason is not None:
            self._hold(self._decoder.decode(b"", final=True), is_hidden=False)
        return self._take(is_last=stop_reason is not None), offsets

    def _add(self, token: int, is_hidden: bool) -> None:
        data = self._tokenizer.bytes_of(token)
        if not is_hidden and token not in self._tokenizer.special:
            self._hold(self._decoder.decode(data), is_hidden=False)
            return
        self._hold(self._decoder.decode(b"", final=True), is_hidden=False)
        self._decoder.reset()
        self._hold(data.decode("utf-8", "replace"), is_hidden)

    def _hold(self, text: str, is_hidden: bool) -> None:
        if text and self.stop is None:
            self._held.append(_HeldText(text, is_hidden))
            self._num_characters += 0 if is_hidden else len(text)

    def _take(self, is_last: bool) -> str:
        text = "".join(run.text for run in self._held)
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            length, self.stop = min(places)
            given = self._give(length)
            self._held.clear()
            return given
        return self._give(len(text) if is_last else len(text) - self._num_uncertain(text))

    def _num_uncertain(self, text: str) -> int:
        """How many characters at its end may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def _give(self, length: int) -> str:
        """The visible part of that many held characters."""
        visible = ""
        while length and self._held:
            run = self._held.pop(0)
            if len(run.text) > length:
                self._held.insert(0, _HeldText(run.text[length:], run.is_hidden))
            visible += "" if run.is_hidden else run.text[:length]
            length -= min(length, len(run.text))
        return visible


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's name in log-probabilities: its text, its bytes where it is only part of a character, or its number
    where it has neither (a model's vocabulary may be padded)."""
    data = tokenizer.bytes_of(token)
    if not data:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
