"""Our protobuf against the SDK's own: what it sends is understood, what we send is understood by it."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto import tinker_public_pb2
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tx_async.errors import InvalidRequest
from tx_async.wire import generate_descriptor, protobuf
from tx_async.wire.datums import DenseBudget
from tx_async.wire.results import (
    EMPTY_LOGPROB,
    ForwardBackwardResult,
    PromptAltTokens,
    SampledSequence,
    SampleResult,
    TopkLogprobs,
)
from tx_async.wire.tensors import Tensor

BUDGET = 10**6


def sdk_body(*data, loss_fn="cross_entropy", config=None) -> bytes:
    """What the SDK puts on the wire."""
    content = ForwardBackwardInput(data=list(data), loss_fn=loss_fn, loss_fn_config=config)
    request = ForwardBackwardRequest(forward_backward_input=content, model_id="s:train:0", seq_id=7)
    return forward_backward_request_to_proto(request).SerializeToString()


def sdk_datum(tokens=(1, 2, 3), **inputs) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def decode(body: bytes):
    return protobuf.to_forward_backward(protobuf.parse_forward_backward(body), DenseBudget(BUDGET))


def csr(values, crow, col, shape, dtype="int64") -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=shape, sparse_crow_indices=crow, sparse_col_indices=col)


# ---- requests


def test_a_request_of_the_sdk_becomes_an_operation():
    body = sdk_body(sdk_datum(target_tokens=[2, 3, 4], weights=[1.0, 0.5, -2.0]))
    operation = decode(body)
    assert (operation.model_id, operation.seq_id, operation.loss_fn) == ("s:train:0", 7, "cross_entropy")
    assert not operation.forward_only
    (datum,) = operation.data
    assert np.frombuffer(datum.tokens, "<i4").tolist() == [1, 2, 3]
    assert datum.loss_fn_inputs["target_tokens"].numpy().tolist() == [2, 3, 4]
    assert datum.loss_fn_inputs["weights"].numpy().tolist() == [1.0, 0.5, -2.0]


def test_chunks_of_a_prompt_are_joined():
    chunks = [
        types.EncodedTextChunk(tokens=[1, 2]),
        types.EncodedTextChunk(tokens=[]),
        types.EncodedTextChunk(tokens=[3]),
    ]
    datum = types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs={"target_tokens": [2, 3, 4]})
    assert np.frombuffer(decode(sdk_body(datum)).data[0].tokens, "<i4").tolist() == [1, 2, 3]


def test_sparse_targets_unfold_to_zeros_where_nothing_is_listed():
    sparse = csr([5, 6, 7], [0, 2, 2, 3], [0, 3, 1], [3, 4])
    (datum,) = decode(sdk_body(sdk_datum(target_tokens=sparse))).data
    assert datum.loss_fn_inputs["target_tokens"].numpy().tolist() == [[5, 0, 0, 6], [0, 0, 0, 0], [0, 7, 0, 0]]


def test_numbers_in_the_second_form_of_the_config_win():
    message = tinker_public_pb2.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="dro")
    message.loss_fn_config["beta"] = 1.0
    message.loss_fn_config_v2["beta"].number = 0.05
    assert decode(message.SerializeToString()).loss_fn_config == {"beta": 0.05}


@pytest.mark.parametrize(
    "sparse",
    [
        csr([1], [0, 1], [0], [3, 4]),
        csr([1, 2], [0, 1, 1, 1], [0, 0], [3, 4]),
        csr([1], [0, 2, 1, 1], [0], [3, 4]),
        csr([1], [0, 1, 1, 1], [4], [3, 4]),
        csr([1], [0, 1, 1, 1], [-1], [3, 4]),
        csr([1], [0, 1, 1, 1], [0, 0], [3, 4]),
        csr([1], [0, 1, 1, 1], [0], [3, 4, 1]),
        csr([], [0], [], [0, -1]),
    ],
)
def test_sparse_indices_that_fit_no_array_are_refused_with_the_datum_named(sparse):
    with pytest.raises(InvalidRequest, match=r"data\[0\].*target_tokens"):
        decode(sdk_body(sdk_datum(target_tokens=sparse)))


def test_a_small_body_cannot_unfold_to_gigabytes():
    bomb = csr([1], [0, 1], [10**8 - 1], [1, 10**8])
    with pytest.raises(InvalidRequest, match="unfolded"):
        decode(sdk_body(sdk_datum(target_tokens=bomb)))


def test_images_are_refused_by_name():
    chunk = types.ImageChunk(data=b"png", format="png")
    datum = types.Datum(model_input=types.ModelInput(chunks=[chunk]), loss_fn_inputs={"target_tokens": [1]})
    with pytest.raises(InvalidRequest, match="image"):
        decode(sdk_body(datum))


def test_text_in_the_loss_config_is_refused():
    with pytest.raises(InvalidRequest, match="loss_id"):
        decode(sdk_body(sdk_datum(target_tokens=[1, 2, 3]), loss_fn="custom", config={"loss_id": "x"}))


@pytest.mark.parametrize("model_id, seq_id", [("", 1), ("m", 0), ("m", -1)])
def test_a_request_that_does_not_say_whose_it_is_is_malformed(model_id, seq_id):
    message = tinker_public_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id)
    with pytest.raises(InvalidRequest, match="model_id"):
        protobuf.parse_forward_backward(message.SerializeToString())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_decoded_but_never_crash(body):
    with contextlib.suppress(InvalidRequest):
        decode(body)
    protobuf.peek_ids(body)


@given(st.data())
def test_damaged_requests_are_refused_or_decoded_but_never_crash(data):
    """One byte of a real request flips: lengths, shapes and indices may then say anything."""
    sparse = csr([5, 6], [0, 1, 1, 2], [0, 3], [3, 4])
    body = bytearray(sdk_body(sdk_datum(target_tokens=sparse, weights=[1.0, 1.0, 1.0]), config={"a": 1.0}))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequest):
        decode(bytes(body))


def test_the_ids_are_found_at_the_start_of_a_body_that_is_too_large():
    body = sdk_body(*[sdk_datum(target_tokens=[1, 2, 3])] * 1000)
    assert protobuf.peek_ids(body[:64]) == ("s:train:0", 7)
    assert protobuf.peek_ids(body[:5]) is None
    assert protobuf.peek_ids(b"\xff" * 64) is None
    assert protobuf.peek_ids(b"") is None


# ---- results


def test_the_sdk_reads_training_results_of_any_mix_of_shapes():
    shapes = [(3,), (1,), (2, 4), (5, 4), (2, 1), (3,)]
    arrays = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    result = ForwardBackwardResult(
        logprobs=tuple(map(Tensor.of, arrays)), metrics={"loss:sum": 1.5, "odd:max": math.nan}
    )
    output = deserialize_forward_backward_output(protobuf.encode_forward_backward(result))
    assert output.loss_fn_output_type == "ArrayRecord"
    assert output.metrics["loss:sum"] == 1.5 and math.isnan(output.metrics["odd:max"])
    assert len(output.loss_fn_outputs) == len(arrays)
    for array, fields in zip(arrays, output.loss_fn_outputs, strict=True):
        assert list(fields["logprobs"].shape) == list(array.shape)
        np.testing.assert_array_equal(np.reshape(fields["logprobs"].data, array.shape), array)


def test_the_sdk_reads_samples_with_everything_that_can_be_asked_for():
    topk = TopkLogprobs.of(np.array([[0, 0], [3, 4]]), np.array([[EMPTY_LOGPROB] * 2, [-1.0, -2.0]]))
    targets = np.array([[-0.5, 0.0, -0.25]], np.float32)
    result = SampleResult(
        sequences=(
            SampledSequence(np.array([7, 8], "<i4").tobytes(), np.array([-1, -2], "<f4").tobytes(), "stop", topk),
            SampledSequence(np.array([9], "<i4").tobytes(), np.array([-3], "<f4").tobytes(), "length"),
        ),
        prompt_logprobs=np.array([np.nan, -0.75], "<f4").tobytes(),
        topk_prompt_logprobs=topk,
        target_prompt_logprobs=Tensor.of(targets),
        target_layout=(np.array([0, 2], "<i8").tobytes(), np.array([0, 2], "<i8").tobytes()),
        prompt_alt_tokens=PromptAltTokens(
            Tensor.of(np.array([[5, 6]], np.int32)), Tensor.of(-np.ones((1, 2), np.float32))
        ),
        prompt_cache_hit_tokens=16,
    )
    response = deserialize_sample_response(protobuf.encode_sample(result))
    first, second = response.sequences
    assert (first.tokens, first.stop_reason, first.logprobs) == ([7, 8], "stop", [-1.0, -2.0])
    assert (second.tokens, second.stop_reason, second.logprobs) == ([9], "length", [-3.0])
    assert response.prompt_logprobs == [None, -0.75]
    assert response.topk_prompt_logprobs == [None, [(3, -1.0), (4, -2.0)]]
    assert response.target_prompt_logprobs.data == [-0.5, -0.25]
    assert response.target_prompt_logprobs.sparse_col_indices == [0, 2]
    assert response.target_prompt_logprobs.shape == [1, 3]
    assert response.prompt_alt_tokens.tokens.data == [5, 6]
    assert response.prompt_cache_hit_tokens == 16


def test_the_sdk_reads_dense_target_logprobs_in_the_shape_that_was_asked_for():
    result = SampleResult(sequences=(), target_prompt_logprobs=Tensor.of(np.array([[-0.5], [0.0]], np.float32)))
    response = deserialize_sample_response(protobuf.encode_sample(result))
    assert response.target_prompt_logprobs.shape == [2, 1]
    assert response.target_prompt_logprobs.data == [-0.5, 0.0]
    assert response.prompt_logprobs is None and response.prompt_alt_tokens is None


# ---- the schema


def test_the_field_numbers_are_the_sdks():
    """Every message and enum of ours has the fields of the SDK's, by number, type and label."""
    theirs = tinker_public_pb2.DESCRIPTOR.message_types_by_name
    ours = protobuf.ForwardBackwardRequest.DESCRIPTOR.file.message_types_by_name
    assert len(ours) >= 18
    for name, message in ours.items():
        described = {(f.number, f.name, f.type, f.is_repeated, f.has_presence) for f in message.fields}
        assert described == {(f.number, f.name, f.type, f.is_repeated, f.has_presence) for f in theirs[name].fields}, (
            name
        )


def test_the_descriptor_in_the_package_is_the_schemas():
    pytest.importorskip("grpc_tools", reason="the schema's compiler, grpcio-tools, is not installed")
    assert generate_descriptor.compile_descriptor() == generate_descriptor.DESCRIPTOR.read_bytes(), (
        "schemas/tinker.proto changed: run python -m tx_async.wire.generate_descriptor"
    )
