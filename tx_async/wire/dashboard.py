"""Server ⇄ browsers and plotting programs: data for which hosted Tinker has no route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

Station = Literal["queued", "sent", "finished", "failed"]
RunState = Literal["running", "queued", "idle", "unloaded", "corrupted", "copy"]


class TrainingRunHistory(Struct, kw_only=True):
    """The history of a run, thinned with age."""

    training_run_id: str
    columns: list[str]
    """Every name for which some step has a number."""
    steps: list[dict[str, float]]
    """Oldest first: `index` counts the run's optimizer steps from 0, `step` is the optimizer's own count, `started_at`
    and `finished_at` are seconds since the epoch, `tokens`, `sequences` and `num_batches` count the training data, and
    the metrics are those that forward_backward and optim_step have reported, combined as the part after the colon
    says."""


# ---- from the scheduler to the page


class WorkerView(Struct, frozen=True, kw_only=True):
    worker_id: str
    platform: str
    num_devices: int
    capabilities: tuple[str, ...]
    commands_in_flight: int
    sequences: int
    sequences_max: int
    training_slots: int
    training_slots_max: int
    sampler_slots: int
    sampler_slots_max: int
    memory: tuple[tuple[str, int, str], ...] = ()
    """(part, bytes, note) of each device's plan; empty where none was made, as on a CPU."""
    is_on_trial: bool = False


class QueueView(Struct, frozen=True, kw_only=True):
    """The unfinished requests of one key."""

    owner: str
    requests: int
    samples: int


class Overview(Struct, frozen=True, kw_only=True):
    """What a scheduler is doing now, and has done since its start."""

    workers: tuple[WorkerView, ...] = ()
    queues: tuple[QueueView, ...] = ()
    operations_to_replay: int = 0
    operations_lost: int = 0
    """How many a crash had taken from the device: those above, and what has run again since."""
    train_tokens: float = 0.0
    sample_tokens: float = 0.0
    train_ms: float = 0.0
    sample_ms: float = 0.0


class RunView(Struct, frozen=True, kw_only=True):
    """What a run is doing now."""

    state: RunState
    num_steps: int
    """Optimizer steps."""
    loss: float | None = None
    """The mean loss of a token, at the newest step."""


class RequestView(Struct, frozen=True, kw_only=True):
    request_id: str
    seq_id: int
    kind: str
    station: Station
    accepted_at: float
    queued_at: float | None = None
    """When it was in the journal and began to wait for its turn; null when that is not known any more: a server's start
    forgets it."""
    sent_at: float | None = None
    """When its first part went to a worker; null when it has not, or that is not known any more."""
    finished_at: float | None = None
    body_bytes: int = 0


# ---- between the page and the server


class DashboardViewer(Struct, kw_only=True):
    name: str
    """The key's name; empty where there are no keys."""
    role: Literal["user", "admin"]
    """An admin sees everything."""
    has_key: bool
    token: str
    """The token that the page sends as `X-Dashboard-Token` with every change."""
    version: str


class CheckpointAction(Struct, kw_only=True):
    path: str
    """tinker://…"""
    action: Literal["publish", "unpublish", "delete", "ttl", "download"] = "download"
    ttl_seconds: int | None = None
    """For "ttl": seconds from now; null = for ever."""


class Link(Struct, kw_only=True):
    url: str


def mean_loss(row: Mapping[str, float]) -> float | None:
    """The mean loss of a token at one step of a history, weighted if the loss has weights; None where it is unknown."""
    count = row.get("weights:sum", row.get("tokens", 0.0))
    return row["loss:sum"] / count if count and "loss:sum" in row else None
