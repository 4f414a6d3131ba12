"""The instructions of the decision in progress, in order.

A decision's changes show in the catalog at once, so that the next decision builds on it; only a result shows
later, when it is durable, because that is when a client may see it. Everything reaches the journal in the order in
which it was decided, so a crash forgets the newest decisions and never one in the middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tx_async.errors import TxError
from tx_async.scheduler.core.audit import AuditLog
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.instructions import (
    Append,
    DeleteFiles,
    Deliver,
    Dismiss,
    FetchBody,
    Finish,
    Instruction,
    ListFiles,
    Publish,
    SequenceEnded,
    Widen,
)
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.scheduler.interface import LivePiece
from tx_async.wire import results
from tx_async.wire.records import Change, Put, RequestRecord, ResultContent, ResultRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import Command, SequenceTimes

if TYPE_CHECKING:
    from tx_async.scheduler.core.worker_state import Answer


class Decisions:
    def __init__(self, catalog: Catalog, now: float = 0.0):
        self.catalog = catalog
        #: when the fact that is being handled happened, in seconds since the epoch
        self.now = now
        #: that fact's cause, which every instruction that follows from it carries
        self.cause = ""
        self._instructions: list[Instruction] = []
        #: storage key -> how many open samples are, or will be, drawn from its files
        self._drawn_from: Counter[str] = Counter()
        self.audit = AuditLog(catalog)

    def begin(self, cause: str, now: float) -> None:
        """Begin to handle a fact."""
        self.cause = cause
        self.now = now

    def take(self) -> list[Instruction]:
        instructions, self._instructions = self._instructions, []
        return instructions

    def know(self, *changes: Change) -> None:
        """Take up changes that are durable already, or become so with the record's next version."""
        self.catalog.apply(changes)

    def append(self, *changes: Change) -> None:
        if changes:
            changes = self.audit.audited(changes, self.now)
            self.catalog.apply(changes)
            self._instructions.append(Append(changes, self.cause))

    def send(
        self,
        worker: WorkerState,
        command: Command,
        answer: Answer,
        tensors: Sequence[np.ndarray] = (),
        requests: Iterable[str] = (),
    ) -> None:
        """`answer` says what to do when the command has ended, `requests` who waits for that."""
        self._instructions.append(worker.send(command, answer, tensors, self.cause, tuple(requests)))

    def sequence_ended(self, request: RequestRecord, times: SequenceTimes, num_tokens: int) -> None:
        self._instructions.append(SequenceEnded(request, times, num_tokens, self.cause))

    def deliver(self, request_id: str, *pieces: LivePiece, error: TxError | None = None) -> None:
        """Send this to whoever waits for a live request; `error` ends the request."""
        self._instructions.append(Deliver(request_id, pieces, error, self.cause))

    def dismiss(self, worker: WorkerState, reason: str) -> None:
        self._instructions.append(Dismiss(worker.worker_id, reason, self.cause))

    def widen(self, worker: WorkerState) -> None:
        worker.told_to_leave()
        self._instructions.append(Widen(worker.worker_id, worker.outgrown_by, self.cause))

    def fetch_body(self, request_id: str) -> None:
        self._instructions.append(FetchBody(request_id, self.cause))

    def list_files(self, model_id: str, prefix: str) -> None:
        self._instructions.append(ListFiles(model_id, prefix, self.cause))

    def delete_files(self, storage_key: str) -> None:
        """Delete files unless a record, or a sample that is being drawn, still needs them. The deletion waits until
        everything decided before it is durable, so no record on disk ever names files that are gone."""
        if storage_key and not self.catalog.references[storage_key] and storage_key not in self._drawn_from:
            self._instructions.append(DeleteFiles(storage_key, self.cause))

    def hold_files(self, storage_key: str) -> None:
        """Keep these files for a sample that is to be drawn, even if their records are forgotten meanwhile."""
        self._drawn_from[storage_key] += 1

    def holds_files(self, storage_key: str) -> bool:
        return storage_key in self._drawn_from

    def let_go_of_files(self, storage_key: str) -> None:
        """A sample has ended: the last one deletes the files if no record names them any more."""
        self._drawn_from[storage_key] -= 1
        if not self._drawn_from[storage_key]:
            del self._drawn_from[storage_key]
            self.delete_files(storage_key)

    # ---- results: `changes` become durable with them

    def finish(
        self,
        request: RequestRecord,
        content: ResultContent,
        payload: bytes,
        *changes: Change,
    ) -> None:
        changes = self.audit.audited(changes, self.now)
        self.catalog.apply(changes)
        result = ResultRecord(request_id=request.request_id, finished_at=self.now, content=content, payload=payload)
        self._instructions.append(Finish(result, changes, self.cause))

    def publish(self, result: ResultRecord) -> None:
        """The result is durable: clients may see it from now on."""
        self.catalog.apply([Put(result)])
        self._instructions.append(Publish(result, self.cause))

    def succeed(self, request: RequestRecord, body: dict[str, Any], *changes: Change) -> None:
        self.finish(request, "json", results.encode_json(body), *changes)

    def fail(self, request: RequestRecord, error: TxError, *changes: Change) -> None:
        self.finish(request, "error", results.encode_json(Failure.of(error)), *changes)
