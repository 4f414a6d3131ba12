"""The grammar of a whole answer: reasoning, where the family has any, then what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from tx_async.api.compatible.grammar_writer import GrammarWriter, literal
from tx_async.api.compatible.tool_grammars import calls_of
from tx_async.grammar import GrammarError


class AskedTool(Struct, frozen=True):
    name: str
    parameters: dict[str, Any]
    """The JSON Schema of its arguments."""


class AskedAnswer(Struct, frozen=True, kw_only=True):
    """What an answer must be: the body or calls; only what was given is possible."""

    schema: dict[str, Any] | bool | None = None
    """The body is JSON of this schema."""
    grammar: str | None = None
    """The body is what this grammar, GBNF or Lark, says."""
    tools: tuple[AskedTool, ...] = ()
    several_calls: bool = True
    family: str = "plain"
    thinks: tuple[str, str] | None = None
    """What stands around reasoning."""
    in_reasoning: bool = False
    """Whether the prompt has begun the reasoning."""

    @property
    def has_body(self) -> bool:
        return self.schema is not None or self.grammar is not None


def answer_grammar(asked: AskedAnswer, special: Callable[[str], int | None]) -> str:
    """Raises `GrammarError`."""
    writer = GrammarWriter(special)
    parts = list(_parts(asked, writer))
    if asked.family == "gpt-oss":
        return writer.text(f"{_analysis(writer)} ({' | '.join(parts)})")
    return writer.text(f"{_reasoning(asked, writer)} ({' | '.join(parts)})")


def _parts(asked: AskedAnswer, writer: GrammarWriter) -> Iterator[str]:
    if asked.has_body:
        body = writer.json(asked.schema) if asked.schema is not None else writer.lark(lark_of(asked.grammar or ""))
        is_channel = asked.family == "gpt-oss"
        yield f"{_channel(writer, 'final')} {body}" if is_channel else body
    if asked.tools:
        tools = [(tool.name, tool.parameters) for tool in asked.tools]
        yield calls_of(asked.family, tools, asked.several_calls, writer)


def lark_of(grammar: str) -> str:
    """Raises `GrammarError`."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the library raises what it likes
        raise GrammarError(f"it is no GBNF or Lark that can be read: {str(error)[:300].rstrip('.')}.") from None


def _reasoning(asked: AskedAnswer, writer: GrammarWriter) -> str:
    if asked.thinks is None:
        return ""
    thought = f"{writer.until(asked.thinks[1])} {writer.rule('GAP?')}"
    writer.rules.append(r"GAP: /[ \t\r\n]+/")
    return thought if asked.in_reasoning else f"({writer.mark(asked.thinks[0])} {thought})?"


def _channel(writer: GrammarWriter, name: str) -> str:
    return f"{writer.mark('<|channel|>')} {literal(name)} {writer.mark('<|message|>')}"


def _analysis(writer: GrammarWriter) -> str:
    """gpt-oss thinks in messages of their own, as many as it likes."""
    begin = f"{writer.mark('<|start|>')} {literal('assistant')}"
    return f"({_channel(writer, 'analysis')} {writer.until('<|end|>')} {begin})*"
