"""Anthropic's messages: the same road, in Anthropic's words."""

import json

import numpy as np
import pytest

PATH = "/anthropic/api/v1/messages"
ALIASES = ["/v1/messages", "/services/tinker-prod/anthropic/api/v1/messages"]
ASKED = {"model": "fake/model", "max_tokens": 200, "messages": [{"role": "user", "content": "a"}]}
TOOLS = [{"name": "add", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}]
SAID = '<think>\nhm\n</think>\n\nSo:\n<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


def prompt_of(scheduler, tokenizer) -> str:
    return tokenizer.decode(np.frombuffer(scheduler.live.operations[-1][0].prompt, "<i4").tolist())


@pytest.mark.parametrize("path", [PATH, *ALIASES])
async def test_an_answer_is_made_of_blocks(ask, says, path):
    says(SAID)
    status, answer = await ask(path, **ASKED, tools=TOOLS)
    assert status == 200, answer
    thinking, text, call = answer["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "hm")
    assert (text["type"], text["text"]) == ("text", "So:")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"n": 1})
    assert call["id"].startswith("toolu_")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)


async def test_a_stream_has_every_event_in_its_place(listen, says):
    says(SAID)
    events = await listen(PATH, **ASKED, tools=TOOLS)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    for index in range(3):
        mine = [event["type"] for event in events if event.get("index") == index]
        assert mine[0] == "content_block_start" and mine[-1] == "content_block_stop"
        assert set(mine[1:-1]) == {"content_block_delta"}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "So:"
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"n": 1}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == len(SAID) + 1


@pytest.mark.parametrize(
    ("fields", "ends", "reason"),
    [
        ({}, True, ("end_turn", None)),
        ({"stop_sequences": ["X", "b"]}, True, ("stop_sequence", "b")),
        ({"max_tokens": 2}, False, ("max_tokens", None)),
    ],
)
async def test_why_it_stopped_is_told(ask, listen, says, fields, ends, reason):
    says("abc", "abc", ends=ends)
    _, answer = await ask(PATH, **ASKED | fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == reason
    delta = (await listen(PATH, **ASKED | fields))[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == reason
    assert answer["content"] == [
        {"type": "text", "text": "abc" if ends and not fields else "ab"[: 1 if ends else 2], "citations": None}
    ]


async def test_a_conversation_with_tools_becomes_the_template_s(ask, says, scheduler, tokenizer):
    says("ok")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "why", "signature": "s"},
                {"type": "text", "text": "So:"},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"n": None}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "2"}],
                    "is_error": True,
                },
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    status, answer = await ask(PATH, **ASKED | {"messages": messages}, system="Be brief.", tools=TOOLS)
    assert status == 200, answer
    prompt = prompt_of(scheduler, tokenizer)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '{"name": "add", "arguments": {"n": null}}' in prompt
    assert "<tool_response>\nError: 2\n</tool_response><|im_end|>\n<|im_start|>user\ngo on<|im_end|>" in prompt


async def test_the_count_is_what_the_prompt_has(ask, says):
    says("ok")
    fields = {key: value for key, value in ASKED.items() if key != "max_tokens"} | {"tools": TOOLS, "system": "s"}
    _, counted = await ask(f"{PATH}/count_tokens", **fields)
    _, answer = await ask(PATH, **fields, max_tokens=5)
    assert counted == {"input_tokens": answer["usage"]["input_tokens"]}


async def test_counting_needs_no_device(ask, scheduler):
    scheduler.missing = ["a worker"]
    fields = {key: value for key, value in ASKED.items() if key != "max_tokens"}
    assert (await ask(f"{PATH}/count_tokens", **fields))[0] == 200


async def test_an_answer_goes_on_where_the_assistant_was(ask, says, scheduler, tokenizer):
    says(" 42")
    messages = [*ASKED["messages"], {"role": "assistant", "content": "It is"}]
    status, answer = await ask(PATH, **ASKED | {"messages": messages})
    assert status == 200 and answer["content"][0]["text"] == " 42"
    assert prompt_of(scheduler, tokenizer).endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize(("kind", "is_off"), [("enabled", False), ("disabled", True)])
async def test_thinking_is_the_template_s_switch(ask, says, scheduler, tokenizer, kind, is_off):
    says("ok")
    thinking = {"type": kind} | ({"budget_tokens": 2000} if kind == "enabled" else {})
    assert (await ask(PATH, **ASKED, thinking=thinking))[0] == 200
    assert prompt_of(scheduler, tokenizer).endswith("</think>\n\n") == is_off
