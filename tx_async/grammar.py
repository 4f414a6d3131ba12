"""Which tokens a grammar allows next, by llguidance: the part of constrained decoding that the server, which checks
grammars, and the engine, which obeys them, have in common.

A grammar is llguidance's JSON: {"grammars": [{"name": …, "lark_grammar" or "json_schema": …}, …]}. What it costs is
bounded by counts, never by time, so that every process comes to the same end with the same grammar.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tx_async.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

GRAMMAR_BYTES_MAX = 64 * 1024
"""The longest grammar that a request may have, in llguidance's form."""
WORD_BITS = 32
"""The bits of a word, in which allowed tokens are listed."""
KEPT_GRAMMARS = 16
"""How many compiled grammars a process keeps: the samples of one request, and the requests of one agent, share one."""
_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 5_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}


class GrammarError(InvalidRequest):
    """A grammar does not compile, is too complex, or leaves no token to go on with."""


class Vocabulary:
    """A tokenizer in llguidance's form. The end of an answer is a token of its own after all others: which of the
    model's tokens end one is for the request to say."""

    def __init__(self, tokenizer: str):
        """tokenizer: the content of tokenizer.json. Raises `GrammarError` for one that llguidance does not read."""
        from llguidance import LLTokenizer

        content = json.loads(tokenizer)
        self._added = {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens", ())}
        self.end = 1 + max([*_numbers(content["model"]["vocab"]), *self._added.values()], default=0)
        try:
            self.tokens = LLTokenizer(tokenizer, n_vocab=self.end + 1, eos_token=self.end)
        except ValueError as error:
            raise GrammarError(
                f"this base model's tokenizer is of a kind that grammars cannot be used with ({error})."
            ) from None

    def special(self, name: str) -> int | None:
        """The number of a token that a grammar must name by it, because it is no text."""
        token = self._added.get(name)
        return token if token is not None and self.tokens.is_special_token(token) else None


def _numbers(vocab: dict[str, int] | list[Any]) -> Collection[int]:
    """Of a model's tokens: it names them, or lists them in order."""
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))


@cache
def vocabulary(folder: str) -> Vocabulary:
    """The base model's, read once. Raises `GrammarError`."""
    try:
        return Vocabulary((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError:
        raise GrammarError("this base model has no tokenizer.json, which grammars need.") from None


def new_matcher(vocabulary: Vocabulary, text: str, log_level: int = 0) -> Any:
    """llguidance's own form of a grammar, which also says whether it failed."""
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(vocabulary.tokens, text, limits=LLParserLimits(**_LIMITS), log_level=log_level)


class Grammar:
    """A compiled grammar, before any token of an answer."""

    def __init__(self, vocabulary: Vocabulary, text: str):
        """Raises `GrammarError`."""
        self._vocabulary = vocabulary
        self._matcher = new_matcher(vocabulary, text)
        _check(self._matcher)

    def begin(self, ends: Collection[int], vocab_size: int) -> Constraint:
        """A constraint for one answer. ends: the tokens that may end a complete one."""
        return Constraint(self._vocabulary, self._matcher.deep_copy(), ends, vocab_size)


class Constraint:
    """What one answer may go on with. `accept` moves it on."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, ends: Collection[int], vocab_size: int):
        """Raises `GrammarError` where no answer can begin."""
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._ends = [token for token in ends if token < vocab_size]
        self._vocab_size = vocab_size
        self.allowed = self._next()
        """The tokens that may come next, a bit each, lowest bit first: uint32 [ceil(vocab_size / 32)]; never none."""

    def __repr__(self) -> str:
        return f"<Constraint {self._matcher.stop_reason()}>"

    def accept(self, tokens: Sequence[int]) -> None:
        """Append allowed tokens that have not ended the answer. Raises `GrammarError` where it cannot go on."""
        self._matcher.consume_tokens(list(tokens))
        _check(self._matcher)
        self.allowed = self._next()

    def _next(self) -> np.ndarray:
        import numpy as np

        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        _check(self._matcher)
        bits = np.zeros(num_words(self._vocab_size), np.uint32)
        bits[: len(found)] = found[: len(bits)]
        _set(bits, self._vocabulary.end, False)
        for token in self._ends if self._matcher.is_accepting() else ():
            _set(bits, token, True)
        if rest := self._vocab_size % WORD_BITS:
            bits[-1] &= np.uint32((1 << rest) - 1)
        if not bits.any():
            raise GrammarError("no token of this model goes on with the answer as the grammar wants it.")
        return bits


def num_words(vocab_size: int) -> int:
    """How many words hold a bit for each token."""
    return -(-vocab_size // WORD_BITS)


def _set(bits: np.ndarray, token: int, value: bool) -> None:
    place, bit = token // WORD_BITS, 1 << token % WORD_BITS
    if place < len(bits):
        bits[place] = int(bits[place]) | bit if value else int(bits[place]) & ~bit


@lru_cache(KEPT_GRAMMARS)
def compiled(vocabulary: Vocabulary, text: str) -> Grammar:
    """Raises `GrammarError`."""
    return Grammar(vocabulary, text)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise GrammarError(f"{explained(matcher.get_error())[:300].rstrip('.')}.")


_NO_TEXT = "no text obeys it: a rule or a $ref leads only back to itself, or two of its demands exclude each other"
_EXPLAINED = {
    "NoExtension": _NO_TEXT,
    "NoExtensionBias": _NO_TEXT,
    "ParserTooComplex": "it is too complex. Make it simpler",
    "LexerTooComplex": "its patterns are too complex. Make them simpler",
}
"""llguidance's names of reasons, where it has no words for them."""


def explained(error: str) -> str:
    """llguidance's message in a line: its first one, and the cause where that stands below, after a drawing of the
    place."""
    first, *others = [line.strip() for line in error.splitlines() if line.strip()] or ["it failed"]
    first = _EXPLAINED.get(first.rstrip("."), first)
    if not first.endswith(":"):
        return first
    causes = [line.removeprefix("error: ") for line in others if line.startswith("error: ")] or others[-1:]
    return " ".join([first, *causes])
