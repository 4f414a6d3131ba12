"""Recent results, so that a poll that waits for one need not read the journal."""

from __future__ import annotations

from tx_async.wire.records import ResultRecord

RECORD_BYTES = 300
"""What a result takes beside its payload: its record, its id, its place in the table. Most payloads are smaller."""


def bytes_of(result: ResultRecord) -> int:
    return RECORD_BYTES + len(result.payload)


class PayloadCache:
    """A cache bounded in bytes that drops the oldest first; dropped results are still in the journal."""

    def __init__(self, bytes_max: int):
        self.bytes_max = bytes_max
        #: request_id -> result, oldest first
        self._results: dict[str, ResultRecord] = {}
        #: bytes of them all
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def put(self, result: ResultRecord) -> None:
        self.forget(result.request_id)
        self._results[result.request_id] = result
        self.num_bytes += bytes_of(result)
        while self.num_bytes > self.bytes_max and len(self._results) > 1:
            self.forget(next(iter(self._results)))

    def get(self, request_id: str) -> ResultRecord | None:
        return self._results.get(request_id)

    def forget(self, request_id: str) -> None:
        if result := self._results.pop(request_id, None):
            self.num_bytes -= bytes_of(result)
