"""A grammar in the making, in llguidance's dialect of Lark, with JSON Schemas as grammars of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tx_async.grammar import GRAMMAR_BYTES_MAX, GrammarError

TEXT = r"/(.|\n)*/"
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,100}"
"""Between the tokens of JSON. A model that has lost its way would go on with it for ever."""


class GrammarWriter:
    """The rules of the first grammar, and the grammars that it names."""

    def __init__(self, special: Callable[[str], int | None]):
        """special: the number of a token that is no text, by its name."""
        self._special = special
        self.rules: list[str] = []
        self.grammars: list[dict[str, Any]] = []

    def mark(self, text: str) -> str:
        """A text that is one special token where the tokenizer has it."""
        token = self._special(text)
        return literal(text) if token is None else f"<[{token}]>"

    def has(self, text: str) -> bool:
        return self._special(text) is not None

    def until(self, end: str, before: str = "", after: str = "") -> str:
        """Any text up to the first `end`. before, after: text around the end, where that is no special token."""
        name = f"until_{len(self.rules)}"
        if self.has(end):
            self.rules.append(f"{name}: {TEXT}")
            return f"{name} {self.mark(end)} {literal(after)}"
        self.rules.append(f"{name}[suffix={literal(before + end + after)}]: {TEXT}")
        return name

    def rule(self, body: str) -> str:
        """A rule's new name."""
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def json(self, schema: Mapping[str, Any] | bool) -> str:
        """A reference to JSON of a schema, whose own settings for llguidance count."""
        if isinstance(schema, Mapping):
            schema = {"x-guidance": {"whitespace_pattern": WHITE_SPACE}, **schema}
        return self._sub({"json_schema": schema})

    def lark(self, grammar: str) -> str:
        return self._sub({"lark_grammar": grammar})

    def _sub(self, grammar: dict[str, Any]) -> str:
        name = f"part_{len(self.grammars)}"
        self.grammars.append({"name": name, **grammar})
        return f"@{name}"

    def text(self, start: str) -> str:
        """All of it. Raises `GrammarError` for one that is too long."""
        main = {"name": "answer", "lark_grammar": "\n".join([f"start: {start}", *self.rules])}
        text = json.dumps({"grammars": [main, *self.grammars]}, ensure_ascii=False)
        if (size := len(text.encode())) > GRAMMAR_BYTES_MAX:
            raise GrammarError(f"it has {size} bytes as a grammar; allowed are {GRAMMAR_BYTES_MAX}. Make it smaller.")
        return text


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
