"""Sampling sessions and samples."""

from __future__ import annotations

import numpy as np

from tx_async.api import body, measure, training, validation
from tx_async.api.context import Call
from tx_async.api.ownership import owned
from tx_async.errors import InvalidRequest, UnknownSampler
from tx_async.wire import datums, operations, tinker
from tx_async.wire.tensors import Tensor


async def create_sampling_session(
    call: Call, request: tinker.CreateSamplingSessionRequest
) -> tinker.CreateSamplingSessionResponse:
    base_model = request.base_model
    if base_model is not None:
        base_model = validation.base_model(base_model, call.scheduler.base_model)
    if request.model_path is not None:
        validation.tinker_path(request.model_path)
    elif base_model is None:
        raise InvalidRequest("create_sampling_session needs a base_model or a model_path.")
    sampler = await call.scheduler.create_sampler(
        call.owner, request.session_id, request.sampling_session_seq_id, base_model, request.model_path
    )
    return tinker.CreateSamplingSessionResponse(type="create_sampling_session", sampling_session_id=sampler.sampler_id)


async def join_sampling_session(
    call: Call, request: tinker.JoinSamplingSessionRequest
) -> tinker.JoinSamplingSessionResponse:
    counter = await call.scheduler.join_sampler(call.owner, request.sampling_session_id)
    return tinker.JoinSamplingSessionResponse(type="join_sampling_session", client_counter=counter)


async def get_sampler(call: Call) -> tinker.SamplerResponse:
    sampler = owned(call.scheduler.samplers, call.path("sampler_id"), call.owner, UnknownSampler)
    return tinker.SamplerResponse(
        sampler_id=sampler.sampler_id, base_model=sampler.base_model, model_path=sampler.model_path
    )


async def asample(call: Call) -> tinker.UntypedAPIFuture:
    content = await training.read(call)
    return await training.submit_decoded(call, content, _sample)


def _sample(call: Call, content: bytes) -> operations.Sample:
    measure.check_values(content, call.api.config.json_values_max)
    request = body.decode_json(content, tinker.SampleRequest, call.api.config.json_depth_max)
    if request.sampling_session_id is None or request.seq_id is None:
        raise InvalidRequest("asample needs sampling_session_id and seq_id: create a sampling session first.")
    params = request.sampling_params
    stop_strings, stop_token_ids = _stops(params.stop)
    targets, layout = _targets(request.target_prompt_logprobs, call.api.config.request_body_bytes_max)
    if request.prompt_logprobs_last_n is not None and request.prompt_logprobs_last_n < 1:
        raise InvalidRequest(f"prompt_logprobs_last_n is {request.prompt_logprobs_last_n}; it must be at least 1.")
    operation = operations.Sample(
        sampling_session_id=request.sampling_session_id,
        seq_id=request.seq_id,
        prompt=datums.text_tokens(request.prompt),
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        seed=validation.seed(params.seed),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_strings=stop_strings,
        stop_token_ids=stop_token_ids,
        use_eos=params.stop != [],
        prompt_logprobs=request.prompt_logprobs or False,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n or 0,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        target_layout=layout,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        record_stability_info=request.record_stability_info or False,
    )
    config = call.api.config
    support_max = min(config.stability_support_max, operations.SUPPORT_TOKENS_MAX)
    return validation.sample(operation, call.scheduler.base_model, config.sample_num_samples_max, support_max)


def _stops(stop: str | list[str | int] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Strings or token ids, beside the model's own end-of-sequence tokens; [] alone means that nothing stops."""
    entries = [stop] if isinstance(stop, str) else stop or []
    strings = tuple(entry for entry in entries if isinstance(entry, str))
    tokens = tuple(entry for entry in entries if isinstance(entry, int))
    if strings and tokens:
        raise InvalidRequest("stop must have either strings or token ids, not both.")
    return strings, tokens


def _targets(data: tinker.TensorData | None, bytes_max: int) -> tuple[Tensor | None, tuple[bytes, bytes] | None]:
    """(dense int32 array with -1 in unlisted cells, the sparse layout if the request has one)."""
    if data is None:
        return None, None
    if data.dtype != "int64":
        raise InvalidRequest(f"target_prompt_logprobs must be int64, not {data.dtype}.")
    try:
        cells = datums.array_from_json(data, datums.DenseBudget(bytes_max), fill=-1)
    except InvalidRequest as error:
        raise InvalidRequest(f"target_prompt_logprobs: {error.message}") from None
    if cells.size and not (cells.min() >= -1 and cells.max() < 2**31):
        raise InvalidRequest("target_prompt_logprobs has tokens outside the vocabulary (-1 is for none).")
    layout = None
    if data.sparse_crow_indices is not None:
        layout = (_int64_bytes(data.sparse_crow_indices), _int64_bytes(data.sparse_col_indices or []))
    return Tensor.of(cells.astype(np.int32)), layout


def _int64_bytes(values: list[int]) -> bytes:
    return np.asarray(values, "<i8").tobytes()
