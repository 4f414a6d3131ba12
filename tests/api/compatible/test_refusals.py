"""What is refused: with the right status, in the API's own form, naming what to change; and nothing keeps running."""

import asyncio
import json

import httpx
import pytest

from tx_async.api.compatible.fields import WITHOUT_EFFECT
from tx_async.api.compatible.rows import ROWS
from tx_async.api.compatible.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/oai/api/v1/chat/completions", "/oai/api/v1/completions"
MESSAGES, COUNT = "/anthropic/api/v1/messages", "/anthropic/api/v1/messages/count_tokens"
USER = {"role": "user", "content": "a"}
BODIES = {
    CHAT: {"model": "fake/model", "messages": [USER]},
    COMPLETIONS: {"model": "fake/model", "prompt": "a"},
    MESSAGES: {"model": "fake/model", "messages": [USER], "max_tokens": 5},
    COUNT: {"model": "fake/model", "messages": [USER]},
}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
USES = {"role": "assistant", "content": [{"type": "tool_use", "id": "u", "name": "f", "input": {}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": "!!"}
TOOL = {"type": "function", "function": {"name": "f"}}
FORM = {"type": "json_object"}

INVALID = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [USER | {"colour": 1}]}, "messages[0].colour"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": "b"}]}, "messages[1]"),
    (CHAT, {"messages": [USER, CALLS, USER]}, "messages[2]"),
    (CHAT, {"messages": [USER, CALLS]}, "messages"),
    (CHAT, {"messages": [USER | {"tool_calls": CALLS["tool_calls"]}]}, "messages[0].tool_calls"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0]"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    (CHAT, {"tools": [TOOL | {"extra": 1}]}, "tools[0].extra"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": "yes"}, "logprobs"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 65}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"top_p": 0, "top_k": -5}, "top_k"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"seed": 2**70}, "seed"),
    (CHAT, {"stop": ["a" * 10_000]}, "stop"),
    (CHAT, {"min_p": 2}, "min_p"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1000": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": None}}, "logit_bias"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["a"] * 300}, "stop"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": [USER | {"content": "a" * 1100}]}, "messages"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1000]}, "prompt"),
    (COMPLETIONS, {"prompt": [2**70]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, "prompt"),
    (COMPLETIONS, {"n": 65}, "n"),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 33}, "prompt"),
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a" * 1100}, "prompt"),
    (COMPLETIONS, {"suffix": "b"}, "suffix"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (MESSAGES, {"max_tokens": None}, "max_tokens"),
    (MESSAGES, {"max_tokens": 0}, "max_tokens"),
    (MESSAGES, {"messages": []}, "messages"),
    (MESSAGES, {"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]"),
    (MESSAGES, {"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}]},
        "messages[0].content[0]",
    ),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "b"}]}]},
        "messages[0]",
    ),
    (MESSAGES, {"tools": [{"type": "web_search_20260101", "name": "w", "input_schema": {}}]}, "tools[0].type"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "w", "max_uses": 2}]}, "tools[0].type"),
    (MESSAGES, {"tools": [{"type": "mcp_toolset", "mcp_server_name": "w"}]}, "tools[0].type"),
    (MESSAGES, {"tools": [{"name": "w"}]}, "tools[0].input_schema"),
    (MESSAGES, {"tools": [{"name": "w", "input_schema": {}, "colour": 1}]}, "tools[0].colour"),
    (MESSAGES, {"tools": [{"name": "w", "input_schema": {}, "type": 1}]}, "tools[0].type"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice"),
    (MESSAGES, {"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    (MESSAGES, {"mcp_servers": []}, "mcp_servers"),
    (MESSAGES, {"n": 2}, "n"),
    (MESSAGES, {"stop_sequences": [""]}, "stop_sequences"),
    (MESSAGES, {"stop_sequences": ["a" * 10_000]}, "stop_sequences"),
    (MESSAGES, {"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    (COUNT, {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    (MESSAGES, {"system": "s", "messages": [USER, USES, USER]}, "messages[2]"),
    (MESSAGES, {"messages": [USER, USES]}, "messages"),
    (COUNT, {"max_tokens": 5}, "max_tokens"),
    (COUNT, {"messages": [USER | {"content": "a" * 1100}]}, "messages"),
]


@pytest.mark.parametrize(("path", "fields", "field"), INVALID)
async def test_what_makes_no_sense_is_a_400_that_names_its_field(ask, scheduler, path, fields, field):
    status, answer = await ask(path, **BODIES[path] | fields)
    assert status == 400, answer
    assert answer["error"]["message"].startswith(f"{field}: "), answer
    assert answer["error"]["type"] == "invalid_request_error"
    if "api/v1/messages" in path:
        assert answer["type"] == "error" and "tool_call" not in answer["error"]["message"]
    else:
        assert answer["error"]["param"] == field
    assert scheduler.live.operations == []


@pytest.mark.parametrize("path", BODIES)
async def test_fields_without_effect_are_accepted_and_null_is_absent(ask, path):
    fields = dict.fromkeys(WITHOUT_EFFECT, "x") | {"tools": None, "stop": None, "temperature": None}
    if path == COMPLETIONS:
        del fields["tools"]
    if path in (MESSAGES, COUNT):
        del fields["stop"]
    if path == COUNT:
        del fields["temperature"]
    status, answer = await ask(path, **BODIES[path], **fields)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *((path, {name: None}) for path in BODIES for name in ("function_call", "container", "suffix", "unheard_of")),
        (CHAT, {"functions": None, "modalities": ["text"], "function_call": "none"}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "annotations": None}]}]}),
        (COMPLETIONS, {"best_of": None}),
        (COMPLETIONS, {"best_of": 1}),
        (COMPLETIONS, {"best_of": 3, "n": 3}),
        (MESSAGES, {"system": [{"type": "text", "text": "s", "citations": None}]}),
    ],
)
async def test_what_asks_for_nothing_is_taken_also_where_it_is_not_supported(ask, path, fields):
    status, answer = await ask(path, **BODIES[path] | fields)
    assert status == 200, answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@pytest.mark.parametrize("top_k", [None, 40])
async def test_a_top_p_of_0_leaves_the_likeliest_token_alone(ask, scheduler, path, top_k):
    status, answer = await ask(path, **BODIES[path] | {"top_p": 0, "top_k": top_k})
    assert status == 200, answer
    (operation, _) = scheduler.live.operations[-1]
    assert (operation.top_k, operation.top_p) == (1, 1.0)


ADVICE = [
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens: it is -1; it must be at least 1, or absent, which means 16."),
    (CHAT, {"max_tokens": -1}, "max_tokens: it is -1; it must be at least 1, or absent for as many as fit."),
    (MESSAGES, {"max_tokens": 0}, "max_tokens: it is 0; it must be at least 1."),
    (COMPLETIONS, {"n": 4097}, "n: it is 4097; allowed are 1 to 64."),
    (
        CHAT,
        {"messages": [USER, {"role": "function", "content": "a"}]},
        "messages[1].role: Invalid enum value 'function'; it must be system, developer, user, assistant or tool.",
    ),
    (
        MESSAGES,
        {"messages": [USER, {"role": "system", "content": "a"}]},
        "messages[1].role: Invalid enum value 'system'; it must be user or assistant.",
    ),
    (CHAT, {"model": "nope"}, "model 'nope' is not served here; this server has 'fake/model' or 'alias'."),
    (MESSAGES, {"messages": [USER, USES]}, "messages: the tool_use u has no tool_result."),
    (
        MESSAGES,
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0].type: web_search_20250305: this server runs no tools of its own.",
    ),
]


@pytest.mark.parametrize(("path", "fields", "said"), ADVICE)
async def test_the_advice_is_true_of_the_route_and_said_once(ask, path, fields, said):
    assert (await ask(path, **BODIES[path] | fields))[1]["error"]["message"] == said


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", MESSAGES, 400), ("GET", MESSAGES, 405), ("GET", "/anthropic/api/v1/models", 404)],
)
async def test_an_error_of_anthropic_s_names_its_request_in_the_body_as_in_the_header(client, method, path, status):
    response = await client.request(method, path, json=BODIES[MESSAGES] | {"max_tokens": 0})
    assert response.status_code == status
    assert response.json()["request_id"] == response.headers["request-id"] == response.headers["x-request-id"] != ""


LONG = "x y" * 100_000
TOO_LONG = [
    (COMPLETIONS, {"prompt": LONG}, 1),
    (COMPLETIONS, {"prompt": ["a", LONG]}, 2),
    (COMPLETIONS, {"prompt": LONG, "echo": True, "logprobs": 1}, 1),
    (COMPLETIONS, {"prompt": ["a"] * 33, "n": 2}, 0),
    (CHAT, {"messages": [USER | {"content": LONG}]}, 0),
    (MESSAGES, {"system": LONG}, 0),
    (COUNT, {"messages": [USER | {"content": LONG}]}, 0),
]


@pytest.mark.parametrize(("path", "fields", "place"), TOO_LONG)
async def test_what_cannot_fit_the_context_is_refused_before_it_is_tokenized(ask, monkeypatch, path, fields, place):
    """Megabytes of text take many seconds to tokenize. place: which text is the first that is not tokenized."""
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, framed: seen.append(text) or encode(self, text, framed))
    status, answer = await ask(path, **BODIES[path] | fields)
    assert status == 400 and len(seen) == max(place - 1, 0), (answer, len(seen))
    if LONG in str(fields):
        said = answer["error"]["message"].partition(": ")
        assert said[0] in ("prompt", "messages") and said[2].startswith("the prompt has 300"), said
        assert said[2].endswith(" characters; the context, answer included, is 1024 tokens. Send less of it.")


EDGES = (0, -1, 2**31, -(2**31) - 1, 2**53, 2**63, -(2**63) - 1, 2**64, 10**30)
NUMBERS = {
    CHAT: ("max_tokens", "max_completion_tokens", "top_k", "seed", "n", "min_tokens", "top_logprobs", "temperature"),
    COMPLETIONS: ("logprobs", "max_tokens", "n", "frequency_penalty", "prompt"),
    MESSAGES: ("max_tokens", "top_k", "top_p"),
}


@pytest.mark.parametrize("path", NUMBERS)
async def test_no_number_breaks_a_route(ask, path):
    for field in NUMBERS[path]:
        for number in EDGES:
            more = {"logprobs": True} if field == "top_logprobs" else {}
            value = [number] if field == "prompt" else number
            status, answer = await ask(path, **BODIES[path] | more | {field: value})
            assert status in (200, 400), (field, number, answer)
    for stop in ([-1], [2**40], [10**30], {"a": 1}, [None]):
        assert (await ask(CHAT, **BODIES[CHAT], stop=stop))[0] == 400
    assert (await ask(CHAT, **BODIES[CHAT], logit_bias={"1": 10**30}))[0] == 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "name", ["other/model", "tinker://nobody/sampler_weights/x", "tinker://x", "fake/model:peft:1025"]
)
async def test_an_unknown_model_is_a_404_in_its_form(ask, path, name):
    status, answer = await ask(path, **BODIES[path] | {"model": name})
    assert status == 404 and "model" in answer["error"]["message"]
    assert answer["error"]["type"] == "not_found_error"
    if path in (CHAT, COMPLETIONS):
        assert (answer["error"]["param"], answer["error"]["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/oai/api/v1/from_the_future", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("POST", "/services/tinker-prod/oai/api/v1/x", 404),
        ("GET", "/anthropic/api/v1/models", 404),
        ("GET", "/v1/messages", 405),
        ("POST", "/v1/messages/batches", 404),
    ],
)
async def test_unknown_routes_answer_in_the_form_of_their_prefix(client, method, path, status):
    response = await client.request(method, path)
    answer = response.json()
    assert response.status_code == status and answer["error"]["message"]
    assert ("type" in answer) == ("anthropic" in path or "/v1/messages" in path)


async def test_without_a_key_both_say_401_in_their_form(scheduler, tmp_path):
    from tx_async.api.routes import create_api
    from tx_async.config import ServerConfig

    (tmp_path / "keys").write_text("# keys\n")
    app = create_api(scheduler, ServerConfig(api_keys_file=str(tmp_path / "keys")), scheduler.files)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        openai = await client.post(CHAT, json=BODIES[CHAT])
        anthropic = await client.post(MESSAGES, json=BODIES[MESSAGES])
    assert (openai.status_code, openai.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (401, "authentication_error")
    assert "Authorization: Bearer" in openai.json()["error"]["message"]


async def test_a_huge_body_is_a_413_in_its_form(scheduler, chat_folder):
    from tx_async.api.routes import create_api
    from tx_async.config import ServerConfig

    app = create_api(scheduler, ServerConfig(request_body_bytes_max=50_000), scheduler.files)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        body = {**BODIES[MESSAGES], "messages": [{"role": "user", "content": "a" * 60_000}]}
        answer = await client.post(MESSAGES, json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")


async def test_models_lists_the_base_and_one_s_own_checkpoints(client, connect, scheduler):
    checkpoint = scheduler._put_checkpoint("owner-x", "m", "sampler_weights", "mine", None, {}, None)
    listed = (await client.get("/oai/api/v1/models")).json()
    assert [entry["id"] for entry in listed["data"]] == ["fake/model", "alias"]
    session = (await client.post("/api/v1/create_session", json={})).json()["session_id"]
    owner = scheduler.sessions[session].owner
    own = scheduler._put_checkpoint(owner, "n", "sampler_weights", "mine", None, {}, None)
    for path in ("/oai/api/v1/models", "/v1/models", "/services/tinker-prod/oai/api/v1/models"):
        listed = (await client.get(path)).json()
        assert [entry["id"] for entry in listed["data"]] == ["fake/model", "alias", own.path]
    assert (await client.get(f"/v1/models/{own.path}")).json()["id"] == own.path
    assert (await client.get(f"/v1/models/{checkpoint.path}")).status_code == 404


@pytest.mark.parametrize("form", ["{}", "fake/model;{}", "alias;{}", "{}:peft:128", "fake/model;{}:peft:64"])
async def test_a_checkpoint_is_named_alone_or_behind_its_base(client, ask, scheduler, form):
    session = (await client.post("/api/v1/create_session", json={})).json()["session_id"]
    for kind in ("sampler_weights", "weights"):
        own = scheduler._put_checkpoint(scheduler.sessions[session].owner, "n", kind, "mine", None, {}, None)
        name = form.format(own.path)
        status, answer = await ask(CHAT, **BODIES[CHAT] | {"model": name, "max_tokens": 2})
        assert status == 200 and answer["model"] == name, answer
        assert scheduler.live.operations[-1][1] == own.path


async def test_another_key_s_checkpoint_does_not_exist(ask, scheduler):
    theirs = scheduler._put_checkpoint("owner-x", "m", "sampler_weights", "mine", None, {}, None)
    assert (await ask(CHAT, **BODIES[CHAT] | {"model": theirs.path}))[0] == 404
    assert scheduler.live.operations == []


class Slow:
    """A live sample that gives out a token and then waits for ever."""

    def __init__(self, scheduler):
        self.num_open = 0
        self.began = asyncio.Event()
        scheduler.sample_live = self.sample_live

    async def sample_live(self, owner, operation, model_path=None):
        from tx_async.scheduler.interface import LivePiece

        self.num_open += 1
        try:
            yield LivePiece(index=0, tokens=b"\x41\0\0\0", logprobs=b"\0\0\0\0")
            self.began.set()
            await asyncio.Event().wait()
        finally:
            self.num_open -= 1


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
async def test_a_client_that_goes_away_ends_its_samples(scheduler, config, path, streams):
    from tx_async.api.routes import create_api

    slow = Slow(scheduler)
    app = create_api(scheduler, config, scheduler.files)
    body = json.dumps(BODIES[path] | {"stream": streams}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await slow.began.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    headers = [(b"content-type", b"application/json"), (b"x-api-key", b"tml-a")]
    scope = {"type": "http", "asgi": {"spec_version": "2.1"}, "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "scheme": "http", "server": ("127.0.0.1", 1), "root_path": ""}
    await asyncio.wait_for(app(scope, receive, send), 30)
    assert slow.began.is_set() and slow.num_open == 0


def test_every_route_stands_under_every_prefix():
    assert {row.path.rpartition("/v1/")[2] for row in ROWS} == {
        "models",
        "models/{model:path}",
        "chat/completions",
        "completions",
        "messages",
        "messages/count_tokens",
    }
    assert len(ROWS) == 3 * 6
