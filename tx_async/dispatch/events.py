"""What the router has to say to the scheduler: facts about workers and about the commands that they were sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from msgspec import Struct

from tx_async.errors import Category
from tx_async.wire.worker import EngineInfo, Result

Capability = Literal["train", "sample"]


def _nothing() -> None:
    pass


class WorkerProgress(Struct, frozen=True):
    """A worker that is not ready yet has come further, or has left again before it was."""

    worker_id: str
    stage: str
    """What it is at, for people: "loading weights", "process 1 left: …"."""
    done: float = 0.0
    total: float = 0.0


class WorkerReady(Struct, frozen=True):
    """Every process of a worker group is ready. Its next command is number 1; all its slots are empty."""

    worker_id: str
    info: EngineInfo
    """Of process 0."""
    capabilities: frozenset[Capability]


class WorkerLost(Struct, frozen=True):
    """A worker that was ready is gone, with everything it held and every command in flight. Comes once per
    `WorkerReady`."""

    worker_id: str
    reason: str


class BatchFinished(Struct, frozen=True):
    """A command was carried out by every process of its group."""

    worker_id: str
    number: int
    result: Result
    tensors: list[np.ndarray]
    """Read-only views, in the order that the result's docstring states. They mean nothing any more after
    `release()`."""
    elapsed_ms: float
    """From its arrival at the worker to its result."""
    release: Callable[[], None] = _nothing
    """Call it when `tensors` are not needed any more: their memory goes back to the worker. May be called twice."""


class BatchFailed(Struct, frozen=True):
    """A command failed alone; with `fatal`, `WorkerLost` follows."""

    worker_id: str
    number: int
    category: Category
    message: str
    fatal: bool


Event = WorkerProgress | WorkerReady | WorkerLost | BatchFinished | BatchFailed
