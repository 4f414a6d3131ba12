"""Sampling sessions, samples and their results."""

import math

import msgspec
import numpy as np
import pytest
from tinker.proto.response_conv import deserialize_sample_response

from tx_async.api import validation
from tx_async.errors import InvalidRequest

PROTOBUF = "application/x-protobuf"


def prompt(*tokens):
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


@pytest.fixture
def ask(client, sampler_id):
    async def send(seq_id=0, params=None, **fields):
        body = {
            "sampling_session_id": sampler_id,
            "seq_id": seq_id,
            "prompt": prompt(5, 6),
            "sampling_params": {"max_tokens": 3} | (params or {}),
            "num_samples": 1,
        }
        return await client.post("/api/v1/asample", json=body | fields)

    return send


async def test_a_sample_in_protobuf(ask, result):
    promise = await ask(num_samples=2, prompt_logprobs=True)
    ids = promise.json()["sample_sequence_ids"]
    assert len(set(ids)) == 2
    response = deserialize_sample_response((await result(promise, f"{PROTOBUF}, application/json")).content)
    assert [sequence.tokens for sequence in response.sequences] == [[7, 8, 9]] * 2
    assert response.prompt_logprobs == [None, -0.5]


async def test_a_sample_in_json_for_0_6_3(client, sampler_id, result):
    body = {
        "sampling_session_id": sampler_id,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": 1, "seed": None, "stop": None},
        "prompt_logprobs": None,
    }
    answer = (await result(await client.post("/api/v1/asample", json=body))).json()
    assert answer["type"] == "sample"
    assert answer["sequences"] == [{"stop_reason": "length", "tokens": [7], "logprobs": [-0.5]}]


async def test_a_retry_gets_the_same_future_and_the_same_sequence_ids(ask):
    first, again = await ask(num_samples=3), await ask(num_samples=3)
    assert first.json() == again.json()
    assert (await ask(num_samples=2)).status_code == 409


async def test_everything_that_can_be_asked_of_a_prompt(ask, result):
    sparse = {
        "data": [3, -1],
        "dtype": "int64",
        "shape": [1, 4],
        "sparse_crow_indices": [0, 2],
        "sparse_col_indices": [1, 3],
    }
    promise = await ask(
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=2,
        target_prompt_logprobs=sparse,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=1,
    )
    response = deserialize_sample_response((await result(promise, PROTOBUF)).content)
    assert response.topk_prompt_logprobs == [None, [(0, -1.0), (1, -2.0)]]
    targets, alternatives = response.target_prompt_logprobs, response.prompt_alt_tokens
    assert targets is not None and targets.sparse_col_indices == [1, 3]
    np.testing.assert_allclose(targets.data, [-0.3, 0.0], rtol=1e-6)
    assert alternatives is not None and alternatives.tokens.shape == [1, 2]


@pytest.mark.parametrize(
    "stop, strings, tokens, use_eos",
    [
        (None, (), (), True),
        ([], (), (), False),
        ("\n", ("\n",), (), True),
        (["a", "b"], ("a", "b"), (), True),
        ([7, 8], (), (7, 8), True),
    ],
)
async def test_forms_of_stop(ask, scheduler, stop, strings, tokens, use_eos):
    await ask(params={"stop": stop})
    operation = scheduler.operations[-1]
    assert (operation.stop_strings, operation.stop_token_ids, operation.use_eos) == (strings, tokens, use_eos)


@pytest.mark.parametrize("seed, folded", [(5, 5), (-1, 2**63 - 1), (2**64 - 1, 2**63 - 1), (2**63, 0), (None, None)])
async def test_any_64_bit_seed_is_folded(ask, scheduler, seed, folded):
    assert (await ask(params={"seed": seed})).status_code == 200
    assert scheduler.operations[-1].seed == folded


async def test_a_top_k_of_which_too_little_would_be_recorded_is_refused(ask, scheduler):
    assert (await ask(record_stability_info=True, params={"top_k": 500})).status_code == 200
    operation = scheduler.operations[-1]
    with pytest.raises(InvalidRequest, match=r"top_k is 500; .* at most 499 tokens \(`stability_support_max`\)"):
        validation.sample(operation, scheduler.base_model, 64, support_max=499)
    limited = msgspec.structs.replace(operation, top_p=0.5)  # what both leave is known when they are drawn
    assert validation.sample(limited, scheduler.base_model, 64, support_max=499)


async def test_max_tokens_may_be_absent_or_beyond_what_the_prompt_leaves(ask, scheduler):
    await ask(params={"max_tokens": None})
    assert scheduler.operations[-1].max_tokens is None
    context = scheduler.base_model.max_context_length
    assert (await ask(seq_id=1, params={"max_tokens": context})).status_code == 200
    refused = await ask(seq_id=2, params={"max_tokens": context + 1})
    assert refused.status_code == 400 and str(context) in refused.json()["detail"]


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"params": {"max_tokens": 0}}, "max_tokens"),
        ({"params": {"max_tokens": -5}}, "max_tokens"),
        ({"params": {"max_tokens": 2**70}}, "max_tokens"),
        ({"params": {"temperature": -0.1}}, "temperature"),
        ({"params": {"temperature": None}}, "temperature"),
        ({"params": {"top_p": 0}}, "top_p"),
        ({"params": {"top_p": 1.1}}, "top_p"),
        ({"params": {"top_k": 0}}, "top_k"),
        ({"params": {"top_k": -2}}, "top_k"),
        ({"params": {"seed": 2**64}}, "seed"),
        ({"params": {"seed": 1.5}}, "seed"),
        ({"params": {"stop": ["a", 7]}}, "stop"),
        ({"params": {"stop": [""]}}, "stop"),
        ({"params": {"stop": [1000]}}, "1000"),
        ({"params": {"stop": [True]}}, "stop"),
        ({"params": {"stop": ["x"] * 257}}, "stop"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 65}, "num_samples"),
        ({"prompt": prompt()}, "prompt"),
        ({"prompt": {"chunks": []}}, "prompt"),
        ({"prompt": prompt(1000)}, "1000"),
        ({"prompt": prompt(-1)}, "-1"),
        ({"prompt": prompt(2**40)}, "tokens"),
        ({"prompt": prompt(*[1] * 512)}, "512"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "image"),
        ({"prompt": {"chunks": [{"type": "encoded_text"}]}}, "tokens"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": 17}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 10**9}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs"),
        ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs_last_n": 2, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": {"data": [1.0], "dtype": "float32", "shape": [1, 1]}}, "int64"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64"}}, "K"),
        ({"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}}, "K"),
        ({"target_prompt_logprobs": {"data": [1000], "dtype": "int64", "shape": [1, 1]}}, "999"),
        ({"target_prompt_logprobs": {"data": [2**40], "dtype": "int64", "shape": [1, 1]}}, "vocabulary"),
        ({"sampling_session_id": None}, "sampling_session_id"),
        ({"seq_id": -1}, "seq_id"),
    ],
    ids=repr,
)
async def test_a_sample_that_cannot_be_is_a_400_with_the_reason(ask, fields, word):
    response = await ask(**fields)
    assert response.status_code == 400 and word in response.json()["detail"], response.text


async def test_a_prompt_that_fills_the_context_can_be_scored(ask, scheduler):
    full = prompt(*[1] * 512)
    assert (await ask(prompt=full, prompt_logprobs=True, params={"max_tokens": 1})).status_code == 200
    assert scheduler.operations[-1].scores_prompt
    refused = await ask(seq_id=1, prompt=prompt(*[1] * 513), prompt_logprobs=True)
    assert refused.status_code == 400 and "513" in refused.json()["detail"]


async def test_stop_strings_without_a_tokenizer_are_refused_with_the_reason(ask, scheduler):
    problem = "/models/x has no tokenizer.json"
    scheduler.base_model = msgspec.structs.replace(scheduler.base_model, tokenizer_problem=problem)
    refused = await ask(params={"stop": ["\n"]})
    detail = refused.json()["detail"]
    assert refused.status_code == 400 and "tokenizer" in detail and problem not in detail, "paths are the operator's"
    assert refused.json()["category"] == "user"
    assert (await ask(seq_id=1, params={"stop": [7]})).status_code == 200


async def test_unknown_samplers_and_those_of_others_are_a_404(ask, other, sampler_id):
    assert (await ask(sampling_session_id="s:sample:9")).status_code == 404
    body = {"sampling_session_id": sampler_id, "seq_id": 0, "prompt": prompt(1), "sampling_params": {}}
    assert (await other.post("/api/v1/asample", json=body)).status_code == 404
    assert (await other.get(f"/api/v1/samplers/{sampler_id}")).status_code == 404


@pytest.mark.parametrize(
    "change, status",
    [
        ({"base_model": None}, 400),
        ({"base_model": "someone/else"}, 400),
        ({"model_path": "no path"}, 400),
        ({"model_path": "tinker://a/weights/b"}, 404),
        ({"session_id": "s-none"}, 404),
        ({"sampling_session_seq_id": -1}, 400),
    ],
)
async def test_a_sampling_session_that_cannot_be_is_refused(client, session_id, change, status):
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    response = await client.post("/api/v1/create_sampling_session", json=body | change)
    assert response.status_code == status and response.json()["detail"]


async def test_each_client_that_joins_gets_its_own_number(client, sampler_id):
    body = {"sampling_session_id": sampler_id}
    joined = [(await client.post("/api/v1/join_sampling_session", json=body)).json() for _ in range(2)]
    assert [answer["client_counter"] for answer in joined] == [1, 2]


async def test_infinite_temperature_is_refused(client, sampler_id):
    body = f'{{"sampling_session_id":"{sampler_id}","seq_id":0,"prompt":{{"chunks":[{{"tokens":[1]}}]}},' + (
        '"sampling_params":{"temperature":1e999}}'
    )
    response = await client.post("/api/v1/asample", content=body)
    assert response.status_code == 400 and math.isinf(float("1e999"))
