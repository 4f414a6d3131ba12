"""Bodies of older SDKs, and results in the form that they read."""

import json
import math

import msgspec
import numpy as np
import pytest

from tx_async.errors import InvalidRequest
from tx_async.wire import datums, json_results, results, tinker
from tx_async.wire.results import EMPTY_LOGPROB, ForwardBackwardResult, SampledSequence, SampleResult, TopkLogprobs
from tx_async.wire.tensors import Tensor


def decode(kind, value):
    return msgspec.json.decode(json.dumps(value), type=kind)


def test_a_training_request_of_0_6_3_has_chunks_without_type_and_tensors_without_shape():
    body = {
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [2, 3, 4], "dtype": "int64"},
                        "weights": {"data": [0, 1, 1.5], "dtype": "float32", "shape": [3]},
                    },
                }
            ],
            "loss_fn": "cross_entropy",
        },
        "model_id": "s:train:0",
        "seq_id": 3,
    }
    request = decode(tinker.ForwardBackwardRequest, body)
    content = request.forward_backward_input
    operation = datums.forward_backward_from_json(request, content, False, datums.DenseBudget(1000))
    (datum,) = operation.data
    assert np.frombuffer(datum.tokens, "<i4").tolist() == [1, 2, 3]
    assert datum.loss_fn_inputs["target_tokens"].numpy().dtype == np.int64
    assert datum.loss_fn_inputs["weights"].numpy().tolist() == [0.0, 1.0, 1.5]
    assert (operation.seq_id, operation.loss_fn_config, operation.forward_only) == (3, {}, False)


def test_adam_params_of_0_6_3_may_hold_the_learning_rate_only():
    request = decode(
        tinker.OptimStepRequest,
        {"model_id": "m", "seq_id": 2, "adam_params": {"learning_rate": 1e-3}, "type": "optim_step"},
    )
    params = request.adam_params
    assert (params.learning_rate, params.beta1, params.beta2, params.eps) == (1e-3, 0.9, 0.95, 1e-12)
    assert (params.weight_decay, params.grad_clip_norm) == (0.0, 0.0)


def test_optional_fields_accept_null_as_0_6_3_sends_it():
    body = {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "b",
        "user_metadata": None,
        "lora_config": {"rank": 4, "seed": None},
    }
    assert decode(tinker.CreateModelRequest, body).lora_config.train_mlp is True
    sample = {"prompt": {"chunks": []}, "sampling_params": {"max_tokens": None, "seed": None, "stop": None}}
    assert decode(tinker.SampleRequest, sample).sampling_params.temperature == 1.0


def test_null_for_a_number_is_refused_because_it_stands_for_nan():
    with pytest.raises(msgspec.ValidationError, match="learning_rate"):
        decode(tinker.AdamParams, {"learning_rate": None})
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        decode(tinker.SamplingParams, {"temperature": None})
    with pytest.raises(msgspec.ValidationError, match="data"):
        decode(tinker.TensorData, {"data": [1.0, None], "dtype": "float32"})


def test_unknown_fields_are_ignored():
    assert decode(tinker.SessionHeartbeatRequest, {"session_id": "s", "from_the_future": {"a": [1]}}).session_id == "s"


@pytest.mark.parametrize(
    "tensor",
    [
        {"data": [1.5], "dtype": "int64"},
        {"data": [1e300], "dtype": "int64"},
        {"data": [1, 2], "dtype": "int64", "shape": [3]},
        {"data": [1], "dtype": "int64", "shape": [1, 1, 1]},
        {"data": [1], "dtype": "int64", "shape": [-1]},
        {"data": [1], "dtype": "int64", "sparse_crow_indices": [0, 1]},
        {"data": [1], "dtype": "int64", "shape": [1, 1], "sparse_col_indices": [0]},
    ],
)
def test_a_tensor_whose_parts_do_not_fit_is_refused(tensor):
    with pytest.raises(InvalidRequest):
        datums.array_from_json(decode(tinker.TensorData, tensor), datums.DenseBudget(1000))


def test_training_results_as_json():
    result = ForwardBackwardResult(
        logprobs=(Tensor.of(np.array([-0.5, np.nan], np.float32)), Tensor.of(-np.ones((1, 2), np.float32))),
        metrics={"loss:sum": 2.0, "odd:mean": math.inf},
    )
    assert json.loads(results.encode_json(json_results.forward_backward(result))) == {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [
            {"logprobs": {"data": [-0.5, None], "dtype": "float32", "shape": [2]}},
            {"logprobs": {"data": [-1.0, -1.0], "dtype": "float32", "shape": [1, 2]}},
        ],
        "metrics": {"loss:sum": 2.0},
    }


def test_samples_as_json():
    topk = TopkLogprobs.of(np.array([[0, 0], [5, 0]]), np.array([[EMPTY_LOGPROB] * 2, [-1.0, EMPTY_LOGPROB]]))
    sequence = SampledSequence(np.array([7], "<i4").tobytes(), np.array([-2], "<f4").tobytes(), "stop")
    result = SampleResult(
        sequences=(sequence,),
        prompt_logprobs=np.array([np.nan, -0.25], "<f4").tobytes(),
        topk_prompt_logprobs=topk,
    )
    assert json.loads(results.encode_json(json_results.sample(result))) == {
        "type": "sample",
        "sequences": [{"stop_reason": "stop", "tokens": [7], "logprobs": [-2.0]}],
        "prompt_logprobs": [None, -0.25],
        "topk_prompt_logprobs": [None, [[5, -1.0]]],
    }


def test_results_survive_the_journal():
    sample = SampleResult(sequences=(SampledSequence(b"\1\0\0\0", b"\0\0\0\0", "length"),), prompt_cache_hit_tokens=3)
    assert results.decode_sample(results.encode(sample)) == sample
    training = ForwardBackwardResult(logprobs=(Tensor.of(np.ones(2, np.float32)),), metrics={"loss:sum": 1.0})
    assert results.decode_forward_backward(results.encode(training)) == training
