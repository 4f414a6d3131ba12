"""Creating models, and every request of a model's sequence."""

import json
import math

import msgspec
import numpy as np
import pytest
import zstandard
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tx_async.wire import operations

PROTOBUF = "application/x-protobuf"


def datum(tokens=(1, 2, 3), **inputs):
    inputs = inputs or {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def policy_datum(**changes):
    inputs = {"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, -1.0]}
    inputs = {name: value for name, value in (inputs | changes).items() if value is not None}
    return datum((1, 2), **inputs)


def numbers(values, dtype="float32", shape=None):
    return types.TensorData(data=values, dtype=dtype, shape=shape or [len(values)])


@pytest.fixture
def submit(client, model_id):
    """Send forward_backward as the SDK does."""

    async def send(*data, loss_fn="cross_entropy", config=None, seq_id=1, headers=None, pack=bytes, **fields):
        content = ForwardBackwardInput(data=list(data), loss_fn=loss_fn, loss_fn_config=config)
        request = ForwardBackwardRequest(forward_backward_input=content, model_id=model_id, seq_id=seq_id)
        message = forward_backward_request_to_proto(request)
        for name, value in fields.items():
            setattr(message, name, value)
        body = pack(message.SerializeToString())
        return await client.post(
            "/api/v1/forward_backward", content=body, headers={"content-type": PROTOBUF} | (headers or {})
        )

    return send


# ---- models


async def test_a_model_is_created_and_described(client, session_id, model_id, scheduler):
    assert model_id == f"{session_id}:train:0"
    info = (await client.post("/api/v1/get_info", json={"model_id": model_id})).json()
    assert info["model_id"] == model_id and info["lora_rank"] == 8 and info["is_lora"] is True
    assert info["model_data"]["model_name"] == "fake/model"


async def test_creating_the_same_model_again_returns_the_same_future_and_seed(client, session_id, scheduler):
    body = {"session_id": session_id, "model_seq_id": 3, "base_model": "fake/model", "lora_config": {"rank": 4}}
    first = await client.post("/api/v1/create_model", json=body)
    again = await client.post("/api/v1/create_model", json=body)
    assert first.json() == again.json() and len(scheduler.operations) == 1
    other_rank = body | {"lora_config": {"rank": 5}}
    assert (await client.post("/api/v1/create_model", json=other_rank)).status_code == 409


@pytest.mark.parametrize(
    "change, word",
    [
        ({"base_model": "someone/else"}, "base_model"),
        ({"lora_config": {"rank": 0}}, "rank"),
        ({"lora_config": {"rank": 33}}, "rank"),
        ({"lora_config": {"rank": -1}}, "rank"),
        ({"lora_config": {"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False}}, "train_attn"),
        ({"lora_config": {"rank": 8, "seed": 2**64}}, "seed"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "dimuon"),
        ({"model_seq_id": -1}, "model_seq_id"),
        ({"user_metadata": {"n": 2**70}}, "user_metadata"),
    ],
)
async def test_a_model_that_cannot_be_is_refused_with_the_reason(client, session_id, change, word):
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "fake/model", "lora_config": {"rank": 8}}
    response = await client.post("/api/v1/create_model", json=body | change)
    assert response.status_code == 400 and word in response.json()["detail"]


async def test_a_model_in_an_unknown_session_is_a_404_and_in_an_ended_one_a_410(client, session_id):
    body = {"session_id": "s-none", "model_seq_id": 0, "base_model": "fake/model"}
    assert (await client.post("/api/v1/create_model", json=body)).status_code == 404
    await client.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})
    body["session_id"] = session_id
    assert (await client.post("/api/v1/create_model", json=body)).status_code == 410


# ---- forward_backward


async def test_forward_backward_in_protobuf_and_back(submit, result):
    response = await result(await submit(datum()), PROTOBUF)
    assert response.headers["content-type"] == PROTOBUF
    output = deserialize_forward_backward_output(response.content)
    np.testing.assert_allclose(output.loss_fn_outputs[0]["logprobs"].data, [-0.2, -0.3, -0.4], rtol=1e-6)
    assert math.isclose(output.metrics["loss:sum"], 0.9, rel_tol=1e-6)


async def test_an_older_sdk_trains_in_json(client, model_id, result):
    content = {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": [1, 2]}]},
                "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64"}},
            }
        ],
        "loss_fn": "cross_entropy",
    }
    for seq_id, path, field in ((1, "forward_backward", "forward_backward_input"), (2, "forward", "forward_input")):
        body = {field: content, "model_id": model_id, "seq_id": seq_id}
        output = (await result(await client.post(f"/api/v1/{path}", json=body))).json()
        assert output["loss_fn_outputs"][0]["logprobs"]["shape"] == [2]
        assert output["metrics"] == {"loss:sum": pytest.approx(0.5)}


async def test_packed_bodies(submit, result):
    promise = await submit(datum(), headers={"content-encoding": "zstd"}, pack=zstandard.compress)
    assert (await result(promise, PROTOBUF)).headers["content-type"] == PROTOBUF


async def test_defaults_are_filled_in_before_anything_is_stored(submit, scheduler):
    """Replay starts from stored operations: a later change of a default must not change them."""
    await submit(datum(target_tokens=[2, 3, 4]), seq_id=1)
    await submit(policy_datum(), loss_fn="ppo", config={"clip_high_threshold": 1.5}, seq_id=2)
    await submit(datum(target_tokens=numbers([2, 3, 4], "int64"), weights=numbers([1, 2, 3], "int64")), seq_id=3)
    _, first, second, third = scheduler.operations
    assert first.data[0].loss_fn_inputs["weights"].numpy().tolist() == [1.0, 1.0, 1.0]
    assert second.loss_fn_config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}
    weights = third.data[0].loss_fn_inputs["weights"]
    assert weights.dtype == "float32" and weights.numpy().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo"])
async def test_policy_losses_are_accepted(submit, result, loss_fn):
    assert (await result(await submit(policy_datum(), loss_fn=loss_fn), PROTOBUF)).headers["content-type"] == PROTOBUF


async def test_per_token_inputs_are_accepted_where_the_loss_knows_them(submit, scheduler):
    low, high = numbers([0.5, 0.5]), numbers([2.0, math.inf])
    clipped = policy_datum(clip_low_threshold=low, clip_high_threshold=high)
    await submit(clipped, loss_fn="ppo", seq_id=1)
    await submit(policy_datum(sequence_ratio_mask=numbers([1.0, 0.0])), loss_fn="gspo", seq_id=2)
    assert [type(operation).__name__ for operation in scheduler.operations[1:]] == ["ForwardBackward"] * 2


async def test_targets_of_two_dimensions(submit, result):
    targets = numbers([2, 3, 4, 5], "int64", [2, 2])
    response = await result(await submit(datum((1, 2), target_tokens=targets)), PROTOBUF)
    (fields,) = deserialize_forward_backward_output(response.content).loss_fn_outputs
    assert list(fields["logprobs"].shape) == [2, 2]


TOO_WIDE = numbers([1] * 17, "int64", [1, 17])

BAD_DATA = {
    "no data": ([], {}, "empty"),
    "an empty datum": ([datum((), target_tokens=numbers([], "int64"))], {}, "empty"),
    "lengths differ": ([datum((1, 2), target_tokens=[1, 2, 3])], {}, "equal"),
    "weights of another length": ([datum(target_tokens=[1, 2, 3], weights=[1.0])], {}, "weights"),
    "no targets": ([datum(weights=[1.0, 1.0, 1.0])], {}, "target_tokens"),
    "a token beyond the vocabulary": ([datum((1, 1000, 2))], {}, "1000"),
    "a negative token": ([datum((1, -1, 2))], {}, "-1"),
    "a target beyond the vocabulary": ([datum(target_tokens=[1, 2, 1000])], {}, "target_tokens"),
    "targets that are no integers": ([datum(target_tokens=numbers([1, 2, 3]))], {}, "int64"),
    "longer than the context": ([datum([1] * 513, target_tokens=[1] * 513)], {}, "512"),
    "NaN weights": ([datum(target_tokens=[1, 2, 3], weights=[1.0, math.nan, 1.0])], {}, "weights"),
    "infinite weights": ([datum(target_tokens=[1, 2, 3], weights=[1.0, math.inf, 1.0])], {}, "weights"),
    "NaN advantages": ([policy_datum(advantages=[math.nan, 1.0])], {"loss_fn": "ppo"}, "advantages"),
    "infinite logprobs": ([policy_datum(logprobs=[-math.inf, 1.0])], {"loss_fn": "ppo"}, "logprobs"),
    "NaN thresholds": ([policy_datum(clip_low_threshold=[math.nan, 1.0])], {"loss_fn": "ppo"}, "clip_low_threshold"),
    "unknown loss": ([datum()], {"loss_fn": "cross_entropyy"}, "cross_entropyy"),
    "server-side custom loss": ([datum()], {"loss_fn": "custom", "config": {"loss_id": "l"}}, "loss_id"),
    "unknown input": ([policy_datum(mask=numbers([1.0, 1.0]))], {"loss_fn": "importance_sampling"}, "mask"),
    "unknown config": ([policy_datum()], {"loss_fn": "ppo", "config": {"clip_low": 0.5}}, "clip_low"),
    "config of a loss that has none": ([datum()], {"config": {"beta": 0.5}}, "beta"),
    "dro without beta": ([policy_datum()], {"loss_fn": "dro"}, "beta"),
    "NaN config": ([policy_datum()], {"loss_fn": "dro", "config": {"beta": math.nan}}, "beta"),
    "thresholds crossed": (
        [policy_datum()],
        {"loss_fn": "ppo", "config": {"clip_low_threshold": 1.3}},
        "clip_low_threshold",
    ),
    "no advantages": ([policy_datum(advantages=None)], {"loss_fn": "ppo"}, "advantages"),
    "too many targets per token": ([datum((1,), target_tokens=TOO_WIDE)], {}, "17"),
    "wide targets for a policy loss": (
        [policy_datum(target_tokens=numbers([1, 2, 3, 4], "int64", [2, 2]))],
        {"loss_fn": "ppo"},
        "cross_entropy",
    ),
    "an image": (
        [
            types.Datum(
                model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")]),
                loss_fn_inputs={"target_tokens": [1]},
            )
        ],
        {},
        "image",
    ),
    "the second datum": ([datum(), datum((1, 2), target_tokens=[1])], {}, r"data[1]"),
}


@pytest.mark.parametrize("data, options, word", BAD_DATA.values(), ids=BAD_DATA.keys())
async def test_bad_training_data_fails_in_its_place_and_harms_nobody(submit, result, data, options, word):
    """The submit is accepted, the future fails with category user, and the next request runs."""
    failure = (await result(await submit(*data, seq_id=1, **options), PROTOBUF)).json()
    assert failure["category"] == "user" and word in failure["error"], failure
    assert (await result(await submit(datum(), seq_id=2), PROTOBUF)).headers["content-type"] == PROTOBUF


async def test_a_body_over_the_limit_fails_in_its_place_too(submit, result, scheduler):
    big = datum([1] * 500, target_tokens=[1] * 500)
    for seq_id, options in enumerate(({}, {"headers": {"content-encoding": "zstd"}, "pack": zstandard.compress}), 1):
        failure = (await result(await submit(*[big] * 200, seq_id=seq_id, **options))).json()
        assert failure["category"] == "user" and "200000" in failure["error"]
    assert [type(operation) for operation in scheduler.operations[1:]] == [operations.Rejected] * 2


async def test_protobuf_that_is_none_is_a_400(client):
    for body in (b"\xff\xff", b""):
        response = await client.post("/api/v1/forward_backward", content=body, headers={"content-type": PROTOBUF})
        assert response.status_code == 400 and response.json()["detail"]


async def test_later_chunks_may_come_before_the_first(submit, client, scheduler):
    """Chunks 2 … N are submitted before chunk 1: each is promised at once, and none runs before its turn."""
    second = (await submit(datum(), seq_id=2)).json()["request_id"]
    pending = await client.post("/api/v1/retrieve_future", json={"request_id": second})
    assert pending.status_code == 408
    await submit(datum(), seq_id=1)
    done = await client.post("/api/v1/retrieve_future", json={"request_id": second}, headers={"accept": PROTOBUF})
    assert done.status_code == 200


async def test_a_retry_gets_the_same_future_and_another_body_a_conflict(submit):
    first, again = await submit(datum()), await submit(datum(), headers={"x-idempotency-key": "fresh"})
    assert first.json()["request_id"] == again.json()["request_id"]
    conflict = await submit(datum((3, 4, 5)))
    assert conflict.status_code == 409 and conflict.json()["category"] == "user"


async def test_an_unknown_model_is_a_404_whatever_the_body(submit, client, model_id, other):
    response = await submit(datum(), model_id="s:train:9")
    assert response.status_code == 404 and "model_id" in response.json()["detail"]
    body = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    assert (await other.post("/api/v1/optim_step", json=body)).status_code == 404


async def test_a_full_queue_is_a_429_with_a_time_to_retry(submit, scheduler):
    scheduler.overloaded = True
    response = await submit(datum())
    assert response.status_code == 429 and float(response.headers["retry-after"]) > 0


# ---- optim_step


@pytest.mark.parametrize("field", ["adam_params", "optimizer_params", "optim_params"])
async def test_adam_params_under_each_of_their_names(client, model_id, result, scheduler, field):
    body = {"model_id": model_id, "seq_id": 1, field: {"learning_rate": 0.5, "grad_clip_norm": 1.0}}
    answer = (await result(await client.post("/api/v1/optim_step", json=body))).json()
    assert answer == {"metrics": {"step": 1.0}}
    params = scheduler.operations[-1].adam_params
    assert (params.learning_rate, params.beta2, params.grad_clip_norm) == (0.5, 0.95, 1.0)


@pytest.mark.parametrize(
    "params",
    [
        {"learning_rate": -1.0},
        {"learning_rate": None},
        {"learning_rate": "fast"},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1e-9},
        {"grad_clip_norm": -1.0},
        {"weight_decay": -0.1},
        None,
    ],
    ids=repr,
)
async def test_bad_adam_params_fail_in_their_place(client, model_id, result, params):
    body = {"model_id": model_id, "seq_id": 1, "adam_params": params}
    failure = (await result(await client.post("/api/v1/optim_step", json=body))).json()
    field = next(iter(params)) if params else "adam_params"
    assert failure["category"] == "user" and field in failure["error"]
    good = {"model_id": model_id, "seq_id": 2, "adam_params": {}}
    assert (await result(await client.post("/api/v1/optim_step", json=good))).json() == {"metrics": {"step": 1.0}}


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_json_does_not_have_fail_in_their_place(client, model_id, result, literal):
    body = json.dumps({"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": 0}}).replace(
        ": 0}", f": {literal}}}"
    )
    failure = (await result(await client.post("/api/v1/optim_step", content=body))).json()
    assert failure["category"] == "user"


async def test_another_optimizers_params_fail_in_their_place(client, model_id, result):
    body = {"model_id": model_id, "seq_id": 1, "optimizer_params": {"type": "dimuon", "learning_rate": 1.0}}
    failure = (await result(await client.post("/api/v1/optim_step", json=body))).json()
    assert failure["category"] == "user" and "dimuon" in failure["error"]


@pytest.mark.parametrize(
    "ids", [{}, {"model_id": "m"}, {"seq_id": 1}, {"model_id": "m", "seq_id": 0}, {"model_id": "", "seq_id": 1}]
)
async def test_a_request_that_does_not_say_whose_it_is_is_a_400(client, ids):
    response = await client.post("/api/v1/optim_step", json=ids | {"adam_params": {}})
    assert response.status_code == 400 and response.json()["detail"]


# ---- names of the base model


@pytest.mark.parametrize("name", ["fake/model", "fake/model/", "also", "fake/model:peft:512", "also:peft:1"])
async def test_every_name_of_the_base_model_is_taken_and_one_is_reported(client, scheduler, session_id, name):
    scheduler.base_model = msgspec.structs.replace(scheduler.base_model, aliases=("also",))
    body = {"session_id": session_id, "model_seq_id": 4, "base_model": name}
    model_id = (await client.post("/api/v1/create_model", json=body)).json()["model_id"]
    info = (await client.post("/api/v1/get_info", json={"model_id": model_id})).json()
    assert info["model_data"]["model_name"] == "fake/model"
    sampler = {"session_id": session_id, "sampling_session_seq_id": 4, "base_model": name}
    assert (await client.post("/api/v1/create_sampling_session", json=sampler)).status_code == 200


OTHERS = ["fake/model:peft:513", "fake/model:peft:x", "fake/model:peft:", "other:peft:8", "model"]


@pytest.mark.parametrize("name", OTHERS)
async def test_a_name_that_does_not_fit_is_refused_with_the_reason(client, session_id, name):
    body = {"session_id": session_id, "model_seq_id": 4, "base_model": name}
    refused = await client.post("/api/v1/create_model", json=body)
    assert refused.status_code == 400 and "fake/model" in refused.json()["detail"]


async def test_a_rank_that_is_too_high_names_the_setting(client, session_id):
    body = {"session_id": session_id, "model_seq_id": 4, "base_model": "fake/model", "lora_config": {"rank": 4096}}
    refused = await client.post("/api/v1/create_model", json=body)
    assert refused.status_code == 400 and "max_lora_rank" in refused.json()["detail"]
