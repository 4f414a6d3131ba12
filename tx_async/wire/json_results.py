"""Results as JSON, for SDKs whose `Accept` header does not name protobuf (0.6, and training results up to 0.18)."""

from __future__ import annotations

import math

import numpy as np

from tx_async.wire import tinker
from tx_async.wire.results import EMPTY_LOGPROB, ForwardBackwardResult, SampledSequence, SampleResult, TopkLogprobs
from tx_async.wire.tensors import Tensor


def forward_backward(result: ForwardBackwardResult) -> tinker.ForwardBackwardOutputJson:
    """Metrics that are not finite are left out: these SDKs refuse null in their place."""
    return tinker.ForwardBackwardOutputJson(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": _tensor(tensor)} for tensor in result.logprobs],
        metrics={name: value for name, value in result.metrics.items() if math.isfinite(value)},
    )


def sample(result: SampleResult) -> tinker.SampleResponseJson:
    prompt_logprobs = result.prompt_logprobs
    return tinker.SampleResponseJson(
        type="sample",
        sequences=[_sequence(sequence) for sequence in result.sequences],
        prompt_logprobs=None if prompt_logprobs is None else np.frombuffer(prompt_logprobs, "<f4").tolist(),
        topk_prompt_logprobs=_topk(result.topk_prompt_logprobs),
        prompt_cache_hit_tokens=result.prompt_cache_hit_tokens,
    )


def _tensor(tensor: Tensor) -> tinker.TensorJson:
    return tinker.TensorJson(
        data=np.frombuffer(tensor.data, "<f4").tolist(), dtype=tensor.dtype, shape=list(tensor.shape)
    )


def _sequence(sequence: SampledSequence) -> tinker.SampledSequenceJson:
    return tinker.SampledSequenceJson(
        stop_reason=sequence.stop_reason,
        tokens=np.frombuffer(sequence.tokens, "<i4").tolist(),
        logprobs=np.frombuffer(sequence.logprobs, "<f4").tolist(),
        topk_logprobs=_topk(sequence.topk),
    )


def _topk(table: TopkLogprobs | None) -> list[list[tuple[int, float]] | None] | None:
    """For each position null, or the scored (token id, log-probability) pairs."""
    if table is None or not table.k:
        return None
    token_ids = np.frombuffer(table.token_ids, "<i4").reshape(-1, table.k).tolist()
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(-1, table.k).tolist()
    rows = (zip(ids, values, strict=True) for ids, values in zip(token_ids, logprobs, strict=True))
    return [[(token, value) for token, value in row if value > EMPTY_LOGPROB] or None for row in rows]
