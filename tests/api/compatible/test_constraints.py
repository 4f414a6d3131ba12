"""Requests that say what form their answer has: what reaches the engine, and what is refused before anything runs."""

import json

import pytest

from tx_async.api.compatible.answer_grammars import AskedAnswer
from tx_async.api.compatible.grammar_check import GrammarCheck
from tx_async.grammar import GrammarError

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
USER = [{"role": "user", "content": "a"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
OUTPUT = {"format": {"type": "json_schema", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other"}}
NAMED = {"type": "function", "function": {"name": "add"}}
BODIES = {
    CHAT: {"model": "fake/model", "messages": USER},
    COMPLETIONS: {"model": "fake/model", "prompt": "a"},
    MESSAGES: {"model": "fake/model", "messages": USER, "max_tokens": 500},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'


def schemas_of(grammar: str) -> list:
    found = [part["json_schema"] for part in json.loads(grammar)["grammars"] if "json_schema" in part]
    return [{key: value for key, value in schema.items() if key != "x-guidance"} for schema in found]


async def test_the_engine_gets_a_grammar_with_what_was_asked_for(ask, says, scheduler):
    asked = [
        (CHAT, {"response_format": FORM}, [SCHEMA]),
        (CHAT, {"response_format": {"type": "json_object"}}, [{"type": "object"}]),
        (CHAT, {"response_format": {"type": "text"}}, None),
        (CHAT, {"tools": [TOOL, OTHER], "tool_choice": "required"}, [SCHEMA, {"type": "object"}]),
        (CHAT, {"tools": [OTHER, TOOL], "tool_choice": NAMED}, [SCHEMA]),
        (CHAT, {"tools": [TOOL], "tool_choice": "auto"}, None),
        (CHAT, {"tools": [TOOL], "response_format": {"type": "json_object"}}, [{"type": "object"}, SCHEMA]),
        (COMPLETIONS, {"response_format": FORM}, [SCHEMA]),
        (MESSAGES, {"output_config": OUTPUT}, [SCHEMA]),
        (COMPLETIONS, {"grammar": 'root ::= "a"'}, []),
        (MESSAGES, {"tools": [{"name": "add", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}, [SCHEMA]),
    ]
    for path, fields, expected in asked:
        says("a")
        status, answer = await ask(path, **BODIES[path], **fields)
        assert status == 200, answer
        grammar = scheduler.live.operations[-1][0].grammar
        assert (schemas_of(grammar) if grammar else None) == expected, fields


async def test_forced_calls_are_answered_as_calls(ask, says):
    says(CALL)
    status, answer = await ask(CHAT, **BODIES[CHAT], tools=[TOOL], tool_choice=NAMED)
    assert status == 200 and answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"n": 2}'
    says(CALL)
    tools = [{"name": "add", "input_schema": SCHEMA}]
    _, answer = await ask(MESSAGES, **BODIES[MESSAGES], tools=tools, tool_choice={"type": "tool", "name": "add"})
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("tool_use", {"n": 2})


def form(schema) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


OUTPUT_SCHEMA = "output_config.format.schema"
SCHEMA_FIELD = "response_format.json_schema.schema"
INVALID = [
    (CHAT, form({"type": "nonsense"}), SCHEMA_FIELD),
    (CHAT, form({"not": {}}), SCHEMA_FIELD),
    (CHAT, form({"$ref": "http://127.0.0.1:1/x"}), SCHEMA_FIELD),
    (CHAT, form({"enum": ["a" * 70_000]}), SCHEMA_FIELD),
    (CHAT, form(False), SCHEMA_FIELD),
    (COMPLETIONS, form({"not": {}}), SCHEMA_FIELD),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (CHAT, {"grammar": "start: ("}, "grammar"),
    (CHAT, {"grammar": ""}, "grammar"),
    (CHAT, {"grammar": "start: <|nobody|>"}, "grammar"),
    (CHAT, {"grammar": "start: " + "(" * 5000}, "grammar"),
    (CHAT, {"grammar": 'root ::= "a"', "response_format": FORM}, "grammar"),
    (CHAT, {"response_format": FORM, "min_tokens": 3}, "min_tokens"),
    (CHAT, {"response_format": FORM, "ignore_eos": True}, "ignore_eos"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "add"}}}, "tool_choice"),
    (
        CHAT,
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice"),
    (MESSAGES, {"output_config": OUTPUT, "messages": [*USER, {"role": "assistant", "content": "{"}]}, "messages"),
    (MESSAGES, {"output_config": OUTPUT | {"effort": "low"}}, "output_config.effort"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, OUTPUT_SCHEMA),
]


@pytest.mark.parametrize(("path", "fields", "field"), INVALID)
async def test_what_cannot_be_obeyed_is_refused_by_name(ask, scheduler, path, fields, field):
    status, answer = await ask(path, **BODIES[path] | fields)
    assert status == 400, answer
    error = answer["error"]
    assert error.get("param", error["message"].partition(":")[0]) == field, answer
    assert not scheduler.live.operations


CAUSES = [
    (form({"type": "string", "pattern": "(("}), "regex parse error: unclosed group."),
    ({"grammar": "start: /((/"}, 'at 1(8): invalid regex "((" (in regex): regex parse error: unclosed group.'),
    ({"grammar": "root ::= root"}, "no text obeys it: a rule or a $ref leads only back to itself"),
    (form({"$ref": "#"}), "no text obeys it: a rule or a $ref leads only back to itself"),
    ({"grammar": "start: X\nX: /a/ & /b/"}, "no text obeys it: a rule or a $ref leads only back to itself"),
    (
        {"grammar": 'root ::= "a" root'},
        "no text ends what it leads into: a rule or a $ref always leads back to itself.",
    ),
    (form({"enum": []}), "Unsatisfiable schema: anyOf is empty."),
    (form({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable schema: minimum (2) is greater than"),
]


@pytest.mark.parametrize(("fields", "cause"), CAUSES)
async def test_a_refusal_says_what_is_wrong_with_the_grammar(ask, fields, cause):
    """Before anything runs, also where the answer proper comes after reasoning."""
    for path in (COMPLETIONS, CHAT):
        status, answer = await ask(path, **BODIES[path], **fields)
        assert status == 400 and answer["error"]["message"].partition(": ")[2].startswith(cause), answer


async def test_a_schema_that_never_compiles_is_refused_and_the_next_one_is_not(ask, says, scheduler, capfd):
    """The first takes ever more memory, the second ever more time. Neither is news for the server's log."""
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(15, 40)]
    for schema in ({"type": "array", "maxItems": 10**8}, {"allOf": patterns}):
        status, answer = await ask(CHAT, **BODIES[CHAT], **form(schema))
        assert status == 400 and answer["error"]["param"] == SCHEMA_FIELD, answer
    assert "memory" not in capfd.readouterr().err
    assert not scheduler.live.operations
    says("{}")
    assert (await ask(CHAT, **BODIES[CHAT], **form(SCHEMA)))[0] == 200


async def test_a_model_without_a_tokenizer_has_no_grammars(tmp_path):
    with pytest.raises(GrammarError, match=r"tokenizer\.json"):
        await GrammarCheck(str(tmp_path)).grammar("alice", AskedAnswer(schema={}))
