"""Each family's calls and reasoning, whole and in pieces of every length."""

import json

import pytest

from tests.support.call_texts import (
    CALLS,
    PARAMETERS,
    TEMPLATES,
    deepseek,
    functions,
    glm,
    harmony,
    hermes,
    llama,
    mistral,
)
from tx_async.api.compatible.families import family_of
from tx_async.api.compatible.parsing import ParsedCall, Reasoning, Text

THOUGHT = "<think>\nhm, <tool> ok\n</think>\n\n"
ANSWERS = {
    "hermes": ("hermes", THOUGHT + "So:\n" + hermes(CALLS), "hm, <tool> ok", "So:"),
    "hermes alone": ("hermes", hermes(CALLS), "", ""),
    "qwen3.5": ("qwen3.5", THOUGHT + functions(CALLS), "hm, <tool> ok", ""),
    "seed": ("seed", "<seed:think>a</seed:think>" + functions(CALLS, "seed:tool_call"), "a", ""),
    "glm": ("glm", THOUGHT + "So:\n" + glm(CALLS), "hm, <tool> ok", "So:"),
    "deepseek V3": ("deepseek", "So:" + deepseek(CALLS, True), "", "So:"),
    "deepseek V3.1": ("deepseek", "why</think>So:" + deepseek(CALLS, False), "why", "So:"),
    "mistral": ("mistral", mistral(CALLS, True), "", ""),
    "mistral, newer": ("mistral", "[THINK]a[/THINK]So:" + mistral(CALLS, False), "a", "So:"),
    "llama3": ("llama3", llama(CALLS), "", ""),
    "llama3, tagged": ("llama3", llama(CALLS, "<|python_tag|>"), "", ""),
    "gpt-oss": (
        "gpt-oss",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>So:<|end|>"
        "<|start|>assistant" + harmony(CALLS),
        "hm",
        "So:",
    ),
}


def parsed(family: str, answer: str, size: int, with_tools: bool = True, prompt: str = ""):
    parser = family_of(TEMPLATES[family]).parser(PARAMETERS, with_tools=with_tools, prompt=prompt)
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    events = [event for piece in pieces for event in parser.feed(piece)] + list(parser.finish())
    calls = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ParsedCall)]
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return reasoning, "".join(event.text for event in events if isinstance(event, Text)), calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_taken_apart(name, size):
    family, answer, reasoning, text = ANSWERS[name]
    prompt = "<｜Assistant｜><think>" if answer.startswith("why") else ""
    assert parsed(family, answer, size, prompt=prompt) == (reasoning, text, CALLS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_family_is_known_by_its_template(name):
    family = family_of(TEMPLATES[name])
    assert family.name == name
    assert family.has_tools == (name != "plain")


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    "answer",
    [
        "a < b <tool> c </tool_call>",
        "ends with <tool_ca",
        "<tool_call>\n{not json}\n</tool_call> and more",
        '<tool_call>\n{"name": 5}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>{"name": "f", "arg',
        " spaces \n",
    ],
)
def test_what_only_looks_like_a_call_is_text(answer, size):
    assert parsed("hermes", answer, size) == ("", answer, [])


@pytest.mark.parametrize("family", sorted({"hermes", "qwen3.5", "glm", "deepseek", "mistral", "llama3"}))
def test_calls_are_text_where_nobody_asked_for_tools(family):
    answer = (
        next(entry for entry in ANSWERS.values() if entry[0] == family and not entry[2])[1]
        if family
        not in (
            "qwen3.5",
            "glm",
        )
        else (functions(CALLS) if family == "qwen3.5" else glm(CALLS))
    )
    assert parsed(family, answer, 3, with_tools=False) == ("", answer, [])


def test_an_answer_that_begins_in_its_prompt_s_reasoning():
    assert parsed("hermes", "why\n</think>\n\nyes", 2, prompt="<|im_start|>assistant\n<think>\n") == ("why", "yes", [])
    assert parsed("hermes", "yes", 2, prompt="<think>\n\n</think>\n\n") == ("", "yes", [])


def test_an_answer_that_is_cut_off_in_its_reasoning():
    assert parsed("hermes", "<think>\nwhy", 2) == ("why", "", [])


def test_gpt_oss_says_its_answer_in_the_final_channel():
    answer = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes\n"
    assert parsed("gpt-oss", answer, 1) == ("hm", "Yes\n", [])
    assert parsed("gpt-oss", "no channel at all", 1) == ("", "no channel at all", [])


def test_values_are_typed_by_the_tool_s_schema():
    text = functions([("f", {"a": "7", "b": "7", "c": "['x']", "d": "7"})])
    assert parsed("qwen3.5", text, 5)[2] == [("f", {"a": 7, "b": "7", "c": ["x"], "d": "7"})]


def test_ids_have_the_form_that_templates_ask_for():
    assert len(family_of(TEMPLATES["mistral"]).new_call_id("call_")) == 9
    assert family_of(TEMPLATES["hermes"]).new_call_id("call_").startswith("call_")
