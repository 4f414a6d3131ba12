"""Bodies that were right before something in them was changed: an answer or a refusal, never a failure."""

import copy
import json
import random

NUM_BODIES = 250
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BODIES = {
    "/v1/chat/completions": {
        "model": "fake/model",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        "tools": [TOOL],
        "stop": ["a", 5],
        "max_tokens": 3,
        "top_k": 3,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"1": 2},
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {"model": "fake/model", "prompt": ["ab", "c"], "echo": True, "logprobs": 2, "max_tokens": 2},
    "/v1/messages": {
        "model": "fake/model",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "thinking": {"type": "enabled", "budget_tokens": 5},
    },
}
VALUES = [
    *(None, True, 0, -1, 2**31, 10**30, 1.5, 1e308, "", "a", "\0", "😀", "tinker://a/b/c", "ab" * 3000),
    *([], {}, [1], ["a"], [None], [[1]], {"a": 1}, {"type": "text"}, {"type": "text", "text": 5}, {"role": "user"}),
    *("auto", "tool", "user", "<|endoftext|>", "</tool_call>"),
]


def places(value, path=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def change(body, chance: random.Random) -> None:
    *path, last = chance.choice(list(places(body)))
    for key in path:
        body = body[key]
    if isinstance(body, dict) and chance.random() < 0.1:
        del body[last]
    elif isinstance(body, dict) and chance.random() < 0.1:
        body[chance.choice(["zz", "type", "role", "content", "name"])] = copy.deepcopy(chance.choice(VALUES))
    else:
        body[last] = copy.deepcopy(chance.choice(VALUES))


async def test_no_changed_body_breaks_a_route(client, scheduler):
    chance = random.Random(1)
    for _ in range(NUM_BODIES):
        path = chance.choice(list(BODIES))
        body = copy.deepcopy(BODIES[path])
        for _ in range(chance.choice([1, 1, 2])):
            change(body, chance)
        content = json.dumps(body)
        answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code < 500 and "its log says" not in answer.text, (content[:2000], answer.text)
        assert answer.status_code == 200 or answer.json()["error"]["message"], content[:2000]
    assert scheduler.live.num_open == 0
