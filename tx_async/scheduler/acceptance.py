"""A submission becomes an accepted request only when it is durable: then the state is told first, and the client after
it.

After a crash before the commit, the client tries again. After a crash later than that, recovery finds the request and
runs it.
"""

from __future__ import annotations

import asyncio

from tx_async.clock import Clock
from tx_async.errors import ContentLost, InvalidRequest, Overloaded, StorageError
from tx_async.journal.journal import Journal
from tx_async.journal.transaction import recording_key
from tx_async.scheduler.core.facts import RecordingsUsed, SubmissionRefused
from tx_async.scheduler.performer import Performer
from tx_async.scheduler.sampling import recordings
from tx_async.scheduler.submissions import Submission, Submissions, key_of
from tx_async.wire.operations import Encoded, ForwardBackward, Operation
from tx_async.wire.records import RequestRecord


class Acceptance:
    def __init__(self, submissions: Submissions, journal: Journal, performer: Performer, clock: Clock):
        self.submissions = submissions
        self.journal = journal
        self.performer = performer
        self.clock = clock
        #: request_id -> its commit
        self._commits: dict[str, asyncio.Task[None]] = {}

    async def submit(self, owner: str, operation: Operation, encoded: Encoded | None = None) -> RequestRecord:
        """Returns the request of this key, which may be an earlier submission's. Raises `Conflict`, `Overloaded`,
        `StorageError`."""
        try:
            known = self.submissions.submit(owner, operation, self.clock.now(), encoded)
            if not isinstance(known, Submission):
                return known
            # A client that gives up must not take back what may be durable already.
            await asyncio.shield(self._commits.get(known.request.request_id) or self._begin(known))
        except (Overloaded, StorageError):
            self.performer.handle(SubmissionRefused(key_of(operation)[0]))
            raise
        return known.request

    def _begin(self, submission: Submission) -> asyncio.Task[None]:
        request_id = submission.request.request_id
        task = self._commits[request_id] = self.performer.spawn(self._commit(submission))
        task.add_done_callback(lambda _task: self._commits.pop(request_id))
        return task

    async def _commit(self, submission: Submission) -> None:
        try:
            if recordings.are_needed(submission.accepted.operation):
                submission = await self._with_heads(submission)
            await self.journal.commit(submission.changes)
        except BaseException:
            self.submissions.failed(submission)
            raise
        self.performer.handle(self.submissions.durable(submission))

    # ---- stable_reinforce

    async def _with_heads(self, submission: Submission) -> Submission:
        """Add to the batch what the sampler recorded of its tokens, so that a replay needs no recording. If a recording
        cannot be found, the batch fails in its place in the order. Raises `StorageError`."""
        operation = submission.accepted.operation
        assert isinstance(operation, ForwardBackward)
        try:
            needed = self.submissions.recordings_of(operation)
            bodies = await asyncio.gather(*map(self._recording, needed))
            found = dict(zip(needed, bodies, strict=True))
            complete = await asyncio.to_thread(_complete, submission, operation, found)
        except InvalidRequest as error:
            return submission.rejected(error.message)
        self.performer.handle(RecordingsUsed(tuple(needed)))
        return complete

    async def _recording(self, sequence_id: str) -> bytes:
        try:
            return await self.journal.read_body(recording_key(sequence_id))
        except ContentLost as error:
            raise InvalidRequest(f"The record of the sequence {sequence_id} is lost: {error}") from error


def _complete(submission: Submission, operation: ForwardBackward, bodies: dict[str, bytes]) -> Submission:
    """Runs on a thread, because bodies have megabytes."""
    found = {sequence_id: recordings.decode(body) for sequence_id, body in bodies.items()}
    return submission.with_operation(recordings.with_heads(operation, found))
