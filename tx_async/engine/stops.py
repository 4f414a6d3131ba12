"""Stop strings, which are found in the text as tokens arrive, across token boundaries and inside multi-byte characters.

A sequence stops after the first token with which the decoded completion contains one of its strings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tx_async.errors import InvalidRequest

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]

CONTEXT_TOKENS = 4
"""How many tokens of the prompt the first decoded one may merge with (a leading space, for example)."""
INCOMPLETE = "\ufffd"


class StopStrings:
    """Watches one completion. It decodes again only as many of the last tokens as a stop string can reach back over."""

    def __init__(self, strings: Sequence[str], decode: Decode, prompt: Sequence[int]):
        self._strings = strings
        self._decode = decode
        #: how many tokens surely cover a stop string: a token has at least one byte, a character at most four
        self._reach = 4 * max(map(len, strings)) + 4
        #: a few tokens of the prompt, then the completion's last `_reach` to 2 * `_reach`
        self._window = [int(token) for token in prompt[-CONTEXT_TOKENS:]]
        #: how many characters of the window's text are the prompt's
        self._skip = len(decode(self._window).rstrip(INCOMPLETE))
        #: the first tokens of the window, in which no string may end
        self._num_closed = 0
        #: how many characters their text has
        self._closed = 0

    def pass_over(self, tokens: Sequence[int]) -> None:
        """Append tokens with which no string ends the completion."""
        if not tokens:
            return
        self._window.extend(tokens)
        self._close(len(self._window))
        self._trim()

    def feed(self, tokens: Sequence[int]) -> int | None:
        """Append tokens; -> how many of them it takes to complete a stop string, or None."""
        if not tokens:
            return None
        if self._completes(tokens):
            return next(n for n in range(1, len(tokens) + 1) if self._completes(tokens[:n]))
        self._window.extend(tokens)
        self._trim()
        return None

    def _close(self, num_tokens: int) -> None:
        self._num_closed = num_tokens
        self._closed = len(self._decode(self._window[:num_tokens]).rstrip(INCOMPLETE))

    def _trim(self) -> None:
        removed = len(self._window) - self._reach
        if removed > self._reach:
            self._window, self._skip = self._window[removed:], 0
            self._close(max(0, self._num_closed - removed))

    def _completes(self, tokens: Sequence[int]) -> bool:
        text = self._decode([*self._window, *tokens])
        return any(text.find(string, self._first(string)) >= 0 for string in self._strings)

    def _first(self, string: str) -> int:
        """The earliest place at which the string may begin."""
        return max(self._skip, self._closed - len(string) + 1)


@cache
def load_decoder(folder: str) -> Decode:
    """The base model's tokenizer, loaded at the first stop string: most workloads never need it.

    Raises `InvalidRequest`: whatever is wrong with the folder, only a request that needs the tokenizer fails.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        size = len(tokenizer)
    except Exception as error:
        log.warning("The tokenizer of %s cannot be loaded: %s", folder, error)
        raise InvalidRequest(_cannot("cannot be loaded")) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise InvalidRequest(_cannot("has no tokens"))

    def decode(tokens: Sequence[int]) -> str:
        known = [token for token in tokens if token < size]  # the vocabulary may be padded: such a token has no text
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def _cannot(reason: str) -> str:
    return f"stop has strings, and this server cannot find them: its base model's tokenizer {reason}. Use token ids."
