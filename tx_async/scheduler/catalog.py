"""Everything that the journal knows, as live objects: the fold over its records.

`apply` is the only way to change it, at recovery and while serving alike, so what a restart finds is what was there.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from tx_async.wire.records import (
    Change,
    CheckpointRecord,
    Delete,
    ModelRecord,
    Put,
    Record,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
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
        #: by tinker:// path
        self.checkpoints: dict[str, CheckpointRecord] = {}
        self.requests: dict[str, RequestRecord] = {}
        self.results: dict[str, ResultEntry] = {}
        #: (model_id or sampling_session_id, seq_id) -> request_id: what makes a submission a retry
        self.request_ids: dict[tuple[str, int], str] = {}
        for record in records:
            self._put(record)

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
        match record:
            case SessionRecord():
                self.sessions[record.key] = record
            case ModelRecord():
                self.models[record.key] = record
            case SamplerRecord():
                self.samplers[record.key] = record
            case CheckpointRecord():
                self.checkpoints[record.key] = record
            case RequestRecord():
                self.requests[record.key] = record
                self.request_ids[record.subject, record.seq_id] = record.request_id
            case ResultRecord():
                self.results[record.key] = ResultEntry(record.finished_at, record.content == "error")

    def _delete(self, change: Delete) -> None:
        match change.table:
            case "session":
                self.sessions.pop(change.key, None)
            case "model":
                self.models.pop(change.key, None)
            case "sampler":
                self.samplers.pop(change.key, None)
            case "checkpoint":
                self.checkpoints.pop(change.key, None)
            case "result":
                self.results.pop(change.key, None)
            case "request":
                if request := self.requests.pop(change.key, None):
                    self.request_ids.pop((request.subject, request.seq_id), None)

    def find_request(self, subject: str, seq_id: int) -> RequestRecord | None:
        request_id = self.request_ids.get((subject, seq_id))
        return self.requests[request_id] if request_id else None

    def files_in_use(self, storage_key: str, except_path: str | None = None) -> bool:
        """Whether a checkpoint, a sampling session, or a run that started from it still needs these files."""
        return (
            any(c.storage_key == storage_key and c.path != except_path for c in self.checkpoints.values())
            or any(s.storage_key == storage_key for s in self.samplers.values())
            or any(m.created_from == storage_key and not m.snapshots for m in self.models.values())
        )
