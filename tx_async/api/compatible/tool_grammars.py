"""How families write calls, as grammars: the counterpart of `call_formats.py`, which reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tx_async.api.compatible.grammar_writer import GrammarWriter, literal
from tx_async.api.compatible.json_values import is_object
from tx_async.grammar import GrammarError

NamedTool = tuple[str, Mapping[str, Any]]
"""(name, the JSON Schema of its arguments)"""
_DEFINITIONS = ("$defs", "definitions")
_OTHER_THAN_TEXT = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_LINE = "\n"


def calls_of(family: str, tools: Sequence[NamedTool], several: bool, writer: GrammarWriter) -> str:
    """One call, or several. Raises `GrammarError` for a family whose calls cannot be written here."""
    match family:
        case "hermes":
            return _in_line([_hermes(tool, writer) for tool in tools], several, '"\\n"')
        case "llama3":
            return _in_line([_object(tool, "parameters", writer) for tool in tools], several, '"; "')
        case "mistral":
            return _mistral(tools, several, writer)
        case "deepseek":
            calls = _in_line([_deepseek(tool, writer) for tool in tools], several, '"\\n"?')
            return f"{writer.mark('<｜tool▁calls▁begin｜>')} {calls} {writer.mark('<｜tool▁calls▁end｜>')}"
        case "qwen3.5":
            return _in_line([_functions(tool, "tool_call", "\n", writer) for tool in tools], several, '"\\n"')
        case "seed":
            return _in_line([_functions(tool, "seed:tool_call", "", writer) for tool in tools], several, '"\\n"')
        case "glm":
            return _in_line([_glm(tool, writer) for tool in tools], several, '"\\n"')
        case "gpt-oss":
            return _in_line([_harmony(tool, writer) for tool in tools], False, "")
        case _:
            raise GrammarError("calls of this model cannot be forced here: use auto or none.")


def _in_line(calls: list[str], several: bool, between: str) -> str:
    call = f"({' | '.join(calls)})"
    return f"({call} ({between} {call})*)" if several else call


def _arguments(tool: NamedTool, writer: GrammarWriter) -> str:
    """All arguments as one JSON object."""
    return writer.json({"type": "object", **tool[1]})


def _object(tool: NamedTool, arguments: str, writer: GrammarWriter) -> str:
    head = f'{{"name": {literal(tool[0])}, "{arguments}": '
    return writer.rule(f"{literal(head)} {_arguments(tool, writer)} {literal('}')}")


def _hermes(tool: NamedTool, writer: GrammarWriter) -> str:
    call = _object(tool, "arguments", writer)
    return writer.rule(f'{writer.mark("<tool_call>")} "\\n" {call} "\\n" {writer.mark("</tool_call>")}')


def _mistral(tools: Sequence[NamedTool], several: bool, writer: GrammarWriter) -> str:
    begin = writer.mark("[TOOL_CALLS]")
    if writer.has("[ARGS]"):
        calls = [f"{begin} {literal(tool[0])} {writer.mark('[ARGS]')} {_arguments(tool, writer)}" for tool in tools]
        return _in_line([writer.rule(call) for call in calls], several, "")
    listed = _in_line([_object(tool, "arguments", writer) for tool in tools], several, '", "')
    return f'{begin} "[" {listed} "]"'


def _deepseek(tool: NamedTool, writer: GrammarWriter) -> str:
    """V3.1 writes the name and the arguments, V3 and R1 a kind, the name, and the arguments in a fence."""
    begin, between, end = (writer.mark(f"<｜tool▁{name}｜>") for name in ("call▁begin", "sep", "call▁end"))
    arguments = _arguments(tool, writer)
    plain = f"{literal(tool[0])} {between} {arguments}"
    fenced = f'"function" {between} {literal(tool[0])} "\\n```json\\n" {arguments} "\\n```"'
    return writer.rule(f"{begin} ({plain} | {fenced}) {end}")


def _functions(tool: NamedTool, tag: str, line: str, writer: GrammarWriter) -> str:
    """line: what stands around a value."""
    head = f'"\\n" {writer.mark(f"<function={tool[0]}>")} "\\n"'
    items = [
        (f"{literal(f'<parameter={name}>{line}')} {_value(schema, '</parameter>', line, writer)}", is_required)
        for name, schema, is_required in _parameters(tool)
    ]
    tail = f'"</function>\\n" {writer.mark(f"</{tag}>")}'
    return writer.rule(f"{writer.mark(f'<{tag}>')} {head} {_given(items)} {tail}")


def _glm(tool: NamedTool, writer: GrammarWriter) -> str:
    begin, end = writer.mark("<arg_key>"), writer.mark("</arg_key>")
    items = [
        (
            f'{begin} {literal(name)} {end} "\\n" {writer.mark("<arg_value>")} '
            f"{_value(schema, '</arg_value>', '', writer)}",
            is_required,
        )
        for name, schema, is_required in _parameters(tool)
    ]
    head = f'{writer.mark("<tool_call>")} {literal(tool[0])} "\\n"'
    return writer.rule(f"{head} {_given(items)} {writer.mark('</tool_call>')}")


def _given(items: list[tuple[str, bool]]) -> str:
    """Parameters in the order of the schema; those that are not required may be left out."""
    return " ".join(item if is_required else f"({item})?" for item, is_required in items)


def _value(schema: Mapping[str, Any], end: str, before: str, writer: GrammarWriter) -> str:
    """A value with the end behind it and a line break: text stands as it is, everything else as JSON."""
    texts = [schema["const"]] if "const" in schema else schema.get("enum")
    if texts and all(isinstance(text, str) for text in texts):
        value = f"({' | '.join(map(literal, texts))})"
    elif schema.get("type", "string") == "string" and not schema.keys() & _OTHER_THAN_TEXT:
        return writer.until(end, before, "\n")
    else:
        value = writer.json(schema)
    return f"{value} {literal(before) if before else ''} {writer.mark(end)} {literal(_LINE)}"


def _parameters(tool: NamedTool) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema with the definitions that it may refer to, whether it must be there)"""
    schema = tool[1]
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    properties: dict[str, Any] = schema.get("properties") or {}
    for name, entry in properties.items():
        own = entry if is_object(entry) else {}
        yield name, {**definitions, **own}, name in (schema.get("required") or ())


def _harmony(tool: NamedTool, writer: GrammarWriter) -> str:
    channel, message = writer.mark("<|channel|>"), writer.mark("<|message|>")
    head = f'{channel} {literal(f"commentary to=functions.{tool[0]} ")} {writer.mark("<|constrain|>")} "json"'
    return writer.rule(f"{head} {message} {_arguments(tool, writer)}")
