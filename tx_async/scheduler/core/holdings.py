"""Counts and bytes of the lasting things that each key has made: sessions, training runs and sampling sessions."""

from __future__ import annotations

from collections import Counter

from tx_async.wire.records import (
    CheckpointRecord,
    ModelRecord,
    Record,
    SamplerRecord,
    SessionRecord,
    encode_record,
    type_of,
)

KINDS = (SessionRecord, ModelRecord, SamplerRecord)


class Holdings:
    def __init__(self):
        #: (table, key) -> (owner, bytes of the record as it was made)
        self._sizes: dict[tuple[str, str], tuple[str, int]] = {}
        #: sums over them, without zeros
        self.numbers: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[str] = Counter()
        #: bytes of its checkpoints' files, without zeros
        self.checkpoint_bytes: Counter[str] = Counter()

    def stored(self, before: Record | None, after: Record | None) -> None:
        """A checkpoint was replaced, added or deleted."""
        for record, sign in ((before, -1), (after, 1)):
            if isinstance(record, CheckpointRecord):
                self.checkpoint_bytes[record.owner] += sign * record.size_bytes
                if not self.checkpoint_bytes[record.owner]:
                    del self.checkpoint_bytes[record.owner]

    def put(self, record: Record) -> None:
        """Count a record once: its later versions hold no more of the client's own data."""
        if isinstance(record, KINDS) and (type_of(record), record.key) not in self._sizes:
            self._sizes[type_of(record), record.key] = record.owner, len(encode_record(record))
            self._count(type_of(record), record.key, 1)

    def forget(self, record: Record | None) -> None:
        if record is not None and (type_of(record), record.key) in self._sizes:
            self._count(type_of(record), record.key, -1)
            del self._sizes[type_of(record), record.key]

    def _count(self, table: str, key: str, sign: int) -> None:
        owner, num_bytes = self._sizes[table, key]
        self.numbers[owner, table] += sign
        self.num_bytes[owner] += sign * num_bytes
        if not self.numbers[owner, table]:
            del self.numbers[owner, table]
        if not self.num_bytes[owner]:
            del self.num_bytes[owner]
