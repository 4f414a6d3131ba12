"""What the scheduler tells an operator in numbers."""

from __future__ import annotations

from msgspec import Struct

from tx_async.metrics import Counter, Gauge


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
    """Tokens of sequences that forward and forward_backward went through, again when they were replayed."""
    sample_tokens: Counter
    """Prompt tokens computed and tokens sampled."""
    train_ms: Counter
    """Time that workers spent on training micro-batches."""
    sample_ms: Counter
    """Time that workers spent on quanta of sampling."""
