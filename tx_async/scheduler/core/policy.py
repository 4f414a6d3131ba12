"""The numbers that decisions depend on, apart from where they are configured."""

from msgspec import Struct

ALONE_FROM_FAILURES = 2
"""What was running so often when a worker died runs without company: the next death tells who it was."""


class Policy(Struct, frozen=True, kw_only=True):
    quanta_in_flight_max: int = 2
    """Train micro-batches and sample quanta that a worker has ahead."""
    commands_in_flight_max: int = 32
    """All commands that a worker has not answered; small ones (optimizer steps, saves) count too."""
    train_share: float = 1.0
    sample_share: float = 1.0
    live_share: float = 1.0
    seq_gap_s: float = 15.0
    chunk_gap_s: float = 60.0
    """See `Lane.gap_limit`."""
    seq_ahead_max: int = 10_000
    """A `seq_id` may be so far beyond the largest one that its run has accepted."""
    snapshot_every_steps: int = 16
    snapshot_every_bytes: int = 256 * 2**20
    snapshot_idle_s: float = 30.0
    attempts_max: int = 5
    """A request that was running each time when a worker died so often fails instead of killing a next one."""
    patience_turns: int = 32
    """Micro-batches that one session's runs on the device may go before its runs that wait for a slot."""
    storage_patience_s: float = 600.0
    """How long a save, or what is new and needs files, waits for storage; what repeats a run's state waits on."""
    result_retention_s: float = 24 * 3600
    results_kept_max: int = 100_000
    """Finished requests that are remembered; beyond that the oldest go before their time."""
    stability_head_tokens: int = 64
    stability_support_max: int = 4_096
    stability_retention_s: float = 24 * 3600
    stability_bytes_max: int = 4 * 2**30
    """Of one tenant."""
    session_retention_s: float = 30 * 24 * 3600
    retention_interval_s: float = 60.0
    audit_events_max: int = 10_000
    history_steps_max: int = 1_024
    """Optimizer steps that one run's history keeps."""
    history_bytes_max: int = 256 * 2**20
    """All histories."""
