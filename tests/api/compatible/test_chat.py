"""OpenAI's chat completions: what is said, thought and called, whole and streamed."""

import json

import numpy as np
import pytest

from tx_async.errors import ServerError
from tx_async.testing.fake_results import SAMPLED_LOGPROB

PATH = "/oai/api/v1/chat/completions"
ALIASES = ["/v1/chat/completions", "/services/tinker-prod/oai/api/v1/chat/completions"]
ASKED = {"model": "fake/model", "messages": [{"role": "user", "content": "a"}]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
]
THOUGHT = "<think>\nhm\n</think>\n\n"
CALL = '<tool_call>\n{"name": "add", "arguments": {"n": %d}}\n</tool_call>'


def joined(chunks: list[dict], index: int = 0) -> dict:
    """A message put together from a stream, as clients do."""
    found = {"content": "", "reasoning_content": "", "tool_calls": [], "tokens": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                delta = choice["delta"]
                for field in ("content", "reasoning_content"):
                    found[field] += delta.get(field) or ""
                found["tool_calls"] += delta.get("tool_calls", [])
                found["tokens"] += choice.get("token_ids", [])
                found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
    return found


@pytest.mark.parametrize("path", [PATH, *ALIASES])
async def test_an_answer_has_its_text_its_reason_and_its_usage(ask, says, path, tokenizer, scheduler):
    says("Hé 😀!")
    status, answer = await ask(path, **ASKED)
    assert status == 200, answer
    choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hé 😀!", "stop")
    operation, model_path = scheduler.live.operations[-1]
    prompt = np.frombuffer(operation.prompt, "<i4").tolist()
    assert tokenizer.decode(prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert model_path is None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len("Hé 😀!".encode()) + 1)
    assert answer["system_fingerprint"].startswith("fp_0123456789ab_") and answer["object"] == "chat.completion"


async def test_a_stream_says_the_same_in_pieces(ask, listen, says):
    text = THOUGHT + "So é:\n" + CALL % 1 + "\n" + CALL % 2
    says(text, text)
    whole = (await ask(PATH, **ASKED, tools=TOOLS, return_token_ids=True))[1]["choices"][0]
    chunks = await listen(PATH, **ASKED, tools=TOOLS, return_token_ids=True, stream_options={"include_usage": True})
    pieces = joined(chunks)
    message = whole["message"]
    assert message["reasoning_content"] == pieces["reasoning_content"] == "hm"
    assert message["content"] == pieces["content"] == "So é:"
    assert [call["function"] for call in message["tool_calls"]] == [call["function"] for call in pieces["tool_calls"]]
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"n": 1}, {"n": 2}]
    assert [call["index"] for call in pieces["tool_calls"]] == [0, 1]
    assert whole["finish_reason"] == pieces["finish_reason"] == "tool_calls"
    assert whole["token_ids"] == pieces["tokens"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(whole["token_ids"])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_calls_stay_text_without_tools_and_with_tool_choice_none(ask, says, scheduler):
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        says(CALL % 1)
        choice = (await ask(PATH, **ASKED, **fields))[1]["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL % 1, "stop")
    prompts = [operation.prompt for operation, _ in scheduler.live.operations]
    assert prompts[0] == prompts[1]


async def test_one_call_only_where_several_are_not_wanted(ask, says):
    says(CALL % 1 + CALL % 2)
    choice = (await ask(PATH, **ASKED, tools=TOOLS, parallel_tool_calls=False))[1]["choices"][0]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"n": 1}']


async def test_a_cut_off_call_is_text_and_says_length(ask, says):
    says((CALL % 1)[:30], ends=False)
    choice = (await ask(PATH, **ASKED, tools=TOOLS, max_tokens=25))[1]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ((CALL % 1)[:25], "length")


@pytest.mark.parametrize("streams", [False, True])
async def test_log_probabilities_have_their_tokens_and_bytes(ask, listen, says, streams):
    says("é")
    fields = ASKED | {"logprobs": True, "top_logprobs": 2}
    if streams:
        entries = [
            entry
            for chunk in await listen(PATH, **fields)
            for choice in chunk["choices"]
            for entry in (choice["logprobs"] or {"content": []})["content"]
        ]
    else:
        entries = (await ask(PATH, **fields))[1]["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [r"bytes:\xc3", r"bytes:\xa9", "<|endoftext|>"]
    assert [entry["bytes"] for entry in entries[:2]] == [[0xC3], [0xA9]]
    assert {entry["logprob"] for entry in entries} == {SAMPLED_LOGPROB}
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


async def test_a_stop_string_is_cut_from_text_in_pieces_too(ask, listen, says):
    for whole in (True, False):
        says("one END two")
        fields = ASKED | {"stop": ["END"]}
        text = (
            (await ask(PATH, **fields))[1]["choices"][0]["message"]["content"]
            if whole
            else joined(await listen(PATH, **fields))["content"]
        )
        assert text == "one "


async def test_every_choice_has_its_number(ask, listen, scheduler):
    status, answer = await ask(PATH, **ASKED, n=3, max_tokens=4, seed=7)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    chunks = await listen(PATH, **ASKED, n=3, max_tokens=4, seed=7)
    for index, choice in enumerate(answer["choices"]):
        assert joined(chunks, index)["content"] == choice["message"]["content"]
    assert {(operation.num_samples, operation.seed) for operation, _ in scheduler.live.operations} == {(3, 7)}


async def test_what_is_asked_of_the_sampler_reaches_it(ask, scheduler):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "7": 1.5},
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x", 9],
        "stop_token_ids": [11],
        "max_completion_tokens": 100_000,
    }
    status, answer = await ask(PATH, **ASKED, **fields)
    assert status == 200, answer
    operation = scheduler.live.operations[-1][0]
    expected = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.5,
        "logit_bias": ((5, -100.0), (7, 1.5)),
        "min_tokens": 2,
        "use_eos": False,
        "stop_strings": ("x",),
        "stop_token_ids": (9, 11),
        "max_tokens": 1024 - len(operation.prompt) // 4,
    }
    assert {name: getattr(operation, name) for name in expected} == expected


async def test_a_stream_that_fails_says_so_and_ends(listen, says, scheduler):
    says("abcdef")
    scheduler.live.tokens_max, scheduler.live.error = 2, ServerError("The worker was lost at /secret/place. Try again.")
    events = await listen(PATH, **ASKED)
    assert events[-1]["error"]["type"] == "server_error" and "Try again" in events[-1]["error"]["message"]
    assert "/secret" not in json.dumps(events)
    assert scheduler.live.num_open == 0


async def test_what_fails_before_the_first_token_has_its_status(ask, client, scheduler):
    scheduler.overloaded = True
    for streams in (False, True):
        status, answer = await ask(PATH, **ASKED, stream=streams)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    scheduler.overloaded, scheduler.missing = False, ["a worker"]
    assert (await ask(PATH, **ASKED, stream=True))[0] == 503
