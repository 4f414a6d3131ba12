"""Watches facts come in and instructions go out, and reports how long each took. It decides nothing.

The machine has no clock: it reports each step at the moment it happens, and the watch reads the clock.
"""

from __future__ import annotations

import numpy as np

from tx_async import logs
from tx_async.clock import Clock
from tx_async.metrics import DEVICE_KINDS, Metrics
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.instructions import Deliver, Send, SequenceEnded
from tx_async.scheduler.interface import Passage
from tx_async.scheduler.stations.passages import Passages
from tx_async.tracing import Tracing
from tx_async.wire.records import RequestRecord, ResultRecord
from tx_async.wire.worker import TRAIN_TENSORS, TrainMicroBatch

SEGMENT_IDS = TRAIN_TENSORS.index("segment_ids")


class Watch:
    def __init__(self, catalog: Catalog, clock: Clock, metrics: Metrics, tracing: Tracing | None = None):
        self._tracing = tracing
        self.passages = Passages(catalog)
        self.metrics = metrics
        self._clock = clock
        #: the difference between `clock.monotonic()` and the time of day: passages never run backwards
        self._epoch = clock.now() - clock.monotonic()
        self._queued = {kind: metrics.queue.labels(kind) for kind in DEVICE_KINDS}
        self._ran = {kind: metrics.run.labels(kind) for kind in DEVICE_KINDS}

    @property
    def now(self) -> float:
        return self._epoch + self._clock.monotonic()

    # ---- the events that it is shown, in the order of a request's way

    def recovered(self, request: RequestRecord) -> None:
        """A request without a result, from before the server's restart."""
        self.passages.begin(request)

    def accepted(self, request: RequestRecord) -> None:
        """The request is durable, or live and never will be: from now on it waits for its turn."""
        passage = self.passages.begin(request)
        passage.durable_at, passage.http_id = self.now, logs.request_id.get()
        if self._tracing is not None:
            self._tracing.accepted(passage)

    def sent(self, instruction: Send) -> None:
        if isinstance(instruction.command, TrainMicroBatch):
            segments = instruction.tensors[SEGMENT_IDS]
            self.metrics.micro_batch_fill.observe(np.count_nonzero(segments) / segments.size)
        for request_id in instruction.requests:
            passage = self.passages.get(request_id)
            if passage is not None and not passage.begun_at:
                self._begun(passage, instruction.worker_id)

    def _begun(self, passage: Passage, worker_id: str) -> None:
        passage.begun_at, passage.worker_id = self.now, worker_id
        if passage.durable_at and (queued := self._queued.get(passage.kind)):
            queued.observe(passage.begun_at - passage.durable_at)

    def sequence_ended(self, instruction: SequenceEnded) -> None:
        request, times = instruction.request, instruction.times
        first_token_at = self.now - (times.last_token - times.first_token) / 1000
        decode_s = (times.last_token - times.decode_began) / 1000
        self.metrics.time_to_first_token.observe(max(0.0, first_token_at - request.created_at))
        if decode_s > 0:
            self.metrics.time_per_output_token.observe(decode_s / instruction.num_tokens)
        passage = self.passages.get(request.request_id)
        if passage is not None:
            first_token_at = max(first_token_at, passage.begun_at)
            passage.first_token_at = min(first_token_at, passage.first_token_at or first_token_at)

    def delivered(self, instruction: Deliver) -> None:
        """A live request's client is told something. Its first token was drawn by now; the worker tells the exact time
        when the sample has ended."""
        passage = self.passages.get(instruction.request_id)
        if passage is not None and not passage.first_token_at and any(piece.tokens for piece in instruction.pieces):
            passage.first_token_at = self.now

    def finished(self, result: ResultRecord) -> None:
        """A request's end is decided, and becomes durable now."""
        passage = self.passages.get(result.request_id)
        if passage is None:
            return
        self._ended(passage, failed=result.content == "error")

    def live_ended(self, request_id: str, failed: bool) -> None:
        """A live request has ended, however it did. Nobody asks for it again."""
        if passage := self.passages.drop(request_id):
            self._ended(passage, failed)
            if self._tracing is not None:
                self._tracing.live_ended(passage)

    def _ended(self, passage: Passage, failed: bool) -> None:
        passage.ended_at, passage.failed = self.now, failed
        if passage.begun_at and (ran := self._ran.get(passage.kind)):
            ran.observe(passage.ended_at - passage.begun_at)

    def published(self, request_id: str) -> None:
        """Clients may see the result."""
        if passage := self.passages.end(request_id):
            passage.published_at = self.now
            if self._tracing is not None:
                self._tracing.published(passage)

    def polled(self, request_id: str) -> None:
        """A client asks for the result."""
        if self._tracing is not None and (passage := self.passages.get(request_id)):
            self._tracing.polled(passage)

    def fetched(self, request_id: str) -> None:
        passage = self.passages.get(request_id)
        if passage is not None and not passage.fetched_at:
            passage.fetched_at = self.now
            if self._tracing is not None:
                self._tracing.fetched(passage)
