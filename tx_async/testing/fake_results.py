"""Results that a test can check by hand, computed without a model:

- log-probability of a target token t: -(t % 10) / 10
- a sample continues its prompt by counting up from the last token; log-probability of each: -0.5
"""

from __future__ import annotations

import numpy as np

from tx_async.scheduler.interface import Passage
from tx_async.scheduler.stations.passages import kind_of
from tx_async.wire import operations, results
from tx_async.wire.records import RequestRecord
from tx_async.wire.tensors import Tensor

DEFAULT_MAX_TOKENS = 4
SAMPLED_LOGPROB = -0.5


def forward_backward(operation: operations.ForwardBackward) -> results.ForwardBackwardResult:
    logprobs, loss = [], 0.0
    for datum in operation.data:
        inputs = datum.loss_fn_inputs
        values = -(inputs["target_tokens"].numpy() % 10).astype(np.float32) / 10
        weights = inputs["weights"] if "weights" in inputs else inputs["advantages"]
        loss -= float((values * weights.numpy()).sum())
        logprobs.append(Tensor.of(values))
    return results.ForwardBackwardResult(logprobs=tuple(logprobs), metrics={"loss:sum": loss})


def sample(operation: operations.Sample, vocab_size: int) -> results.SampleResult:
    prompt = np.frombuffer(operation.prompt, "<i4")
    alt_tokens_k, targets = operation.prompt_alt_tokens_k, operation.target_prompt_logprobs
    prompt_logprobs = np.full(len(prompt), SAMPLED_LOGPROB, "<f4")
    prompt_logprobs[0] = np.nan
    if operation.prompt_logprobs_last_n:
        prompt_logprobs[: -operation.prompt_logprobs_last_n] = np.nan
    return results.SampleResult(
        sequences=(_sequence(operation, int(prompt[-1]), vocab_size),) * operation.num_samples,
        prompt_logprobs=prompt_logprobs.tobytes() if operation.prompt_logprobs else None,
        topk_prompt_logprobs=_topk(len(prompt), operation.topk_prompt_logprobs, first_empty=True),
        target_prompt_logprobs=None if targets is None else _target_logprobs(targets),
        target_layout=operation.target_layout,
        prompt_alt_tokens=None if not alt_tokens_k else _alt_tokens(len(prompt) - 1, alt_tokens_k),
    )


def _sequence(operation: operations.Sample, last: int, vocab_size: int) -> results.SampledSequence:
    wanted = [(last + 1 + i) % vocab_size for i in range(operation.max_tokens or DEFAULT_MAX_TOKENS)]
    stops = [i for i, token in enumerate(wanted) if token in operation.stop_token_ids]
    tokens = np.array(wanted[: stops[0] + 1] if stops else wanted, "<i4")
    return results.SampledSequence(
        tokens=tokens.tobytes(),
        logprobs=np.full(len(tokens), SAMPLED_LOGPROB, "<f4").tobytes(),
        stop_reason="stop" if stops else "length",
        topk=_topk(len(tokens), operation.topk_sample_logprobs),
    )


def _topk(length: int, k: int, first_empty: bool = False) -> results.TopkLogprobs | None:
    """Tokens 0 … k-1 with log-probabilities -1 … -k."""
    if not k:
        return None
    token_ids = np.tile(np.arange(k), (length, 1))
    logprobs = -(token_ids + 1.0)
    if first_empty:
        token_ids[0], logprobs[0] = results.EMPTY_TOKEN_ID, results.EMPTY_LOGPROB
    return results.TopkLogprobs.of(token_ids, logprobs)


def _target_logprobs(targets: Tensor) -> Tensor:
    cells = targets.numpy()
    return Tensor.of(np.where(cells < 0, 0, -(cells % 10) / 10).astype(np.float32))


def _alt_tokens(length: int, k: int) -> results.PromptAltTokens:
    token_ids = np.tile(np.arange(k, dtype=np.int32), (length, 1))
    return results.PromptAltTokens(Tensor.of(token_ids), Tensor.of(np.full((length, k), -1, np.float32)))


def passage_of(request: RequestRecord) -> Passage:
    """One second from station to station."""
    at = request.created_at
    return Passage(
        request_id=request.request_id,
        kind=kind_of(request.kind),
        subject=request.subject,
        seq_id=request.seq_id,
        accepted_at=at,
        durable_at=at + 1,
        begun_at=at + 2,
        ended_at=at + 3,
        published_at=at + 4,
        worker_id="w0",
    )
