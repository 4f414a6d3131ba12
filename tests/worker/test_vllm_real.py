"""Against a real vLLM: VLLM_VENV names a virtual environment that has one (`testing/vllm_process.py` says how), and
these tests start their own. Minutes, so not a part of the suite otherwise."""

import json
import os
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.durability import wait_until
from tests.support.raw_client import Client
from tx_async.testing.models import make_llama, make_qwen3
from tx_async.testing.server import running_server
from tx_async.testing.vllm_process import running_vllm

VENV = os.environ.get("VLLM_VENV", "")
TOLERANCE = 1e-4
PROMPT = [3, 1, 4, 1, 5]
SIZES = {
    "head_dim": 64, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
}  # fmt: skip
BACKEND = {"max_lora_adapters": 2, "max_lora_rank": 8, "max_sampler_adapters": 4, "max_context_length": 256}
ATTACHED_S = 600.0

pytestmark = pytest.mark.skipif(not VENV, reason="needs a vLLM: set VLLM_VENV")


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def served(request, tmp_path_factory):
    """(server, vLLM, a client): its vLLM is trusted."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {"qwen3": make_qwen3, "llama": make_llama}[request.param]
    model = make(folder / "model", **SIZES)
    with (
        running_vllm(Path(VENV), model, folder / "vllm.log") as vllm,
        running_server(
            model, data_dir=folder / "data", backend_config=BACKEND, external_inference_url=vllm.url
        ) as server,
    ):
        wait_until(lambda: is_trusted(server, 1), ATTACHED_S)
        yield server, vllm, Client(server, model)


def is_trusted(server, times):
    trials = list((server.data_dir / "checkpoints" / "external-trials").glob("*/metadata.json"))
    return server.log().count(" serves /") >= times and not trials


def check(client, sampler, temperature=0.0):
    """What vLLM sampled is, to our own worker, as likely as it says; and the likeliest where it was greedy."""
    sequence = client.outcome(client.ask(sampler, PROMPT, 16, temperature))["sequences"][0]
    scores = {"prompt_logprobs": True, "topk_prompt_logprobs": 1}
    scored = client.outcome(client.ask(sampler, PROMPT + sequence["tokens"], 1, **scores))
    ours = np.array(scored["prompt_logprobs"][len(PROMPT) :])
    difference = np.abs(ours - np.array(sequence["logprobs"])).max()
    assert difference <= TOLERANCE
    if temperature == 0.0:
        likeliest = [candidates[0][0] for candidates in scored["topk_prompt_logprobs"][len(PROMPT) :]]
        assert likeliest == sequence["tokens"]
    return difference


def tokens_of(step):
    return np.random.default_rng(step).integers(0, 256, 12).tolist()


def test_base_and_adapters_are_sampled_as_our_own_worker_knows_them(served):
    _, vllm, client = served
    differences = {"base": check(client, client.base)}
    for name, groups in {"all": {}, "attention": {"train_mlp": False, "train_unembed": False}}.items():
        run = client.run(rank=8, **groups)
        for step in range(3):
            client.train(run, tokens_of(step))
        sampler = client.save(run, name)
        differences[name] = check(client, sampler)
        check(client, sampler, temperature=0.8)
    print(f"largest differences: {differences}")
    assert vllm.log.read_text().count("Loaded new LoRA adapter") >= 3


def test_twelve_versions_take_turns_on_four_slots(served):
    _, _, client = served
    run, samplers = client.run(), []
    for step in range(12):
        client.train(run, tokens_of(step))
        samplers.append(client.save(run, f"v{step}"))
    asked = [client.ask(sampler, PROMPT, 16, num_samples=2) for sampler in samplers]
    assert all(len(client.outcome(promise)["sequences"]) == 2 for promise in asked)
    assert max(check(client, sampler) for sampler in samplers[::4]) <= TOLERANCE


def test_a_stream_brings_the_tokens_as_vllm_samples_them(served):
    server, vllm, client = served
    body = {
        "model": client.model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0, "logprobs": 2,
        "presence_penalty": 0.5, "return_token_ids": True,
    }  # fmt: skip
    whole = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    before = vllm.log.read_text().count("POST /v1/completions")
    tokens, logprobs, num_events = [], [], 0
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                tokens += choice.get("token_ids") or []
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                num_events += 1
    assert vllm.log.read_text().count("POST /v1/completions") == before + 1
    assert num_events > 4 and tokens == whole["token_ids"]
    np.testing.assert_allclose(logprobs, whole["logprobs"]["token_logprobs"], atol=TOLERANCE)


def test_kill_9_in_the_middle_of_64_samples(served):
    server, vllm, client = served
    asked = [client.ask(client.base, PROMPT, 128) for _ in range(64)]
    vllm.kill()
    results = [client.outcome(promise) for promise in asked]
    assert all(len(result["sequences"][0]["tokens"]) == 128 for result in results)
    assert "this worker leaves" in server.log() and "Traceback" not in server.log()


def test_it_is_taken_back_when_it_is_there_again(served):
    """Of the test before, whose vLLM is dead."""
    server, vllm, client = served
    vllm.start()
    vllm.wait_ready()
    wait_until(lambda: is_trusted(server, 2), 200)
    before = vllm.log.read_text().count("POST /v1/completions")
    check(client, client.base)
    assert vllm.log.read_text().count("POST /v1/completions") == before + 1
