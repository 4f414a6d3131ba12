"""The numbers that decisions depend on, apart from where they are configured."""

from msgspec import Struct


class Policy(Struct, frozen=True, kw_only=True):
    quanta_in_flight_max: int = 2
    train_share: float = 1.0
    sample_share: float = 1.0
    seq_gap_s: float = 120.0
    snapshot_every_steps: int = 16
    snapshot_every_bytes: int = 256 * 2**20
    snapshot_idle_s: float = 30.0
    attempts_max: int = 3
    """A request that was running each time when a worker died so often fails instead of killing a next one."""
