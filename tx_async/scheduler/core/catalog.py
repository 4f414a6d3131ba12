"""Everything that the journal knows, as live objects: the fold over its records.

`apply` is the only way to change it, at recovery and while serving alike, so a restart finds exactly what was there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from msgspec import Struct

from tx_async.errors import InvalidRequest, OtherBase, UnknownCheckpoint
from tx_async.scheduler.core.history import Histories
from tx_async.scheduler.core.holdings import HeldRecord, Holdings
from tx_async.scheduler.core.recorded import RecordedSequences
from tx_async.wire.records import (
    AuditRecord,
    Change,
    CheckpointRecord,
    Delete,
    HistoryRecord,
    IdentityRecord,
    ModelRecord,
    Put,
    Record,
    RecordedSequence,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
    type_of,
)


class ResultEntry(Struct, frozen=True):
    """A result without its payload, which lies in the journal."""

    finished_at: float
    failed: bool


class Catalog:
    def __init__(self, records: Iterable[Record] = ()):
        self.sessions: dict[str, SessionRecord] = {}
        self.models: dict[str, ModelRecord] = {}
        self.samplers: dict[str, SamplerRecord] = {}
        self.holdings = Holdings()
        #: by tinker:// path
        self.checkpoints: dict[str, CheckpointRecord] = {}
        self.recordings = RecordedSequences()
        self.histories = Histories()
        self.requests: dict[str, RequestRecord] = {}
        self.results: dict[str, ResultEntry] = {}
        #: (model_id or sampling_session_id, seq_id) -> request_id: a submission of a known key is a retry
        self.request_ids: dict[tuple[str, int], str] = {}
        #: storage key -> how many records need its files
        self.references: Counter[str] = Counter()
        #: by number, oldest first
        self.audits: dict[str, AuditRecord] = {}
        #: the server and base that the data belong to; None where nobody has said so
        self.identity: IdentityRecord | None = None
        #: type of a record -> what it changes here
        self._puts: dict[type[Record], Callable[[Any], None]] = {
            SessionRecord: self._put_held,
            ModelRecord: self._put_held,
            SamplerRecord: self._put_held,
            RequestRecord: self._put_request,
            ResultRecord: self._put_result,
            CheckpointRecord: self._put_checkpoint,
            IdentityRecord: self._put_identity,
            AuditRecord: self._put_audit,
            RecordedSequence: self.recordings.put,
            HistoryRecord: self.histories.put,
        }
        for record in records:
            self._puts[type(record)](record)
        self.recordings.sort()

    def __repr__(self) -> str:
        unfinished = len(self.requests) - len(self.results)
        return (
            f"<Catalog [Sessions: {len(self.sessions)} | Models: {len(self.models)} | Samplers: {len(self.samplers)} | "
            f"Requests: {unfinished} unfinished, {len(self.results)} finished | Checkpoints: {len(self.checkpoints)}]>"
        )

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if isinstance(change, Put):
                self._puts[type(change.record)](change.record)
            elif isinstance(change, Delete):
                self._delete(change)

    def _put_held(self, record: HeldRecord) -> None:
        table = self._table_of(type_of(record))
        before = table.get(record.key)
        table[record.key] = record
        self._count_files(before, record)
        if before is None:
            self.holdings.add(record)

    def _put_request(self, record: RequestRecord) -> None:
        before = self.requests.get(record.request_id)
        self.requests[record.request_id] = record
        self.request_ids[record.subject, record.seq_id] = record.request_id
        self._count_files(before, record)

    def _put_result(self, record: ResultRecord) -> None:
        self.results[record.request_id] = ResultEntry(record.finished_at, record.content == "error")

    def _put_checkpoint(self, record: CheckpointRecord) -> None:
        before = self.checkpoints.get(record.path)
        self.checkpoints[record.path] = record
        self._count_files(before, record)
        self.holdings.stored(before, record)

    def _put_identity(self, record: IdentityRecord) -> None:
        self.identity = record

    def _put_audit(self, record: AuditRecord) -> None:
        self.audits[record.event_id] = record

    def _delete(self, change: Delete) -> None:
        if change.table == "recording":
            self.recordings.pop(change.key)
            return
        if change.table == "history":
            self.histories.pop(change.key)
            return
        match self._table_of(change.table).pop(change.key, None):
            case SessionRecord() | ModelRecord() | SamplerRecord() as record:
                self._count_files(record, None)
                self.holdings.forget(record)
            case RequestRecord() as record:
                self._count_files(record, None)
                key = (record.subject, record.seq_id)
                if self.request_ids.get(key) == record.request_id:
                    del self.request_ids[key]
            case CheckpointRecord() as record:
                self._count_files(record, None)
                self.holdings.stored(record, None)
            case _:
                pass  # nothing was there, or nothing hangs on it

    def _count_files(self, before: Record | None, after: Record | None) -> None:
        """A record needs other files than its earlier version."""
        released, needed = files_of(before), files_of(after)
        if released == needed:
            return
        if needed:
            self.references[needed] += 1
        if released:
            self.references[released] -= 1
            if not self.references[released]:
                del self.references[released]

    def _table_of(self, name: str) -> dict[str, Any]:
        return getattr(self, f"{name}s")

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the served base; "" while nobody knows it."""
        return self.identity.bases[-1].fingerprint if self.identity and self.identity.bases else ""

    def is_of_other_base(self, record: ModelRecord | SamplerRecord | CheckpointRecord) -> bool:
        if self.identity is None or not self.identity.bases:
            return False
        return (record.base_fingerprint or self.identity.bases[0].fingerprint) != self.base_fingerprint

    def check_base(self, record: ModelRecord | SamplerRecord | CheckpointRecord) -> None:
        """Raises `OtherBase` when its weights belong to another base than the one served."""
        if self.is_of_other_base(record):
            assert self.identity is not None
            theirs = record.base_fingerprint or self.identity.bases[0].fingerprint
            raise OtherBase(
                f"{record.key} belongs to the base model {record.base_model} (fingerprint {theirs}); this server has "
                f"{self.identity.bases[-1].name} (fingerprint {self.base_fingerprint}). It is kept, and works again "
                "when a server has its base."
            )

    def find_request(self, subject: str, seq_id: int) -> RequestRecord | None:
        request_id = self.request_ids.get((subject, seq_id))
        return self.requests[request_id] if request_id else None

    def find_checkpoint(self, owner: str, path: str, optimizer: bool = False) -> CheckpointRecord:
        """The owner's own checkpoint or a published one. Raises `UnknownCheckpoint`, `OtherBase`, and `InvalidRequest`
        when it lacks the optimizer state asked for."""
        checkpoint = self.checkpoints.get(path)
        if checkpoint is None or (checkpoint.owner != owner and not checkpoint.public):
            raise UnknownCheckpoint(f"{path}: no such checkpoint. It was never saved, was deleted, or has expired.")
        self.check_base(checkpoint)
        if optimizer and checkpoint.kind != "weights":
            raise InvalidRequest(
                f"{path} holds no optimizer state: load only its weights, or load a checkpoint of save_state."
            )
        return checkpoint


def _source_of(model: ModelRecord) -> str | None:
    """A run's own snapshots are not counted: they belong to it alone."""
    return model.created_from if model.status == "live" and not model.dropped_seq_id else None


_files_of: dict[type, Callable[[Any], str | None]] = {
    ModelRecord: _source_of,
    SamplerRecord: attrgetter("storage_key"),
    RequestRecord: attrgetter("storage_key"),
    CheckpointRecord: attrgetter("storage_key"),
}
"""Type of a record -> how to find the files that it needs."""


def files_of(record: Record | None) -> str:
    """The storage key of the files that a record needs, "" for none."""
    find = _files_of.get(type(record))
    return (find and find(record)) or ""
