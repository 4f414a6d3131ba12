"""Which stations each request has passed, and when: for open requests and the newest that have ended, and for live
requests until they end.

They are only in memory: after a restart, the journal still knows when a request was accepted and finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.interface import Passage
from tx_async.wire.records import ModelRecord, RequestRecord, SamplerRecord

ENDED_MAX = 20_000
"""How many ended requests are remembered, of those that are still on record."""
ENDED_MIN = 256
"""With fewer than this, nobody looks for those that are no longer on record."""


class Passages:
    def __init__(self, catalog: Catalog, ended_max: int = ENDED_MAX):
        self._catalog = catalog
        self._ended_max = ended_max
        #: request_id -> its passage
        self._known: dict[str, Passage] = {}
        #: those that have ended, oldest first
        self._ended: deque[str] = deque()
        self._swept_at_length = ENDED_MIN

    def __len__(self) -> int:
        return len(self._known)

    def get(self, request_id: str) -> Passage | None:
        return self._known.get(request_id)

    def begin(self, request: RequestRecord) -> Passage:
        passage = self._known[request.request_id] = self._of(request)
        return passage

    def end(self, request_id: str) -> Passage | None:
        """The request has a result, so its passage may be forgotten from now on. None on a second call."""
        passage = self._known.get(request_id)
        if passage is None or passage.published_at:
            return None
        self._ended.append(request_id)
        if len(self._ended) > self._ended_max:
            self._known.pop(self._ended.popleft(), None)
        if len(self._ended) >= self._swept_at_length:
            self._sweep()
        return passage

    def _sweep(self) -> None:
        """Forget the requests that the catalog has forgotten. What that costs is spread over as many requests as it
        looks at."""
        ended, self._ended = self._ended, deque(name for name in self._ended if name in self._catalog.requests)
        for request_id in set(ended).difference(self._ended):
            self._known.pop(request_id, None)
        self._swept_at_length = 2 * len(self._ended) + ENDED_MIN

    def drop(self, request_id: str) -> Passage | None:
        """A live request has ended, so its passage is forgotten. None on a second call."""
        return self._known.pop(request_id, None)

    def of_session(self, session_id: str) -> list[Passage]:
        """The passages of all the session's requests on record, oldest first."""
        subjects = {record.key for record in self._of_session(session_id)}
        requests = [request for request in self._catalog.requests.values() if request.subject in subjects]
        return [self._known.get(request.request_id) or self._of(request) for request in requests]

    def _of_session(self, session_id: str) -> Iterator[ModelRecord | SamplerRecord]:
        for table in (self._catalog.models, self._catalog.samplers):
            yield from (record for record in table.values() if record.session_id == session_id)

    def _of(self, request: RequestRecord) -> Passage:
        """The passage as far as the journal knows it."""
        result = self._catalog.results.get(request.request_id)
        return Passage(
            request_id=request.request_id,
            kind=kind_of(request.kind),
            subject=request.subject,
            seq_id=request.seq_id,
            accepted_at=request.created_at,
            published_at=result.finished_at if result else 0.0,
            failed=bool(result and result.failed),
        )


def kind_of(operation: str) -> str:
    """The API's name of an operation, such as `forward_backward` for `ForwardBackward`; a live sample is a sample."""
    words = operation.removeprefix("Live")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in words).lstrip("_")
