"""Counts and bytes of the lasting things that each key has made: sessions, training runs and sampling sessions."""

from __future__ import annotations

from collections import Counter

from tx_async.wire.records import CheckpointRecord, ModelRecord, SamplerRecord, SessionRecord, encode_record, type_of

HeldRecord = SessionRecord | ModelRecord | SamplerRecord


class Holdings:
    def __init__(self):
        #: (table, key) -> bytes of the record as it was made
        self._sizes: dict[tuple[str, str], int] = {}
        #: sums over them, without zeros
        self.numbers: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[str] = Counter()
        #: bytes of its checkpoints' files, without zeros
        self.checkpoint_bytes: Counter[str] = Counter()

    def stored(self, before: CheckpointRecord | None, after: CheckpointRecord | None) -> None:
        """A checkpoint was replaced, added or deleted."""
        for record, sign in ((before, -1), (after, 1)):
            if record is not None:
                self.checkpoint_bytes[record.owner] += sign * record.size_bytes
                if not self.checkpoint_bytes[record.owner]:
                    del self.checkpoint_bytes[record.owner]

    def add(self, record: HeldRecord) -> None:
        """Count a new record. Its later versions hold no more of the client's own data, and are not counted."""
        num_bytes = self._sizes[type_of(record), record.key] = len(encode_record(record))
        self._count(record, 1, num_bytes)

    def forget(self, record: HeldRecord) -> None:
        self._count(record, -1, self._sizes.pop((type_of(record), record.key)))

    def _count(self, record: HeldRecord, sign: int, num_bytes: int) -> None:
        owner, table = record.owner, type_of(record)
        self.numbers[owner, table] += sign
        self.num_bytes[owner] += sign * num_bytes
        if not self.numbers[owner, table]:
            del self.numbers[owner, table]
        if not self.num_bytes[owner]:
            del self.num_bytes[owner]
