"""OpenAI's completions: prompts of four forms, echo, log-probabilities with offsets."""

import asyncio
import threading

import numpy as np
import pytest

from tx_async.api.compatible.chat_completions import ChatAnswer
from tx_async.api.compatible.choices import Choice
from tx_async.api.compatible.completions import CompletionAnswer
from tx_async.api.compatible.tokenizer import Tokenizer
from tx_async.scheduler.interface import LivePiece
from tx_async.wire.results import TopkLogprobs

PATH = "/oai/api/v1/completions"


async def one(ask, **fields) -> dict:
    status, answer = await ask(PATH, model="fake/model", **fields)
    assert status == 200, answer
    assert len(answer["choices"]) == 1
    return answer["choices"][0]


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [65, 66], [[65, 66]]])
async def test_a_prompt_is_text_or_tokens_or_a_list_of_one_of_them(ask, says, prompt, scheduler, tokenizer):
    says("cd")
    choice = await one(ask, prompt=prompt, return_token_ids=True)
    tokens = np.frombuffer(scheduler.live.operations[-1][0].prompt, "<i4").tolist()
    assert choice["prompt_token_ids"] == tokens
    assert tokens == (tokenizer.encode("ab", framed=True) if "ab" in (prompt, prompt[0]) else [65, 66])
    assert (choice["text"], choice["finish_reason"]) == ("cd", "stop")


async def test_several_prompts_are_answered_in_their_order(ask, listen):
    fields = {"model": "fake/model", "prompt": ["a", "e", "i"], "n": 2, "max_tokens": 2}
    _, answer = await ask(PATH, **fields)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "bc"),
        (1, "bc"),
        (2, "fg"),
        (3, "fg"),
        (4, "jk"),
        (5, "jk"),
    ]
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 12
    texts = dict.fromkeys(range(6), "")
    for chunk in await listen(PATH, **fields):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {choice["index"]: choice["text"] for choice in answer["choices"]}


@pytest.mark.parametrize("logprobs", [0, 2])
async def test_log_probabilities_of_the_answer(ask, says, logprobs):
    says("xé", ends=False)
    found = (await one(ask, prompt="ab", logprobs=logprobs, max_tokens=3))["logprobs"]
    assert found["tokens"] == ["x", r"bytes:\xc3", r"bytes:\xa9"]
    assert found["text_offset"] == [0, 1, 1]
    assert found["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert found["top_logprobs"] is None if logprobs == 0 else len(found["top_logprobs"][0]) == 3


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_scores_the_prompt_too(ask, max_tokens):
    choice = await one(ask, prompt="ébc", echo=True, logprobs=1, max_tokens=max_tokens)
    found = choice["logprobs"]
    assert choice["text"] == "ébc" + "de"[:max_tokens]
    assert found["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", "b", "c", *"de"[:max_tokens]]
    assert found["text_offset"] == [0, 0, 1, 2, 3, 4][: 4 + max_tokens]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert all(isinstance(value, float) for value in found["token_logprobs"][1:])
    assert all(found["tokens"][i] in cell for i, cell in enumerate(found["top_logprobs"]) if i)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_a_stream_with_echo_says_the_same(ask, listen, logprobs, max_tokens):
    fields = {"model": "fake/model", "prompt": ["ab", "d"], "echo": True, "max_tokens": max_tokens}
    fields |= {} if logprobs is None else {"logprobs": logprobs}
    _, answer = await ask(PATH, **fields)
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens, "what nobody sees does not count"
    found = [{"text": "", "tokens": [], "offsets": [], "reason": None} for _ in range(2)]
    chunks = await listen(PATH, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == answer["usage"]
    for chunk in chunks:
        for choice in chunk["choices"]:
            mine = found[choice["index"]]
            mine["text"] += choice["text"]
            mine["tokens"] += (choice["logprobs"] or {"tokens": []})["tokens"]
            mine["offsets"] += (choice["logprobs"] or {"text_offset": []})["text_offset"]
            mine["reason"] = choice["finish_reason"] or mine["reason"]
    for mine, choice in zip(found, answer["choices"], strict=True):
        assert (mine["text"], mine["reason"]) == (choice["text"], choice["finish_reason"])
        if logprobs is not None:
            assert mine["tokens"] == choice["logprobs"]["tokens"]
            assert mine["offsets"] == choice["logprobs"]["text_offset"]


async def test_an_echo_shows_what_was_sent_special_tokens_included(ask):
    choice = await one(ask, prompt="a<|endoftext|>b", echo=True, max_tokens=1)
    assert choice["text"] == "a<|endoftext|>bc"


async def test_sixteen_tokens_where_nobody_said_how_many(ask, scheduler):
    assert len((await one(ask, prompt="a"))["text"]) == 16
    assert scheduler.live.operations[-1][0].max_tokens == 16


async def test_a_prompt_that_fills_the_context_can_be_scored(ask):
    assert len((await one(ask, prompt=[65] * 1024, echo=True, logprobs=0, max_tokens=0))["logprobs"]["tokens"]) == 1024
    status, answer = await ask(PATH, model="fake/model", prompt=[65] * 1024, max_tokens=1)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "prompt")


async def test_likely_tokens_without_text_or_with_the_same_text_do_not_hide_each_other(ask, scheduler, monkeypatch):
    """A model's vocabulary may be padded: numbers beyond the tokenizer's have no text."""
    ids, values = [900, 65, 901, 66, 902], [-0.5, -1.0, -1.5, -2.0, -2.5]

    async def live(owner, operation, model_path=None):
        yield LivePiece(
            index=0,
            tokens=np.array([903], "<i4").tobytes(),
            logprobs=np.array([-8.0], "<f4").tobytes(),
            topk=TopkLogprobs.of(np.array([ids]), np.array([values])),
            stop_reason="length",
        )

    monkeypatch.setattr(scheduler, "sample_live", live)
    found = (await one(ask, prompt="a", logprobs=5, max_tokens=1))["logprobs"]
    assert found["tokens"] == ["token_id:903"]
    names = ["token_id:900", "b", "token_id:901", "c", "token_id:902"]
    assert found["top_logprobs"] == [dict(zip(names, values, strict=True)) | {"token_id:903": -8.0}]
    monkeypatch.setattr(Tokenizer, "bytes_of", lambda self, token: b"A")
    assert (await one(ask, prompt="a", logprobs=5, max_tokens=1))["logprobs"]["top_logprobs"] == [{"A": -0.5}]


@pytest.mark.parametrize("path", [PATH, "/oai/api/v1/chat/completions"])
async def test_a_large_answer_leaves_the_event_loop_to_others(ask, monkeypatch, path):
    """Others get a turn between any two pieces, and no choice is built or encoded on the loop."""
    turns, fed, made = [0], [], []
    feed = Choice.feed
    monkeypatch.setattr(Choice, "feed", lambda self, piece: fed.append(turns[0]) or feed(self, piece))
    for kind, name in (
        (CompletionAnswer, "_whole_choice"),
        (CompletionAnswer, "_prompt_scored"),
        (ChatAnswer, "_choice"),
    ):
        monkeypatch.setattr(kind, name, in_which_thread(made, getattr(kind, name)))

    async def others():
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    more = {"prompt": ["ab", "cd"], "echo": True, "logprobs": 2}
    if path != PATH:
        more = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    status, answer = await ask(path, model="fake/model", n=3, max_tokens=5, **more)
    task.cancel()
    assert status == 200 and len(answer["choices"]) == (6 if path == PATH else 3)
    assert len(fed) == len(set(fed)) == answer["usage"]["completion_tokens"]
    assert len(made) >= len(answer["choices"]) and threading.get_ident() not in made


def in_which_thread(found: list[int], function):
    return lambda *args: found.append(threading.get_ident()) or function(*args)
