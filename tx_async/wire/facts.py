"""Facts about workers and the commands sent to them: dispatch reports them, and the scheduler decides by them.

Every fact has a `cause`: the name under which log lines and traces find it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from tx_async.wire.worker import Capability, CommandFailed, CommandFinished, EngineInfo, Result


def _nothing() -> None:
    pass


class WorkerProgress(Struct, frozen=True):
    """A worker that is not ready yet has made progress, or has left before it was ready."""

    worker_id: str
    stage: str
    """What it is doing, for people: "loading weights", "process 1 left: …"."""
    done: float = 0.0
    total: float = 0.0

    @property
    def cause(self) -> str:
        return f"{self.worker_id} attaches"


class WorkerReady(Struct, frozen=True):
    """Every process of a worker group is ready. Its next command is number 1; all its slots are empty."""

    worker_id: str
    info: EngineInfo
    """The engine of process 0."""
    capabilities: frozenset[Capability]

    @property
    def cause(self) -> str:
        return f"{self.worker_id} is ready"


class WorkerLost(Struct, frozen=True):
    """A worker that was ready is gone, with everything it held and every command in flight. It comes once per
    `WorkerReady`."""

    worker_id: str
    reason: str

    @property
    def cause(self) -> str:
        return f"{self.worker_id} is lost"


class CommandEnded(Struct, frozen=True):
    """A command was carried out by every process of its group, or failed alone; after a fatal failure, `WorkerLost`
    follows."""

    worker_id: str
    outcome: CommandFinished | CommandFailed
    """As process 0 reported it."""
    tensors: Sequence[np.ndarray] = ()
    """Read-only views, in the order that the result's docstring states. They are invalid after `release()`."""
    release: Callable[[], None] = _nothing
    """Call it when `tensors` are no longer needed: their memory goes back to the worker. May be called twice."""

    @property
    def number(self) -> int:
        return self.outcome.number

    @property
    def failure(self) -> CommandFailed | None:
        return self.outcome if isinstance(self.outcome, CommandFailed) else None

    @property
    def result(self) -> Result:
        """The result of a command that did not fail."""
        assert isinstance(self.outcome, CommandFinished), self.outcome
        return self.outcome.result

    @property
    def cause(self) -> str:
        return f"{self.worker_id}#{self.outcome.number}"


WorkerFact = WorkerProgress | WorkerReady | WorkerLost | CommandEnded
