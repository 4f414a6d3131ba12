"""External engines on trial: a worker of our own scores what they sampled before they attached.

The scoring runs as sample jobs without a client, beside everybody else's. Where the log-probabilities agree, the worker
is trusted with sequences; where they do not, it is sent away with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.scheduler.sampling.jobs import BASE_NAMESPACE, SampleJob
from tx_async.wire.operations import Sample
from tx_async.wire.records import RequestRecord
from tx_async.wire.worker import Trial, TrialSequence

TOLERANCE_BF16 = 0.25
"""In nats, where our own worker computes in bfloat16: more than rounding causes with a strong adapter, less than a
missing part of one causes."""


class TrialJob(SampleJob, eq=False, kw_only=True):
    """One sequence of a trial, scored as a prompt. Nobody waits for its result."""

    worker_id: str
    expected: tuple[float, ...]
    """Log-probabilities of the last tokens, as reported by the external engine."""
    difference: float | None = None
    """The largest difference; None until it is known."""


class Trials:
    def __init__(self, decisions: Decisions, accept: Callable[[SampleJob], None], drop: Callable[[SampleJob], None]):
        """`accept` begins a job; `drop` ends it without a result."""
        self.decisions = decisions
        self._accept = accept
        self._drop = drop
        #: worker on trial -> its jobs
        self.jobs: dict[str, list[TrialJob]] = {}

    def begin(self, worker: WorkerState) -> None:
        if trial := worker.info.trial:
            self.jobs[worker.worker_id] = [
                _job(worker.worker_id, trial, number, sequence) for number, sequence in enumerate(trial.sequences)
            ]
            for job in self.jobs[worker.worker_id]:
                self._accept(job)

    def end(self, worker: WorkerState) -> None:
        """End a trial: the worker is gone, or the trial is over."""
        for job in self.jobs.pop(worker.worker_id, []):
            self._drop(job)

    def finished(self, job: TrialJob, worker: WorkerState, is_float32: bool) -> None:
        """One sequence was scored by a worker, which computes in float32 or not."""
        logprobs = job.prompt["prompt_logprobs"]
        assert isinstance(logprobs, bytes)
        scored = np.frombuffer(logprobs, np.float32)[-len(job.expected) :]
        difference = np.abs(scored - np.array(job.expected, np.float32)).max()
        job.difference = float(difference) if np.isfinite(difference) else float("inf")
        jobs = self.jobs.get(job.worker_id, [])
        if job not in jobs or any(other.difference is None for other in jobs):
            return
        assert worker.info.trial is not None
        tolerance = worker.info.trial.tolerance if is_float32 else TOLERANCE_BF16
        reason = verdict(jobs, tolerance)
        self.end(worker)
        if reason:
            self.decisions.dismiss(worker, reason)
        else:
            worker.passed_trial()

    def failed(self, job: TrialJob, worker: WorkerState, message: str) -> None:
        self.end(worker)
        self.decisions.dismiss(worker, f"its log-probabilities could not be compared: {message}")


def verdict(jobs: list[TrialJob], tolerance: float) -> str:
    """What differs; "" when all agree."""
    base = max((job.difference or 0.0 for job in jobs if job.version is None), default=0.0)
    adapter = max((job.difference or 0.0 for job in jobs if job.version is not None), default=0.0)
    if base > tolerance:
        return (
            f"its log-probabilities of the base model differ from ours by {base:.2g} nats ({tolerance:.2g} allowed): "
            "it serves other weights or another dtype, or was started without --logprobs-mode raw_logprobs"
        )
    if adapter > tolerance:
        return (
            f"its log-probabilities with an adapter of all modules differ from ours by {adapter:.2g} nats "
            f"({tolerance:.2g} allowed), those of the base model by {base:.2g}: it applies only a part of an adapter; "
            "its --lora-target-modules may lack lm_head or others"
        )
    return ""


def _job(worker_id: str, trial: Trial, number: int, sequence: TrialSequence) -> TrialJob:
    name = f"trial:{worker_id}:{number}"
    operation = Sample(
        sampling_session_id=name, seq_id=number, prompt=np.array(sequence.tokens, np.int32).tobytes(), max_tokens=1,
        temperature=0.0, use_eos=False, prompt_logprobs=True,
    )  # fmt: skip
    version = trial.key if sequence.with_adapter else None
    fields: dict[str, Any] = {
        "request": RequestRecord(
            request_id=name, owner="", kind="Sample", subject=name, seq_id=number, body_digest="", body_bytes=0,
            created_at=0.0,
        ),
        "operation": operation,
        "flow": ("", f"trial:{worker_id}", ""),
        "version": version,
        "namespace": version or BASE_NAMESPACE,
        "seed": 0,
        "max_tokens": 1,
        "stop_token_ids": (),
        "pending": [0],
    }  # fmt: skip
    return TrialJob(worker_id=worker_id, expected=sequence.logprobs, **fields)
