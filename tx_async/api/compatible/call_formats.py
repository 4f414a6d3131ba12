"""How families write calls: each function reads the inside of a block, or returns None when that is no call."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from tx_async.api.compatible.json_values import is_list, is_object
from tx_async.api.compatible.parsing import Parameters, ParsedCall


def call_of(value: Any) -> ParsedCall | None:
    """A call from {"name": …, "arguments": … or "parameters": …}."""
    if not is_object(value) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parsed_json(arguments)
    return ParsedCall(value["name"], dumps(arguments)) if is_object(arguments) else None


def _all_calls(values: list[Any]) -> list[ParsedCall] | None:
    calls = [call for value in values if (call := call_of(value))]
    return calls if calls and len(calls) == len(values) else None


def read_hermes(inside: str, _parameters: Parameters) -> list[ParsedCall] | None:
    """`{"name": …, "arguments": {…}}`"""
    return _all_calls([parsed_json(inside)])


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def read_functions(inside: str, parameters: Parameters) -> list[ParsedCall] | None:
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>`"""
    if not (found := _FUNCTION.fullmatch(inside)):
        return None
    name = found[1].strip()
    return [_typed_call(name, _PARAMETER.findall(found[2]), parameters)]


_GLM = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def read_glm(inside: str, parameters: Parameters) -> list[ParsedCall] | None:
    """`NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`"""
    name = inside.partition("<arg_key>")[0].strip()
    if not re.fullmatch(r"[\w.:-]+", name):
        return None
    return [_typed_call(name, _GLM.findall(inside), parameters)]


_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)


def read_deepseek(inside: str, _parameters: Parameters) -> list[ParsedCall] | None:
    """`NAME<sep>{…}` (V3.1), or `function<sep>NAME` and a fenced block of JSON (V3, R1)."""
    values: list[Any] = []
    for first, second in _DEEPSEEK.findall(inside):
        name, body = first, second
        if fenced := re.fullmatch(r"\s*([^\n`]+)\n```json\n(.*?)\n?```\s*", second, re.DOTALL):
            name, body = fenced[1], fenced[2]
        values.append({"name": name.strip(), "arguments": parsed_json(body)})
    return _all_calls(values)


_MISTRAL = re.compile(r"\s*(?:\[TOOL_CALLS\])?([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?(?={)")


def read_mistral(inside: str, _parameters: Parameters) -> list[ParsedCall] | None:
    """A JSON list of calls, or `NAME[ARGS]{…}` one after the other."""
    if inside.lstrip().startswith("["):
        listed = parsed_json(inside)
        return _all_calls(listed) if is_list(listed) else None
    values: list[Any] = []
    place = 0
    while found := _MISTRAL.match(inside, place):
        try:
            arguments, place = json.JSONDecoder().raw_decode(inside, found.end())
        except ValueError:
            return None
        values.append({"name": found[1], "arguments": arguments})
    return _all_calls(values) if not inside[place:].strip() else None


def _typed_call(name: str, pairs: list[tuple[str, str]], parameters: Parameters) -> ParsedCall:
    """A value stays text; where the tool's schema wants something else, it is parsed as JSON if it can be."""
    schemas = parameters.get(name, {})
    return ParsedCall(name, dumps({key.strip(): _typed(value, schemas.get(key.strip(), {})) for key, value in pairs}))


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    if kind == "string" or (kind is None and not any(key in schema for key in ("anyOf", "oneOf", "allOf", "enum"))):
        return value
    parsed = parsed_json(value)
    if parsed is None and value.strip() != "null":
        parsed = _python(value)
    is_text = isinstance(kind, list) and "string" in kind and isinstance(parsed, int | float)
    return value if is_text or (parsed is None and value.strip() not in ("null", "None")) else parsed


def _python(value: str) -> Any:
    """A value like `True` or `['a']`, as templates write it when they do not turn it into JSON."""
    try:
        parsed = ast.literal_eval(value.strip())
        json.dumps(parsed)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return parsed


def parsed_json(text: str) -> Any:
    """None for text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
