"""Grammars of answers: what each family's models write, and nothing else, obeys them, and its parser reads it back."""

import json

import pytest

from tests.support.call_texts import TEMPLATES, deepseek, functions, glm, harmony, hermes, llama, mistral
from tx_async.api.compatible.answer_grammars import AskedAnswer, AskedTool, answer_grammar
from tx_async.api.compatible.families import family_of
from tx_async.api.compatible.grammar_ends import check_ends
from tx_async.api.compatible.parsing import ParsedCall
from tx_async.grammar import Grammar, GrammarError, Vocabulary
from tx_async.testing.models import make_byte_tokenizer

END = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string"},
        "c": {"type": "array", "items": {"$ref": "#/$defs/d"}},
        "e": {"enum": ["x", "y z"]},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"d": {"type": "string"}},
}
TOOLS = (AskedTool("f", SCHEMA), AskedTool("g", {}))
CALLS = [("f", {"a": 1, "b": "x <y> & z", "c": ["d"], "e": "y z"}), ("g", {})]
SEED = (
    "<seed:tool_call>\n<function=f>\n<parameter=a>1</parameter>\n<parameter=b>x <y> & z</parameter>\n"
    '<parameter=c>["d"]</parameter>\n<parameter=e>y z</parameter>\n</function>\n</seed:tool_call>\n'
    "<seed:tool_call>\n<function=g>\n</function>\n</seed:tool_call>"
)
HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + harmony(CALLS[:1]).removesuffix("<|call|>")
WRITTEN = [
    ("hermes", hermes(CALLS), ()),
    ("hermes", hermes(CALLS), ("<tool_call>", "</tool_call>", "<think>", "</think>")),
    ("qwen3.5", functions(CALLS), ()),
    ("qwen3.5", functions(CALLS), ("<tool_call>", "</tool_call>", "<think>", "</think>")),
    ("seed", SEED, ("<seed:tool_call>", "</seed:tool_call>")),
    ("glm", glm(CALLS), ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tool_call>", "</tool_call>")),
    ("glm", glm(CALLS), ()),
    ("deepseek", deepseek(CALLS, True), ("<｜tool▁sep｜>",)),
    ("deepseek", deepseek(CALLS, False), ()),
    ("mistral", mistral(CALLS, True), ("[TOOL_CALLS]",)),
    ("mistral", mistral(CALLS, False), ("[TOOL_CALLS]", "[ARGS]")),
    ("llama3", llama(CALLS), ()),
    ("gpt-oss", HARMONY, ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>")),
    ("gpt-oss", HARMONY, ()),
]


@pytest.fixture(scope="module")
def words_of(tmp_path_factory):
    """A vocabulary of bytes, and of tokens that are no text."""
    folder = tmp_path_factory.mktemp("words")
    make_byte_tokenizer(folder)
    plain = json.loads((folder / "tokenizer.json").read_text())

    def make(*special: str) -> Vocabulary:
        first = plain["added_tokens"][0]
        added = [first | {"id": 257 + i, "content": name} for i, name in enumerate(special)]
        return Vocabulary(json.dumps(plain | {"added_tokens": [first, *added]}))

    return make


def obeys(words: Vocabulary, grammar: str, text: str) -> bool:
    """Whether it is a whole answer."""
    constraint = Grammar(words, grammar).begin([END], words.end)
    try:
        constraint.accept(words.tokens.tokenize_str(text, parse_special=True))
    except GrammarError:
        return False
    return bool(constraint.allowed[END // 32] >> END % 32 & 1)


def asked(family: str, **fields) -> AskedAnswer:
    tags = family_of(TEMPLATES[family]).tags
    return AskedAnswer(family=family, thinks=None if family == "gpt-oss" else tags.thinks, **fields)


@pytest.mark.parametrize(("family", "text", "special"), WRITTEN)
def test_calls_as_models_write_them_obey_and_are_read_back(words_of, family, text, special):
    words = words_of(*special)
    grammar = answer_grammar(asked(family, tools=TOOLS), words.special)
    assert obeys(words, grammar, text), text
    assert not obeys(words, grammar, "So: " + text)
    assert not obeys(words, grammar, text.replace("<function=f>", "<function=h>").replace('"f"', '"h"') + "!")
    parameters = {"f": SCHEMA["properties"], "g": {}}
    parser = family_of(TEMPLATES[family]).parser(parameters, with_tools=True, prompt="")
    events = [*parser.feed(text), *parser.finish()]
    found = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ParsedCall)]
    assert found == CALLS[: len(found)] and found


def test_one_call_is_one_call_and_arguments_obey_their_schema(words_of):
    words = words_of()
    grammar = answer_grammar(asked("hermes", tools=TOOLS, several_calls=False), words.special)
    assert obeys(words, grammar, hermes(CALLS[:1])) and not obeys(words, grammar, hermes(CALLS))
    assert not obeys(words, grammar, hermes([("f", {"a": "text"})]))
    assert not obeys(words, grammar, hermes([("f", {"b": "a is missing"})]))


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_a_body_comes_after_the_reasoning_of_a_family_that_reasons(words_of, special):
    words, body = words_of(*special), {"schema": {"type": "object"}}
    free = answer_grammar(asked("hermes", **body), words.special)
    assert obeys(words, free, '{"a": [1]}') and obeys(words, free, '<think>\nhm {\n</think>\n\n{"a": 1}')
    assert not obeys(words, free, "<think>\nhm</think>") and not obeys(words, free, '{"a": 1} and more')
    begun = answer_grammar(asked("hermes", in_reasoning=True, **body), words.special)
    assert obeys(words, begun, 'hm\n</think>\n\n{"a": 1}') and not obeys(words, begun, '{"a": 1}')
    plain = answer_grammar(AskedAnswer(**body), words.special)
    assert not obeys(words, plain, "<think>hm</think>{}")


def test_a_body_or_calls(words_of):
    words = words_of()
    grammar = answer_grammar(asked("hermes", schema={"type": "object"}, tools=TOOLS), words.special)
    assert obeys(words, grammar, '{"b": 2}') and obeys(words, grammar, hermes(CALLS))
    assert not obeys(words, grammar, hermes(CALLS) + "{}")


def test_gpt_oss_answers_in_its_final_channel(words_of):
    words = words_of("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    grammar = answer_grammar(asked("gpt-oss", grammar='root ::= "yes" | "no"'), words.special)
    final = "<|channel|>final<|message|>yes"
    assert obeys(words, grammar, final)
    assert obeys(words, grammar, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + final)
    assert not obeys(words, grammar, "yes") and not obeys(words, grammar, final.replace("yes", "maybe"))


def test_both_dialects_of_grammars_are_read(words_of):
    words = words_of()
    for grammar in ('root ::= "a" [0-9]+', 'start: "a" N\nN: /[0-9]+/'):
        text = answer_grammar(AskedAnswer(grammar=grammar), words.special)
        assert obeys(words, text, "a12") and not obeys(words, text, "a")


def needs(name: str) -> dict:
    """The schema of an object whose property of that name is such an object again."""
    return {"type": "object", "required": [name], "properties": {name: {"$ref": "#/$defs/x"}}}


NESTED = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}
WIDE = {"type": "object", "properties": {f"p{i}": {"$ref": "#/$defs/x"} for i in range(300)}}
"""llguidance does not print such a large one unasked."""
ENDLESS = [
    ({"grammar": 'root ::= "a" root'}, ""),
    ({"grammar": 'root ::= "yes" | "a" x\nx ::= "b" x | x "c"'}, ""),
    ({"grammar": 'start: x\nx: "a" %json {"$ref": "#"}'}, "(#) "),
    ({"schema": needs("a") | {"$defs": {"x": needs("b")}}}, "(#/$defs/x) "),
    ({"schema": NESTED | {"$defs": {"x": needs("b")}}}, "(#/$defs/x) "),
    ({"schema": WIDE | {"$defs": {"x": needs("b")}}}, "(#/$defs/x) "),
    ({"tools": (AskedTool("f", needs("a") | {"$defs": {"x": needs("b")}}),)}, "(#/$defs/x) "),
]
ENDS = [
    {"grammar": 'root ::= "a" root | "b"'},
    {"grammar": 'start: x*\nx: "(" x ")" | "y"\nunused: "a" unused'},
    {"schema": NESTED | {"$defs": {"x": NESTED}}},
    {"schema": WIDE | {"$defs": {"x": NESTED}}},
    {"schema": {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"enum": []}]}},
    {"tools": TOOLS},
]


@pytest.mark.parametrize(("fields", "named"), ENDLESS)
def test_what_may_lead_into_a_rule_without_an_end_is_refused(words_of, fields, named):
    words = words_of()
    with pytest.raises(GrammarError) as refused:
        check_ends(words, answer_grammar(asked("hermes", **fields), words.special))
    assert refused.value.message.endswith(f"a $ref {named}always leads back to itself."), refused.value.message


@pytest.mark.parametrize("fields", ENDS)
def test_what_comes_back_to_itself_and_can_end_is_not(words_of, fields):
    words = words_of()
    check_ends(words, answer_grammar(asked("hermes", **fields), words.special))
