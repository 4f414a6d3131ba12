"""Clients that wait for live requests: each has a queue, from the state's instructions to the generator that the API
reads.

A crash ends all live requests. A client that goes away closes its generator, which cancels what still runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tx_async.clock import Clock
from tx_async.errors import NotReady, TxError
from tx_async.scheduler.core.facts import LiveRequested, RequestCancelled
from tx_async.scheduler.core.instructions import Deliver
from tx_async.scheduler.core.state import check_room
from tx_async.scheduler.interface import LivePiece
from tx_async.scheduler.performer import Performer
from tx_async.scheduler.quota import Quota
from tx_async.wire import ids
from tx_async.wire.operations import Sample
from tx_async.wire.records import RequestRecord

PATIENCE_S = 60.0
"""How long live requests wait for a worker that has gone."""
AGAIN = "Try again."


class LiveRequests:
    def __init__(self, performer: Performer, quota: Quota, clock: Clock, waiting_for: Callable[[], list[str]]):
        self.performer = performer
        self.state = performer.state
        self.quota = quota
        self.clock = clock
        self._waiting_for = waiting_for
        #: request_id -> the items that its client has not read yet; an error is the last one
        self._queues: dict[str, asyncio.Queue[LivePiece | TxError]] = {}
        #: since when nothing could be sampled; None while it can
        self._stuck_since: float | None = None

    def __len__(self) -> int:
        return len(self._queues)

    async def sample(self, owner: str, operation: Sample, model_path: str | None) -> AsyncGenerator[LivePiece, None]:
        """See `SchedulerApi.sample_live`."""
        request = self._begin(owner, operation, model_path)
        queue, num_open = self._queues[request.request_id], operation.num_samples
        failed = False
        try:
            while num_open:
                news = await queue.get()
                if isinstance(news, TxError):
                    failed = True
                    raise news
                num_open -= news.stop_reason is not None
                yield news
        finally:
            self._end(request.request_id, failed)

    def deliver(self, instruction: Deliver) -> None:
        """Pass on what the state says, unless the client is gone."""
        queue = self._queues.get(instruction.request_id)
        if queue is None:
            return
        for piece in instruction.pieces:
            queue.put_nowait(piece)
        if instruction.error is not None:
            queue.put_nowait(_to_be_repeated(instruction.error))

    def tick(self) -> None:
        """Tell clients that wait for a worker that it does not come back."""
        missing = self._waiting_for()
        if not missing:
            self._stuck_since = None
            return
        now = self.clock.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since >= PATIENCE_S:
            self.end_all(_not_ready(missing))

    def end_all(self, error: TxError) -> None:
        for queue in self._queues.values():
            queue.put_nowait(error)

    def _begin(self, owner: str, operation: Sample, model_path: str | None) -> RequestRecord:
        if missing := self._waiting_for():
            raise _not_ready(missing)
        version = self.state.catalog.find_checkpoint(owner, model_path).storage_key if model_path else None
        check_room(operation, self.state.base_model)
        request = self._record(owner, operation)
        self.quota.check(request)
        self.quota.take(request)
        self._queues[request.request_id] = asyncio.Queue()
        self.performer.handle(LiveRequested(request, operation, version))
        if reason := self.state.stranded.get(request.request_id):
            self._end(request.request_id, failed=True)
            raise NotReady(f"No worker can sample this: {reason}.")
        return request

    def _record(self, owner: str, operation: Sample) -> RequestRecord:
        request_id = ids.new_id("live")
        return RequestRecord(
            request_id=request_id,
            owner=owner,
            kind="LiveSample",
            subject="",
            seq_id=0,
            body_digest="",
            body_bytes=len(operation.prompt),
            created_at=self.clock.now(),
            sample_sequence_ids=tuple(f"{request_id}:{i}" for i in range(operation.num_samples)),
        )

    def _end(self, request_id: str, failed: bool) -> None:
        """End a live request, with all of it that still runs."""
        del self._queues[request_id]
        self.quota.give_back(request_id)
        self.performer.watch.live_ended(request_id, failed)
        self.performer.handle(RequestCancelled(request_id))


def _not_ready(missing: list[str]) -> NotReady:
    return NotReady(f"The server is not ready: {'; '.join(missing)}. Try again in a moment.")


def _to_be_repeated(error: TxError) -> TxError:
    """The error that tells the client to ask again: nobody else can run a live request again."""
    if error.category == "user" or AGAIN in error.message:
        return error
    return type(error)(f"{error.message} {AGAIN}")
