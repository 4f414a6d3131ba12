"""The real `openai` and `anthropic` clients, sync and async, against a real server, beside the real SDK."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import anthropic
import openai
import pydantic
import pytest

from tests.support.chat_templates import QWEN3, make_chat_tokenizer
from tests.support.durability import kill_worker
from tx_async.testing.models import make_qwen3
from tx_async.testing.server import ServerProcess, running_server

BACKEND = {"max_lora_adapters": 4, "max_lora_rank": 32, "max_context_length": 1024}
KEY = "tml-dummy"
USER = [{"role": "user", "content": "Hi!"}]
TIGHT = {"x-guidance": {"whitespace_flexible": False}}
"""A model with random weights likes white space."""
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
BOUND = {"type": "object", "properties": {"n": {"enum": [2, 3]}}, "additionalProperties": False, **TIGHT}
BOUND_TOOL = {"type": "function", "function": {"name": "add", "parameters": BOUND}}
ANTHROPIC_TOOL = {"name": "add", "input_schema": TOOL["function"]["parameters"]}
CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'
END = 256
GREEDY = {"temperature": 0.0}
"""As a field of the body: one of the clients does not name it."""
STEPS, LEARNING_RATE = 40, 0.005


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_qwen3(tmp_path_factory.mktemp("chat") / "model", tokenizer=False)
    return make_chat_tokenizer(folder, QWEN3)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[ServerProcess]:
    data_dir = tmp_path_factory.mktemp("server")
    with running_server(folder, data_dir=data_dir, backend_config=BACKEND) as server:
        yield server
    assert "Traceback" not in server.log(), server.log_tail()


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(folder)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/oai/api/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"{server.base_url}/anthropic/api", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def caller(server: ServerProcess, model: str, client: openai.OpenAI) -> str:
    """A checkpoint that answers with a call, trained here."""
    import tinker

    asked = client.chat.completions.create(
        model=model, messages=USER, tools=[TOOL], max_tokens=1, extra_body={"return_token_ids": True}
    )
    prompt = asked.model_extra["prompt_token_ids"]
    with tinker.ServiceClient(base_url=server.base_url, api_key=KEY) as service:
        trainer = service.create_lora_training_client(base_model=model, rank=32, seed=1).result()
        answer = [*trainer.get_tokenizer().encode(CALL, add_special_tokens=False), END]
        tokens = [*prompt, *answer]
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
                "weights": tinker.TensorData(
                    data=[0.0] * (len(prompt) - 1) + [1.0] * len(answer), dtype="float32", shape=[len(tokens) - 1]
                ),
            },
        )
        for _ in range(STEPS):
            trainer.forward_backward([datum], "cross_entropy")
            done = trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        done.result()
        return trainer.save_weights_for_sampler(name="caller").result().path


@pytest.fixture(scope="module")
def sampler(server: ServerProcess, model: str):
    import tinker

    with tinker.ServiceClient(base_url=server.base_url, api_key=KEY) as service:
        yield service.create_sampling_client(base_model=model).result()


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}])
def test_a_chat_is_the_sdk_s_sample_of_the_same_tokens(client, sampler, model, more):
    import tinker

    answer = client.chat.completions.create(
        model=model, messages=USER, n=2, max_tokens=12, logprobs=True, extra_body={"return_token_ids": True}, **more
    )
    prompt = answer.model_extra["prompt_token_ids"]
    params = tinker.SamplingParams(max_tokens=12, **more)
    expected = sampler.sample(tinker.ModelInput.from_ints(prompt), num_samples=2, sampling_params=params).result()
    assert len(expected.sequences) == 2
    for choice, sequence in zip(answer.choices, expected.sequences, strict=True):
        assert choice.model_extra["token_ids"] == sequence.tokens
        assert [entry.logprob for entry in choice.logprobs.content] == sequence.logprobs
        assert choice.finish_reason == sequence.stop_reason
    scored = sampler.compute_logprobs(tinker.ModelInput.from_ints([*prompt, *expected.sequences[0].tokens])).result()
    ours = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert ours == pytest.approx(scored[len(prompt) :], abs=1e-4)


def test_echo_scores_a_prompt_as_compute_logprobs_does(client, sampler, model):
    import tinker

    answer = client.completions.create(model=model, prompt="Hello é!", echo=True, logprobs=1, max_tokens=1)
    found = answer.choices[0].logprobs
    num_tokens = answer.usage.prompt_tokens
    tokens = (
        client.completions.create(model=model, prompt="Hello é!", max_tokens=1, extra_body={"return_token_ids": True})
        .choices[0]
        .model_extra["prompt_token_ids"]
    )
    expected = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    assert found.token_logprobs[0] is None and expected[0] is None
    assert found.token_logprobs[1:num_tokens] == pytest.approx(expected[1:], abs=1e-4)
    assert answer.choices[0].text.startswith("Hello é!")
    assert found.text_offset[:num_tokens] == [0, 1, 2, 3, 4, 5, 6, 6, 7]


async def test_streams_say_what_whole_answers_say(server, client, claude, model):
    fields = {"model": model, "messages": USER, "max_tokens": 20, "extra_body": GREEDY}
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields) as stream:
        chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0) as other:
        assert (await other.chat.completions.create(**fields)).choices == whole.choices
        stream = await other.chat.completions.create(stream=True, **fields)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
        completed = await other.completions.create(model=model, prompt="a", max_tokens=5, temperature=0.0)
        pieces = await other.completions.create(model=model, prompt="a", max_tokens=5, temperature=0.0, stream=True)
        assert "".join([piece.choices[0].text async for piece in pieces]) == completed.choices[0].text
    message = claude.messages.create(**fields)
    assert message.content[0].text == text and message.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage == message.usage
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key=KEY, max_retries=0) as other:
        assert (await other.messages.create(**fields)).content == message.content
        async with other.messages.stream(**fields) as stream:
            assert (await stream.get_final_text()) == text
        counted = await other.messages.count_tokens(model=model, messages=USER)
        assert counted.input_tokens == message.usage.input_tokens == whole.usage.prompt_tokens


def test_a_trained_checkpoint_calls_its_tool(client, claude, caller):
    fields = {"model": caller, "messages": USER, "max_tokens": 100, "extra_body": GREEDY}
    choice = client.chat.completions.create(tools=[TOOL], **fields).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    assert [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls] == [
        ("add", {"n": 2})
    ]
    with client.chat.completions.stream(tools=[TOOL], **fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == choice.message.tool_calls[0].function.arguments
    message = claude.messages.create(tools=[ANTHROPIC_TOOL], **fields)
    assert (message.stop_reason, message.content[-1].name, message.content[-1].input) == ("tool_use", "add", {"n": 2})
    with claude.messages.stream(tools=[ANTHROPIC_TOOL], **fields) as stream:
        assert stream.get_final_message().content[-1].input == {"n": 2}
    answered = [
        *USER,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "4"},
    ]
    assert client.chat.completions.create(tools=[TOOL], **fields | {"messages": answered, "max_tokens": 3}).choices


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(json_schema_extra=TIGHT)
    name: Literal["Ada", "Alan"]
    born: int = pydantic.Field(ge=1800, le=2000)


def test_an_untrained_model_keeps_to_what_it_must_answer(client, claude, model):
    """Its weights are random: only its grammar can have made it say this."""
    fields = {"model": model, "messages": USER, "max_tokens": 200}
    unthinking = {"chat_template_kwargs": {"enable_thinking": False}}
    parsed = client.chat.completions.parse(response_format=Person, seed=3, n=2, extra_body=unthinking, **fields)
    assert [choice.finish_reason for choice in parsed.choices] == ["stop"] * 2
    assert all(choice.message.parsed.name in ("Ada", "Alan") for choice in parsed.choices)
    choice = {"type": "function", "function": {"name": "add"}}
    with client.chat.completions.stream(
        tools=[BOUND_TOOL], tool_choice=choice, seed=1, extra_body=unthinking, **fields
    ) as stream:
        said = stream.get_final_completion().choices[0]
    assert said.finish_reason == "tool_calls", said
    assert set(json.loads(said.message.tool_calls[0].function.arguments)) <= {"n"}
    tool = {"name": "add", "input_schema": BOUND}
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    message = claude.messages.create(tools=[tool], tool_choice=any_one, thinking={"type": "disabled"}, **fields)
    assert (message.stop_reason, message.content[-1].name) == ("tool_use", "add"), message
    grammar = {"grammar": 'root ::= "yes" | "no"'}
    assert client.completions.create(model=model, prompt="a", extra_body=grammar).choices[0].text in ("yes", "no")


def test_what_one_key_saved_does_not_exist_for_another(server, client, claude, caller):
    assert caller in [entry.id for entry in client.models.list()]
    stranger = client.with_options(api_key="tml-other")
    assert caller not in [entry.id for entry in stranger.models.list()]
    with pytest.raises(openai.NotFoundError) as refused:
        stranger.chat.completions.create(model=caller, messages=USER)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(anthropic.NotFoundError):
        claude.with_options(api_key="tml-other").messages.create(model=caller, messages=USER, max_tokens=5)


def test_errors_are_the_clients_own(client, claude, model):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=USER, extra_body={"grammar": "start: ("})
    assert refused.value.param == "grammar"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="a" * 2000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="first message"):
        claude.messages.create(model=model, messages=[{"role": "assistant", "content": "a"}], max_tokens=5)


def samples_open(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("tx_async_scheduler_samples_open"))


async def test_nothing_runs_on_for_clients_that_went_away(server, client, claude, model):
    body = {"ignore_eos": True}
    stream = client.chat.completions.create(model=model, messages=USER, max_tokens=900, stream=True, extra_body=body)
    for _ in range(3):
        next(stream)
    assert samples_open(server) > 0
    stream.close()
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0) as other:
        task = asyncio.create_task(other.completions.create(model=model, prompt="a", max_tokens=900, extra_body=body))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for _ in range(600):
        if not samples_open(server):
            break
        await asyncio.sleep(0.1)
    assert samples_open(server) == 0


def test_streams_go_on_after_the_worker_s_death_and_say_nothing_twice(server, client, model):
    """kill -9 of the worker once both have begun: another one samples the same tokens from the beginning."""
    plain = {
        "messages": USER,
        "max_tokens": 150,
        "seed": 5,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60, **TIGHT}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    bound = {"messages": USER, "max_tokens": 700, "seed": 5, "response_format": form}
    bound["extra_body"] = {"return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}}
    expected = [client.chat.completions.create(model=model, **fields) for fields in (plain, bound)]
    streams = [client.chat.completions.create(model=model, stream=True, **fields) for fields in (plain, bound)]
    said: list[list[int]] = [[], []]
    for stream, tokens in zip(streams, said, strict=True):
        while len(tokens) < 10:
            tokens += next(stream).choices[0].model_extra.get("token_ids") or []
    kill_worker(server)
    for stream, tokens, whole in zip(streams, said, expected, strict=True):
        choices = [choice for chunk in stream for choice in chunk.choices]
        tokens += [token for choice in choices for token in choice.model_extra.get("token_ids") or ()]
        assert tokens == whole.choices[0].model_extra["token_ids"]
        assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert len(json.loads(expected[1].choices[0].message.content)) == 60
