"""The numbers that the scheduler reports to an operator."""

from __future__ import annotations

from msgspec import Struct

from tx_async.metrics import Counter, Gauge
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.core.worker_state import CAUSES


class SchedulerStatistics(Struct, frozen=True, kw_only=True):
    sessions: Gauge
    """Sessions on record, ended ones included until they are forgotten."""
    models: Gauge
    """Training runs."""
    requests_unfinished: Gauge
    """Accepted requests without a result."""
    results_kept: Gauge
    """Results that clients may still ask for."""
    polls_waiting: Gauge
    """Clients that wait for a result right now."""
    samples_open: Gauge
    """Sample requests without a result."""
    workers_ready: Gauge
    """Workers that take commands."""
    operations_to_replay: Gauge
    """Training operations that run again after a restart or the loss of a worker."""
    commands_in_flight: Gauge
    """Commands that no worker has answered yet."""
    saves_failed: Counter
    """Checkpoints that were not saved; the log says why."""
    snapshots_failed: Counter
    """Snapshots of runs that were not taken, and are tried again; the log says why."""
    train_tokens: Counter
    """Tokens that forward and forward_backward went through, counted again when they were replayed."""
    sample_tokens: Counter
    """Prompt tokens computed and tokens sampled."""
    train_ms: Counter
    """Time that workers spent on training micro-batches."""
    sample_ms: Counter
    """Time that workers spent on quanta of sampling."""


class SamplingStatistics(Struct, frozen=True, kw_only=True):
    """Totals over all workers that sample."""

    preemptions: Counter
    """Sequences that gave their place in the KV cache to others, and went on later."""
    prefix_cache_lookup_tokens: Counter
    """Prompt tokens of samples that have ended: all were looked up in the prefix cache."""
    prefix_cache_hit_tokens: Counter
    """How many of these were found there."""
    kv_cache_used_tokens: Gauge
    """The room that sequences hold in KV caches."""
    kv_cache_tokens: Gauge
    """The room that KV caches have; 0 for a worker that does not say, as external engines do not."""


def statistics_of(state: SchedulerState, num_unfinished: int, num_polls: int) -> SchedulerStatistics:
    return SchedulerStatistics(
        sessions=len(state.catalog.sessions),
        models=len(state.catalog.models),
        requests_unfinished=num_unfinished,
        results_kept=len(state.catalog.results),
        polls_waiting=num_polls,
        samples_open=len(state.sampling.jobs),
        workers_ready=len(state.workers),
        operations_to_replay=state.training.runs.num_replays,
        commands_in_flight=sum(len(worker.in_flight) for worker in state.workers.values()),
        saves_failed=sum(state.training.failures["save", cause] for cause in CAUSES),
        snapshots_failed=sum(state.training.failures["snapshot", cause] for cause in CAUSES),
        train_tokens=state.training.micro_batches.num_tokens,
        sample_tokens=state.sampling.num_tokens,
        train_ms=state.busy_ms["train"],
        sample_ms=state.busy_ms["sample"],
    )


def sampling_statistics_of(state: SchedulerState) -> SamplingStatistics:
    workers = state.workers.values()
    return SamplingStatistics(
        preemptions=state.sampling.num_preempted,
        prefix_cache_lookup_tokens=state.sampling.num_prompt_tokens,
        prefix_cache_hit_tokens=state.sampling.num_cached_tokens,
        kv_cache_used_tokens=sum(worker.num_kv_tokens for worker in workers),
        kv_cache_tokens=sum(worker.info.kv_cache_tokens for worker in workers),
    )
