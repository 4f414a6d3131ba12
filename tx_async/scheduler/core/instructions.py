"""The instructions of the state, which `performer.py` carries out.

`cause` is the cause of the fact that was being handled: log lines show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tx_async.errors import TxError
from tx_async.scheduler.interface import LivePiece
from tx_async.wire.records import Change, RequestRecord, ResultRecord
from tx_async.wire.worker import Command, SequenceTimes


class Append(Struct, frozen=True):
    """Commit these changes."""

    changes: tuple[Change, ...]
    cause: str = ""


class Finish(Struct, frozen=True):
    """Commit a result (with `changes` in the same transaction), and come back with `ResultDurable`."""

    result: ResultRecord
    changes: tuple[Change, ...] = ()
    cause: str = ""


class Publish(Struct, frozen=True):
    """A result is durable: answer whoever waits for it."""

    result: ResultRecord
    cause: str = ""


class Deliver(Struct, frozen=True):
    """Tell whoever waits for a live request its next tokens, or why it ends before its end."""

    request_id: str
    pieces: tuple[LivePiece, ...] = ()
    error: TxError | None = None
    cause: str = ""


class Send(Struct, frozen=True):
    """Give a worker its next command. Numbers count from 1 for each `WorkerReady`."""

    worker_id: str
    number: int
    command: Command
    tensors: Sequence[np.ndarray] = ()
    cause: str = ""
    requests: tuple[str, ...] = ()
    """The requests that this work is for, where they wait for a result."""


class SequenceEnded(Struct, frozen=True):
    """One sample of a request has come back: this is for measurements."""

    request: RequestRecord
    times: SequenceTimes
    """The times that its worker reports: this process has only seen the end."""
    num_tokens: int
    cause: str = ""


class Dismiss(Struct, frozen=True):
    """Send a worker away, because its engine does not compute what ours does. `WorkerLost` follows."""

    worker_id: str
    reason: str
    cause: str = ""


class Widen(Struct, frozen=True):
    """Have a worker start again with slots for adapters of this rank. `WorkerLost` follows."""

    worker_id: str
    lora_rank: int
    cause: str = ""


class FetchBody(Struct, frozen=True):
    """Read a request's body from the journal and come back with `BodyLoaded`."""

    request_id: str
    cause: str = ""


class ListFiles(Struct, frozen=True):
    """List the keys below a prefix that belongs to a training run, and come back with `FilesListed`."""

    model_id: str
    prefix: str
    cause: str = ""


class DeleteFiles(Struct, frozen=True):
    """Delete what is stored under a key or prefix, once everything decided before is durable."""

    storage_key: str
    cause: str = ""


Instruction = (
    Append | Finish | Publish | Deliver | Send | SequenceEnded | Dismiss | Widen | FetchBody | ListFiles | DeleteFiles
)
