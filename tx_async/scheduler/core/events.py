"""What happened (facts, in) and what to do about it (instructions, out)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tx_async.wire.operations import Operation
from tx_async.wire.records import Change, RequestRecord, ResultRecord
from tx_async.wire.worker import Command, EngineInfo, Result

# ---- facts


class RequestAccepted(Struct, frozen=True):
    """A new request passed validation and idempotency; its record is on its way to the journal."""

    request: RequestRecord
    operation: Operation


class RequestCancelled(Struct, frozen=True):
    request_id: str


class SessionEnded(Struct, frozen=True):
    """Its client has finished, or was silent for too long: nobody will fetch its samples."""

    session_id: str


class WorkerReady(Struct, frozen=True):
    worker_id: str
    info: EngineInfo
    capabilities: frozenset[str]


class WorkerLost(Struct, frozen=True):
    worker_id: str
    reason: str


class CommandFinished(Struct, frozen=True):
    """`tensors` are valid only while the event is handled."""

    worker_id: str
    number: int
    result: Result
    tensors: Sequence[np.ndarray] = ()
    elapsed_ms: float = 0.0


class CommandFailed(Struct, frozen=True):
    worker_id: str
    number: int
    category: str
    message: str


class BodyLoaded(Struct, frozen=True):
    """The journal returned the body of a request that has to run (again); None when it is lost."""

    request_id: str
    operation: Operation | None
    message: str = ""
    """Why it is lost."""


class FilesListed(Struct, frozen=True):
    """What storage has below a prefix that belongs to a run; None when it did not answer."""

    model_id: str
    keys: tuple[str, ...] | None


class Tick(Struct, frozen=True):
    """Time has passed."""


Fact = (
    RequestAccepted
    | RequestCancelled
    | SessionEnded
    | WorkerReady
    | WorkerLost
    | CommandFinished
    | CommandFailed
    | BodyLoaded
    | FilesListed
    | Tick
)

# ---- instructions


class Append(Struct, frozen=True):
    """Commit these changes; nobody waits for them."""

    changes: tuple[Change, ...]


class Finish(Struct, frozen=True):
    """Commit a result (with `changes` in the same transaction), then answer whoever waits for it."""

    result: ResultRecord
    changes: tuple[Change, ...] = ()


class Send(Struct, frozen=True):
    """Give a worker its next command. Numbers count from 1 for each `WorkerReady`."""

    worker_id: str
    number: int
    command: Command
    tensors: Sequence[np.ndarray] = ()


class FetchBody(Struct, frozen=True):
    """Read a request's body from the journal and come back with `BodyLoaded`."""

    request_id: str


class ListFiles(Struct, frozen=True):
    """List the keys below a prefix that belongs to a run, and come back with `FilesListed`."""

    model_id: str
    prefix: str


class DeleteFiles(Struct, frozen=True):
    """Delete what is stored under a key or prefix, once everything decided before is durable."""

    storage_key: str


Instruction = Append | Finish | Send | FetchBody | ListFiles | DeleteFiles
