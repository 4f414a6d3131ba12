"""What the page asks of the fake scheduler."""

from __future__ import annotations

from collections import Counter, defaultdict

from tx_async.wire.dashboard import Overview, QueueView, RequestView, RunView
from tx_async.wire.operations import Operation
from tx_async.wire.records import ModelRecord, RequestRecord, ResultRecord


class FakeViews:
    """A part of `FakeScheduler`."""

    histories: defaultdict[str, list[dict[str, float]]]
    """model_id -> what `history` answers; an optim_step adds a row."""
    operations_to_replay = operations_lost = 0
    """What a test says that runs again after a restart."""
    operations: list[Operation]
    _requests: dict[str, RequestRecord]
    _results: dict[str, ResultRecord]
    _held_operations: list[tuple[RequestRecord, Operation]]

    def history(self, model_id: str, since: int = 0) -> list[dict[str, float]]:
        return [row for row in self.histories.get(model_id, []) if row["index"] >= since]

    def overview(self) -> Overview:
        held = Counter(record.owner for record, _ in self._held_operations)
        queues = tuple(QueueView(owner=owner, requests=number, samples=0) for owner, number in held.items())
        return Overview(
            queues=queues,
            operations_to_replay=self.operations_to_replay,
            operations_lost=self.operations_lost,
            train_tokens=float(len(self.operations)),
        )

    def run_view(self, model: ModelRecord) -> RunView:
        state = "idle" if model.status == "live" else model.status
        return RunView(state=state, num_steps=len(self.histories.get(model.model_id, [])))

    def requests_of(self, model_id: str, limit: int) -> list[RequestView]:
        known = [record for record in self._requests.values() if record.subject == model_id]
        return [self._request_view(record) for record in reversed(known)][:limit]

    def _request_view(self, record: RequestRecord) -> RequestView:
        result = self._results.get(record.request_id)
        return RequestView(
            request_id=record.request_id,
            seq_id=record.seq_id,
            kind=record.kind,
            station="queued" if result is None else "failed" if result.content == "error" else "finished",
            accepted_at=record.created_at,
            queued_at=record.created_at + 1,
            sent_at=None if result is None else record.created_at + 2,
            finished_at=result.finished_at if result else None,
        )
