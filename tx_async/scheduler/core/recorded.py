"""The recorded sequences of all tenants, each tenant's in the order of their last use."""

from __future__ import annotations

from collections.abc import Iterator

from tx_async.wire.records import RecordedSequence


class RecordedSequences:
    def __init__(self) -> None:
        self._by_id: dict[str, RecordedSequence] = {}
        #: owner -> the ids of its recordings, the longest unused first
        self._by_owner: dict[str, dict[str, None]] = {}
        #: owner -> the sum of their sizes
        self.num_bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RecordedSequence]:
        return iter(self._by_id.values())

    def get(self, sequence_id: str) -> RecordedSequence | None:
        return self._by_id.get(sequence_id)

    def num_bytes_of(self, owner: str) -> int:
        return self.num_bytes.get(owner, 0)

    def put(self, record: RecordedSequence) -> None:
        """Add a recording, or note that it was used again: it is now the one used last."""
        self.pop(record.key)
        self._by_id[record.key] = record
        self._by_owner.setdefault(record.owner, {})[record.key] = None
        self.num_bytes[record.owner] = self.num_bytes_of(record.owner) + record.num_bytes

    def pop(self, sequence_id: str) -> None:
        record = self._by_id.pop(sequence_id, None)
        if record is None:
            return
        self.num_bytes[record.owner] -= record.num_bytes
        del self._by_owner[record.owner][sequence_id]
        if not self._by_owner[record.owner]:
            del self._by_owner[record.owner], self.num_bytes[record.owner]

    def sort(self) -> None:
        """Sort by last use: recordings read from a journal come in the order in which they were sampled."""
        for record in sorted(self._by_id.values(), key=lambda record: record.used_at):
            self.put(record)

    def beyond(self, owner: str, num_bytes_max: int) -> list[RecordedSequence]:
        """The recordings of a tenant that have to go, the longest unused first, until the rest fits."""
        excess = self.num_bytes_of(owner) - num_bytes_max
        gone: list[RecordedSequence] = []
        for sequence_id in self._by_owner.get(owner, ()):
            if excess <= 0:
                break
            gone.append(self._by_id[sequence_id])
            excess -= gone[-1].num_bytes
        return gone

    def unused_since(self, time: float) -> list[RecordedSequence]:
        """The recordings that were last used before `time` (seconds since the epoch)."""
        gone: list[RecordedSequence] = []
        for ids in self._by_owner.values():
            for sequence_id in ids:
                if (record := self._by_id[sequence_id]).used_at >= time:
                    break
                gone.append(record)
        return gone
