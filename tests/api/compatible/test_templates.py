"""Prompts equal transformers' to the byte, and templates stay in their sandbox."""

import json

import pytest

from tests.support import chat_templates
from tests.support.chat_templates import make_chat_tokenizer
from tx_async.api.compatible.fields import InvalidField
from tx_async.api.compatible.prompts import Chat, render
from tx_async.api.compatible.templates import Template
from tx_async.api.compatible.tokenizer import load
from tx_async.errors import InvalidRequest
from tx_async.wire.openai import ChatMessage, FunctionCall, ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find <b>words</b> & 'phrases' — ünïcödé",
            "parameters": {"type": "object", "properties": {"word": {"type": "string", "default": None}}},
        },
    }
]
CONTEXT = 4096
ARGUMENTS = {"word": '<naïve> & "quoted"', "n": [1, 2.5, None, True]}


def user(content) -> ChatMessage:
    return ChatMessage(role="user", content=content)


CONVERSATIONS = {
    "one message": [user("Hi <there> & 😀\n")],
    "turns": [user("a"), ChatMessage(role="assistant", content="b "), user("  c")],
    "system": [ChatMessage(role="system", content="Be brief."), user("a")],
    "reasoning": [user("a"), ChatMessage(role="assistant", content="b", reasoning_content="\nwhy\n"), user("c")],
    "calls": [
        user("a"),
        ChatMessage(
            role="assistant",
            content="",
            reasoning_content="which?",
            tool_calls=[
                ToolCall(id="call12345", function=FunctionCall(name="look_up", arguments=json.dumps(ARGUMENTS)))
            ],
        ),
        ChatMessage(role="tool", tool_call_id="call12345", content="found"),
    ],
}
FITTING = [
    (family, name, has_tools)
    for family in chat_templates.ALL
    for name in CONVERSATIONS
    for has_tools in (False, True)
    if family != "mistral" or name in ("one message", "turns", "reasoning")
    if family != "llama3" or name != "calls"
]


def as_transformers_takes_them(messages: list[ChatMessage]) -> list[dict]:
    found = []
    for message in messages:
        entry = {"role": message.role, "content": message.content, "reasoning_content": message.reasoning_content}
        if message.tool_calls:
            entry["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": ARGUMENTS}}
                for call in message.tool_calls
            ]
        found.append(entry | {"tool_call_id": message.tool_call_id})
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("templates")
    return {
        name: make_chat_tokenizer(base / name, template, in_settings=name == "llama3")
        for name, template in chat_templates.ALL.items()
    }


@pytest.mark.parametrize(("family", "conversation", "has_tools"), FITTING)
def test_a_prompt_equals_transformers_to_the_byte_and_the_token(folders, family, conversation, has_tools):
    from transformers import AutoTokenizer

    messages, tools = CONVERSATIONS[conversation], TOOLS if has_tools else None
    theirs = AutoTokenizer.from_pretrained(folders[family])
    options = {"tools": tools, "add_generation_prompt": True}
    said = as_transformers_takes_them(messages)
    prompt = render(load(str(folders[family])), Chat(messages, tools or ()), CONTEXT)
    assert prompt.text == theirs.apply_chat_template(said, tokenize=False, **options)
    assert list(prompt.tokens) == theirs.apply_chat_template(said, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("thinks", [False, True])
def test_options_reach_the_template(folders, thinks):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["qwen3"])
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
    )
    assert (
        render(load(str(folders["qwen3"])), Chat([user("a")], (), {"enable_thinking": thinks}), CONTEXT).text
        == expected
    )
    assert ("</think>" in expected) != thinks


def test_an_answer_can_go_on_where_the_last_message_ends(folders):
    from transformers import AutoTokenizer

    messages = [user("a"), ChatMessage(role="assistant", content="The answer is")]
    for family in ("qwen3", "qwen3.5", "llama3"):
        theirs = AutoTokenizer.from_pretrained(folders[family]).apply_chat_template(
            as_transformers_takes_them(messages), tokenize=False, continue_final_message=True
        )
        assert render(load(str(folders[family])), Chat(messages, continues=True), CONTEXT).text == theirs
        assert theirs.endswith("The answer is")


@pytest.mark.parametrize(("family", "expected"), [("qwen3", "one\ntwo"), ("qwen3.5", "onetwo")])
def test_parts_are_joined_where_the_template_takes_text_only(folders, family, expected):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert expected in render(load(str(folders[family])), Chat([user(parts)]), CONTEXT).text


def test_a_developer_speaks_as_the_system_where_the_template_knows_none(folders):
    messages = [ChatMessage(role="developer", content="Be brief."), user("a")]
    assert "<|im_start|>system\nBe brief." in render(load(str(folders["qwen3"])), Chat(messages), CONTEXT).text


def test_what_the_template_has_against_the_messages_is_told(folders):
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        render(load(str(folders["mistral"])), Chat([user("a"), user("b")]), CONTEXT)


def test_named_templates_are_chosen_as_transformers_does(tmp_path):
    folder = make_chat_tokenizer(tmp_path / "m", "plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("with {{ tools | length }} <tool_call>")
    tokenizer = load(str(folder))
    assert render(tokenizer, Chat([user("a")]), CONTEXT).text == "plain"
    assert render(tokenizer, Chat([user("a")], TOOLS), CONTEXT).text == "with 1 <tool_call>"


def test_a_model_without_a_template_points_to_completions(tiny_qwen3):
    with pytest.raises(InvalidRequest, match="use completions"):
        render(load(str(tiny_qwen3)), Chat([user("a")]), CONTEXT)


def test_tools_are_refused_where_no_way_to_call_them_is_known(tmp_path):
    folder = make_chat_tokenizer(tmp_path / "m", "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}")
    with pytest.raises(InvalidField, match=r"^tools: "):
        render(load(str(folder)), Chat([user("a")], TOOLS), CONTEXT)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ raise_exception.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ tojson.__self__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack):
    with pytest.raises(InvalidRequest):
        Template(attack + "{{ 1 / 0 }}").render([{"role": "user", "content": "a"}], special_tokens={})


@pytest.mark.parametrize("framed", [False, True])
def test_tokens_are_those_of_the_library_s_own_encode(folders, framed):
    from tokenizers import Tokenizer

    folder = folders["qwen3"]
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("", "a", " x  y\n", "é😀\u0301", "<|im_start|>a<|im_end|>", "ab" * 500):
        assert load(str(folder)).encode(text, framed) == library.encode(text, add_special_tokens=framed).ids


def test_a_text_that_fits_is_never_refused_by_its_bytes(folders):
    """Each token stands for at most so many bytes."""
    tokenizer = load(str(folders["qwen3"]))
    for text in ("<|im_start|>" * 50, "€" * 50, " " * 50):
        assert len(text.encode()) <= tokenizer.token_bytes_max * len(tokenizer.encode(text, framed=False))
