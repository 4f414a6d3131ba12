"""Everything that the journal knows, as live objects: the fold over its records.

`apply` is the only way to change it, at recovery and while serving alike, so a restart finds exactly what was there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from tx_async.errors import InvalidRequest, OtherBase, UnknownCheckpoint
from tx_async.scheduler.core.history import Histories
from tx_async.scheduler.core.holdings import Holdings
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
        for record in records:
            self._put(record)
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
                self._put(change.record)
            elif isinstance(change, Delete):
                self._delete(change)

    def _put(self, record: Record) -> None:
        if isinstance(record, ResultRecord):
            self.results[record.key] = ResultEntry(record.finished_at, record.content == "error")
            return
        if isinstance(record, IdentityRecord):
            self.identity = record
            return
        if isinstance(record, RecordedSequence):
            self.recordings.put(record)
            return
        if isinstance(record, HistoryRecord):
            self.histories.put(record)
            return
        table = self._table_of(type_of(record))
        before = table.get(record.key)
        self._release(before)
        table[record.key] = record
        if isinstance(record, CheckpointRecord):
            self.holdings.stored(before, record)
        self.holdings.put(record)
        self.references.update(files_of(record))
        if isinstance(record, RequestRecord):
            self.request_ids[record.subject, record.seq_id] = record.request_id

    def _delete(self, change: Delete) -> None:
        if change.table == "result":
            self.results.pop(change.key, None)
            return
        if change.table == "recording":
            self.recordings.pop(change.key)
            return
        if change.table == "history":
            self.histories.pop(change.key)
            return
        record = self._table_of(change.table).pop(change.key, None)
        self._release(record)
        self.holdings.forget(record)
        self.holdings.stored(record, None)
        if isinstance(record, RequestRecord):
            key = (record.subject, record.seq_id)
            if self.request_ids.get(key) == record.request_id:
                del self.request_ids[key]

    def _release(self, record: Record | None) -> None:
        for key in files_of(record) if record is not None else ():
            self.references[key] -= 1
            if not self.references[key]:
                del self.references[key]

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


def files_of(record: Record) -> tuple[str, ...]:
    """The storage keys whose files this record needs. A run's own snapshots are not counted: they belong to it
    alone."""
    match record:
        case CheckpointRecord():
            return (record.storage_key,)
        case SamplerRecord(storage_key=str(key)):
            return (key,)
        case ModelRecord(created_from=str(key), status="live", dropped_seq_id=0):
            return (key,)
        case RequestRecord(storage_key=key) if key:
            return (key,)
        case _:
            return ()
