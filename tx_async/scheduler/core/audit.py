"""The audit log: changes of runs and checkpoints as events, for somebody who asks later who did what.

Events are derived from the changes themselves, before the catalog has them, and join their commit: the log has exactly
what is durable. The newest `events_max` are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from tx_async.scheduler.core.catalog import Catalog
from tx_async.wire.records import AuditRecord, Change, CheckpointRecord, Delete, ModelRecord, Put

_NUMBER_DIGITS = 12


class AuditLog:
    """Derives and trims events. It has no state of its own: the events are in the catalog."""

    def __init__(self, catalog: Catalog, events_max: int = 10_000):
        self.catalog = catalog
        self.events_max = events_max

    def __repr__(self) -> str:
        return f"<AuditLog [{len(self.catalog.audits)} of {self.events_max} events]>"

    def audited(self, changes: Sequence[Change], now: float) -> tuple[Change, ...]:
        """The changes, followed by the events that describe them. Call it before the catalog has the changes."""
        events = [event for change in changes if _is_audited(change) for event in self._events(change, now)]
        return (*changes, *self._kept(events)) if events else tuple(changes)

    def noted(self, event: str, subject: str, details: Mapping[str, Any], now: float) -> tuple[Change, ...]:
        """An event that the operator caused without changing a record."""
        return tuple(self._kept([self._event(now, event, subject, "", **details)]))

    def _kept(self, events: list[AuditRecord]) -> list[Change]:
        """The new events, and deletions of the oldest ones when there are too many."""
        excess = len(self.catalog.audits) + len(events) - self.events_max
        forgotten = islice(self.catalog.audits, max(0, excess))
        return [*map(Put, events[-self.events_max :]), *(Delete("audit", key) for key in forgotten)]

    def _events(self, change: Change, now: float) -> Iterator[AuditRecord]:
        match change:
            case Put(record=CheckpointRecord() as checkpoint):
                yield from self._checkpoint_put(now, checkpoint, self.catalog.checkpoints.get(checkpoint.path))
            case Put(record=ModelRecord() as model):
                yield from self._run_put(now, model, self.catalog.models.get(model.model_id))
            case Delete(table="checkpoint", key=path) if checkpoint := self.catalog.checkpoints.get(path):
                has_expired = checkpoint.expires_at is not None and checkpoint.expires_at <= now
                yield self._event(
                    now, "checkpoint.expired" if has_expired else "checkpoint.deleted", path, checkpoint.owner
                )
            case Delete(table="model", key=model_id) if model := self.catalog.models.get(model_id):
                yield self._event(now, "run.forgotten", model_id, model.owner)
            case _:
                pass  # an operator need not be able to look these up

    def _checkpoint_put(
        self, now: float, record: CheckpointRecord, before: CheckpointRecord | None
    ) -> Iterator[AuditRecord]:
        if before is None or before.storage_key != record.storage_key:
            is_copy = record.storage_key in self.catalog.references
            event = "checkpoint.copied" if before is None and is_copy else "checkpoint.saved"
            yield self._event(
                now, event, record.path, record.owner, size_bytes=record.size_bytes, overwritten=before is not None
            )
        elif before.public != record.public:
            event = "checkpoint.published" if record.public else "checkpoint.unpublished"
            yield self._event(now, event, record.path, record.owner)
        elif before.expires_at != record.expires_at:
            yield self._event(now, "checkpoint.ttl_set", record.path, record.owner, expires_at=record.expires_at)

    def _run_put(self, now: float, record: ModelRecord, before: ModelRecord | None) -> Iterator[AuditRecord]:
        if before is None:
            source = record.created_from_path
            yield self._event(
                now,
                "run.created",
                record.model_id,
                record.owner,
                base_model=record.base_model,
                rank=record.lora.rank,
                source=source,
            )
        elif before.status != record.status:
            yield self._event(now, f"run.{record.status}", record.model_id, record.owner)

    def _next_number(self) -> int:
        """Events may share a number while the first of them is on its way to the disk; their subjects differ then."""
        newest = next(reversed(self.catalog.audits), "-1")
        return int(newest.partition(" ")[0]) + 1

    def _event(self, now: float, event: str, subject: str, owner: str, **details: Any) -> AuditRecord:
        details = {name: value for name, value in details.items() if value not in (None, False)}
        return AuditRecord(
            event_id=f"{self._next_number():0{_NUMBER_DIGITS}d} {event} {subject}",
            at=now,
            event=event,
            subject=subject,
            owner=owner,
            details=details,
        )


def _is_audited(change: Change) -> bool:
    """Whether events may follow from it: the records of requests, which change most often, have none."""
    if isinstance(change, Put):
        return type(change.record) in (CheckpointRecord, ModelRecord)
    return isinstance(change, Delete) and change.table in ("checkpoint", "model")
