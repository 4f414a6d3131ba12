"""A sample request while it is open: it is cut into sequences, which are admitted a few at a time and put together when
all have ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct

from tx_async.scheduler.core.fairness import Flow
from tx_async.scheduler.core.policy import ALONE_FROM_FAILURES
from tx_async.scheduler.sampling.recordings import Recording, encode
from tx_async.wire import results
from tx_async.wire.operations import Sample
from tx_async.wire.records import RequestRecord
from tx_async.wire.results import PromptAltTokens, SampledSequence, SampleResult, TopkLogprobs
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import INT32_MAX, FinishedSequence, PromptScores, SequenceSpec

BASE_NAMESPACE = "base"
"""Prefix-cache namespace of the base model without an adapter, after its tenant's name."""


def namespace_of(owner: str, version: str | None) -> str:
    """A prefix that is found in the cache shows in `cached_tokens` and in the time that an answer takes. So tenants
    share none: nobody can find out by asking what somebody else has asked."""
    return f"{owner}/{version or BASE_NAMESPACE}"


class SampleJob(Struct, eq=False):
    """One accepted sample request."""

    request: RequestRecord
    operation: Sample
    flow: Flow
    """Key, client session, sampling session: they share the device fairly, level by level."""
    version: str | None
    """Storage key of the adapter; None samples the base model."""
    namespace: str
    """Prefix-cache namespace: equal namespaces have one tenant and equal weights."""
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    pending: list[int]
    """The sample indices that wait for admission, the next one last."""
    done: dict[int, SampledSequence] = {}
    head_tokens: int = 0
    """How many tokens of each draw's head are recorded for stable_reinforce; 0 records nothing."""
    recordings: dict[int, bytes] = {}
    """Sample index -> the body of its `RecordedSequence`."""
    prompt: dict[str, object] = {}
    """The fields of the result about the prompt; sample 0 brings them."""
    cached: dict[int, int] = {}
    """Sample index -> how many tokens of its prompt came from the prefix cache."""
    num_failures: int = 0
    """How often a worker died, or the engine failed, while it ran part of the job."""
    num_desertions: int = 0
    """How often an external engine went away while it ran part of the job: that is no failure, unless it happens
    often."""
    declined_by: dict[str, str] = {}
    """External worker -> why a sequence of this job failed there: that worker gets no other one."""
    order: int = 0
    """Its turn among the waiting jobs: lower came earlier."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody receives its tokens while they come."""
        return False

    @property
    def is_finished(self) -> bool:
        return len(self.done) == self.operation.num_samples

    @property
    def runs_alone(self) -> bool:
        """Whether it runs alone, like a training operation present at each death: the next death shows the culprit."""
        return self.num_failures >= ALONE_FROM_FAILURES

    @property
    def scores_prompt(self) -> bool:
        """Whether its sample 0 brings scores of the prompt."""
        op = self.operation
        return bool(
            op.prompt_logprobs or op.topk_prompt_logprobs or op.prompt_alt_tokens_k or op.target_prompt_logprobs
        )

    @property
    def waiting_kinds(self) -> tuple[bool, bool]:
        """Whether the sample with prompt scores waits, and whether others wait. `pending` ends with the lowest
        index."""
        scoring = bool(self.pending) and self.pending[-1] == 0 and self.scores_prompt
        return scoring, len(self.pending) > scoring

    def take(self, scores: bool) -> int:
        """The next index to be admitted: the sample with prompt scores, or another one."""
        scoring, _ = self.waiting_kinds
        return self.pending.pop(-1 if scores or not scoring else -2)

    def spec(self, sequence_id: int, index: int, slot: int, first_tensor: int) -> SequenceSpec:
        """The sequence of one sample; its tensors, `self.tensors(index)`, begin at this place among the command's."""
        op = self.operation
        scores = None
        if index == 0 and self.scores_prompt:
            scores = PromptScores(
                logprobs=op.prompt_logprobs,
                topk=op.topk_prompt_logprobs,
                last_n=op.prompt_logprobs_last_n,
                targets_index=first_tensor + 1 if op.target_prompt_logprobs else -1,
                alt_tokens_k=op.prompt_alt_tokens_k,
            )
        return SequenceSpec(
            sequence_id=sequence_id,
            sampler_slot=slot,
            adapter_version=self.namespace,
            prompt_index=first_tensor,
            max_tokens=self.max_tokens,
            temperature=op.temperature,
            top_k=min(op.top_k, INT32_MAX),
            top_p=op.top_p,
            seed=self.seed,
            sample_index=index,
            stop_token_ids=self.stop_token_ids,
            stop_strings=op.stop_strings,
            topk_logprobs=op.topk_sample_logprobs,
            head_tokens=self.head_tokens,
            prompt_scores=scores,
            min_p=op.min_p,
            presence_penalty=op.presence_penalty,
            frequency_penalty=op.frequency_penalty,
            repetition_penalty=op.repetition_penalty,
            min_tokens=op.min_tokens,
            logit_bias=op.logit_bias,
            grammar=op.grammar,
            stream=self.is_watched,
        )

    def tensors(self, index: int) -> list[np.ndarray]:
        arrays = [np.frombuffer(self.operation.prompt, np.int32)]
        if index == 0 and self.operation.target_prompt_logprobs:
            arrays.append(self.operation.target_prompt_logprobs.numpy().astype(np.int32))
        return arrays

    def collect(self, index: int, finished: FinishedSequence, tensors: Sequence[np.ndarray]) -> None:
        """One of its samples has ended."""
        topk = None
        if finished.topk_token_ids_index >= 0:
            topk = TopkLogprobs.of(tensors[finished.topk_token_ids_index], tensors[finished.topk_logprobs_index])
        self.done[index] = SampledSequence(
            tokens=tensors[finished.tokens_index].astype(np.int32).tobytes(),
            logprobs=tensors[finished.logprobs_index].astype(np.float32).tobytes(),
            stop_reason=finished.stop_reason,
            topk=topk,
        )
        self.cached[index] = finished.num_cached_tokens
        if index == 0:
            self.prompt = _prompt_fields(finished, tensors)
        if finished.head_token_ids_index >= 0:
            self.recordings[index] = encode(Recording.of(self.operation.prompt, finished, tensors))

    def result(self) -> bytes:
        sequences = tuple(self.done[i] for i in range(self.operation.num_samples))
        layout = self.operation.target_layout if "target_prompt_logprobs" in self.prompt else None
        return results.encode(SampleResult(sequences=sequences, target_layout=layout, **self.prompt))  # type: ignore[arg-type]

    def requeue(self, lost: Iterable[int]) -> None:
        """These samples run again from their seeds. Sampling changes no weights, so nobody notices."""
        self.pending = sorted([*self.pending, *lost], reverse=True)


def _prompt_fields(finished: FinishedSequence, tensors: Sequence[np.ndarray]) -> dict[str, object]:
    fields: dict[str, object] = {"prompt_cache_hit_tokens": finished.num_cached_tokens}
    if finished.prompt_logprobs_index >= 0:
        fields["prompt_logprobs"] = tensors[finished.prompt_logprobs_index].astype(np.float32).tobytes()
    if finished.prompt_topk_token_ids_index >= 0:
        fields["topk_prompt_logprobs"] = TopkLogprobs.of(
            tensors[finished.prompt_topk_token_ids_index], tensors[finished.prompt_topk_logprobs_index]
        )
    if finished.target_logprobs_index >= 0:
        fields["target_prompt_logprobs"] = Tensor.of(tensors[finished.target_logprobs_index].astype(np.float32))
    if finished.alt_token_ids_index >= 0:
        fields["prompt_alt_tokens"] = PromptAltTokens(
            Tensor.of(tensors[finished.alt_token_ids_index].astype(np.int32)),
            Tensor.of(tensors[finished.alt_logprobs_index].astype(np.float32)),
        )
    return fields
