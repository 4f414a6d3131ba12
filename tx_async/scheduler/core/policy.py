"""The numbers that decisions depend on; `scheduler.policy_of` takes them from the server's settings."""

from msgspec import Struct

ALONE_FROM_FAILURES = 2
"""A request that was running this often when a worker died runs alone next, so that the next death shows the
culprit."""


class Policy(Struct, frozen=True, kw_only=True):
    quanta_in_flight_max: int = 2
    """How many train micro-batches and sample quanta a worker has ahead."""
    commands_in_flight_max: int = 32
    """How many commands a worker may have unanswered; small ones (optimizer steps, saves) count too."""
    train_share: float = 1.0
    sample_share: float = 1.0
    live_share: float = 1.0
    """How training, sampling and live requests share the device while all three have work: by these weights."""
    live_quantum_ms: float = 100.0
    """About how long a sample quantum lasts at most, in whole steps, while clients read along."""
    live_memory_s: float = 60.0
    """For how long after a live request another one is expected."""
    seq_gap_s: float = 15.0
    chunk_gap_s: float = 60.0
    """See `Lane.gap_limit`."""
    seq_ahead_max: int = 10_000
    """How far a `seq_id` may be beyond the largest one that its run has accepted."""
    snapshot_every_steps: int = 16
    snapshot_every_bytes: int = 256 * 2**20
    snapshot_idle_s: float = 30.0
    attempts_max: int = 5
    """A request that was running at this many deaths of workers fails, instead of killing another one."""
    patience_turns: int = 32
    """For how many micro-batches a session's runs on the device may go before its runs that wait for a slot."""
    storage_patience_s: float = 600.0
    """How long a save, or a new operation that needs files, waits for storage; a replay of a run's state waits for
    ever."""
    result_retention_s: float = 24 * 3600
    results_kept_max: int = 100_000
    """How many finished requests are remembered; beyond that the oldest are forgotten before their time."""
    stability_head_tokens: int = 64
    stability_support_max: int = 4_096
    stability_retention_s: float = 24 * 3600
    stability_bytes_max: int = 4 * 2**30
    """The limit of one tenant."""
    session_retention_s: float = 30 * 24 * 3600
    retention_interval_s: float = 60.0
    audit_events_max: int = 10_000
    history_steps_max: int = 1_024
    """How many optimizer steps one run's history keeps."""
    history_bytes_max: int = 256 * 2**20
    """The limit of all histories together."""
