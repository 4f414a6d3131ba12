"""The journal actor: group commit over one driver.

Whatever arrives while a transaction is on its way to the disk joins the next one, so a commit carries as many changes
as there are waiters. `commit` returns when its changes are durable; callers answer their clients only then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from tx_async.actor import Inbox
from tx_async.errors import JournalUnusable, LeaseHeld, Overloaded, StorageError
from tx_async.metrics import Counter, Gauge
from tx_async.wire.records import Change, Put, Record, ResultRecord

TRANSACTION_BYTES_MAX = 32 * 2**20
"""One transaction takes waiting commits up to this many bytes (but at least one commit), so that a small commit behind
many large bodies does not wait for all of them."""
TRANSACTION_CHANGES_MAX = 8_192
WAITING_BYTES_MAX = 4 * 2**30
"""Bytes that may wait for the disk; beyond them, new work is refused with `Overloaded`."""
WAITING_CHANGES_MAX = 200_000
CHANGE_BYTES = 512
"""What each change counts for besides its body and payload: roughly a small record and its index entries."""

_log = logging.getLogger(__name__)


class Driver(Protocol):
    """One database. `tests/conformance/test_journal.py` lists its behaviours; a driver is ready when all of them
    pass.
    """

    async def open(self) -> None:
        """Migrate to the newest schema and take the lease. Raises `LeaseHeld` with the holder's host and pid,
        `StorageError` when the database cannot be used. After an error nothing is held."""
        ...

    async def load(self) -> list[Record]:
        """All live records, without bodies and without large payloads of results; each table in order of insertion."""
        ...

    async def apply(self, changes: Sequence[Change]) -> None:
        """One transaction, durable when this returns (all of the changes or, after an error, none).

        Raises `StorageError` when the database or its disk failed (a later call may succeed), `LeaseHeld` when another
        server has taken over; anything else means that one of these changes cannot be stored.
        """
        ...

    async def read_body(self, request_id: str) -> bytes:
        """The body of a `RequestRecord`. Raises `ContentLost` when it is gone or damaged, `StorageError` when it cannot
        be read."""
        ...

    async def read_result(self, request_id: str) -> ResultRecord:
        """A result with its payload. Raises `NotFound` when there is none, `StorageError` when it is damaged."""
        ...

    async def lost(self) -> None:
        """Waits for ever, or until the lease is lost to another server: then it raises `LeaseHeld`."""
        ...

    async def close(self) -> None:
        """Release the lease. Safe to call twice, and after a failed `open`."""
        ...


class JournalStatistics(Struct, frozen=True, kw_only=True):
    commits: Counter
    """Transactions that have become durable."""
    failed_commits: Counter
    """Transactions that the driver could not make durable."""
    changes: Counter
    """Changes in the durable transactions."""
    bytes: Counter
    """Bytes of bodies and payloads in the durable transactions."""
    waiting_changes: Gauge
    """Changes that are not durable yet, those of the transaction in flight included."""
    waiting_bytes: Gauge
    """Bytes of bodies and payloads that are not durable yet."""
    last_commit_ms: Gauge
    """How long the newest durable transaction took."""


class _Commit(Struct, frozen=True, eq=False):
    """What one caller waits for."""

    changes: tuple[Change, ...]
    num_bytes: int
    durable: asyncio.Future[None]


class Journal:
    """The mutable state is the queue of commits that are not durable yet, in the order in which they were appended."""

    name = "journal"

    def __init__(
        self,
        driver: Driver,
        *,
        transaction_bytes_max: int = TRANSACTION_BYTES_MAX,
        transaction_changes_max: int = TRANSACTION_CHANGES_MAX,
        waiting_bytes_max: int = WAITING_BYTES_MAX,
        waiting_changes_max: int = WAITING_CHANGES_MAX,
    ):
        self._driver = driver
        #: called with the duration of each durable transaction, in seconds
        self.took: Callable[[float], None] = lambda seconds: None
        self._transaction_bytes_max = transaction_bytes_max
        self._transaction_changes_max = transaction_changes_max
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting_changes_max = waiting_changes_max
        #: appended and not yet taken into a transaction, oldest first
        self._queue: Inbox[_Commit] = Inbox()
        self._writer: asyncio.Task[None] | None = None
        #: set once: why nothing can be committed any more
        self._closed_because: Exception | None = StorageError("The journal is not open.")
        #: sums over the queue and the transaction in flight
        self._waiting_changes = 0
        self._waiting_bytes = 0
        self._commits = self._failed_commits = self._changes = self._bytes = 0
        self._last_commit_ms = 0.0

    def __repr__(self) -> str:
        s = self.statistics()
        state = "closed" if self._closed_because else "open"
        return (
            f"<Journal {state} on {self._driver!r} [Changes: {s.changes} durable, {s.waiting_changes} waiting | "
            f"Commits: {s.commits}, {s.failed_commits} failed, last {s.last_commit_ms:.1f} ms]>"
        )

    def statistics(self) -> JournalStatistics:
        return JournalStatistics(
            commits=self._commits,
            failed_commits=self._failed_commits,
            changes=self._changes,
            bytes=self._bytes,
            waiting_changes=self._waiting_changes,
            waiting_bytes=self._waiting_bytes,
            last_commit_ms=self._last_commit_ms,
        )

    async def open(self) -> list[Record]:
        """Migrate, take the lease, and return every live record; the server's state is a fold over them. Raises
        `LeaseHeld`, `JournalUnusable`."""
        try:
            await self._driver.open()
            records = await self._driver.load()
        except BaseException as error:
            await self._driver.close()
            if isinstance(error, StorageError) and not isinstance(error, JournalUnusable):
                raise JournalUnusable(_one_line(error.message)) from error
            if isinstance(error, msgspec.DecodeError):
                raise JournalUnusable(f"{self._driver!r} holds a record that cannot be read: {error}") from error
            raise
        self._closed_because = None
        self._writer = asyncio.create_task(self._write_for_ever(), name="journal")
        return records

    async def run(self) -> None:
        """Commit until `close`. Raises `LeaseHeld` when the journal can never commit again."""
        assert self._writer is not None, "open the journal first"
        lost = asyncio.create_task(self._driver.lost())
        try:
            done, _ = await asyncio.wait({self._writer, lost}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():
                    task.result()
        finally:
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)

    def append(self, changes: Sequence[Change], *, may_refuse: bool = True) -> asyncio.Future[None]:
        """Queue changes now, as one atomic commit; the future is done when they are durable.

        Raises `Overloaded` when too much waits for the disk. `may_refuse=False` is for the consequences of accepted
        work (results, deletions): the work that was accepted bounds their number, and they must not be lost.
        """
        if self._closed_because is not None:
            raise self._closed_because
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not changes:
            durable.set_result(None)
            return durable
        commit = _Commit(tuple(changes), sum(map(_num_bytes, changes)), durable)
        if may_refuse and self._is_full(commit):
            raise Overloaded(
                "The journal's queue is full: the disk is slower than the requests. Try again in a moment."
            )
        self._queue.post(commit)
        self._waiting_changes += len(commit.changes)
        self._waiting_bytes += commit.num_bytes
        return durable

    async def commit(self, changes: Sequence[Change], *, may_refuse: bool = True) -> None:
        """`append` and wait. Raises `StorageError` when the changes are not durable; the journal itself goes on.

        Cancelling the wait does not take the changes back.
        """
        await self.append(changes, may_refuse=may_refuse)

    async def read_body(self, request_id: str) -> bytes:
        """The body of a request whose commit is durable. Raises `ContentLost` when it is gone or damaged, and
        `StorageError` when it cannot be read now."""
        return await self._driver.read_body(request_id)

    async def read_result(self, request_id: str) -> ResultRecord:
        """A durable result, payload included. Raises `NotFound` when there is none, `StorageError` if damaged."""
        return await self._driver.read_result(request_id)

    async def close(self) -> None:
        """Refuse new commits, make the waiting ones durable, release the lease."""
        if self._closed_because is None:
            self._closed_because = StorageError("The journal is closed.")
        if self._writer is not None:
            self._queue.close()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._driver.close()

    # ---- the one consumer

    async def _write_for_ever(self) -> None:
        while await self._queue.wait():
            batch = self._take()
            try:
                await self._write(batch)
            except LeaseHeld as error:
                self._give_up(error)
                raise

    def _take(self) -> list[_Commit]:
        """The commits of the next transaction: at least one, and all that wait within the limits."""
        batch = [self._queue.popleft()]
        num_changes, num_bytes = len(batch[0].changes), batch[0].num_bytes
        while self._queue:
            num_changes += len(self._queue[0].changes)
            num_bytes += self._queue[0].num_bytes
            if num_changes > self._transaction_changes_max or num_bytes > self._transaction_bytes_max:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _write(self, batch: list[_Commit]) -> None:
        started = time.perf_counter()
        try:
            await self._driver.apply([change for commit in batch for change in commit.changes])
        except (StorageError, LeaseHeld) as error:
            self._failed_commits += 1
            self._finish(batch, error)
            if isinstance(error, LeaseHeld):
                raise
            _log.error("%s", error)
        except Exception as error:
            await self._write_one_by_one(batch, error)
        else:
            self._commits += 1
            self._changes += sum(len(commit.changes) for commit in batch)
            self._bytes += sum(commit.num_bytes for commit in batch)
            seconds = time.perf_counter() - started
            self._last_commit_ms = seconds * 1_000
            self.took(seconds)
            self._finish(batch)

    async def _write_one_by_one(self, batch: list[_Commit], error: Exception) -> None:
        """One of the changes can never be stored: find its commit, so that it fails alone."""
        if len(batch) > 1:
            for commit in batch:
                await self._write([commit])
            return
        self._failed_commits += 1
        _log.error("A commit of %d changes cannot be stored: %r", len(batch[0].changes), error)
        self._finish(batch, StorageError(f"The journal cannot store this: {error}"))

    def _finish(self, batch: list[_Commit], error: Exception | None = None) -> None:
        for commit in batch:
            self._waiting_changes -= len(commit.changes)
            self._waiting_bytes -= commit.num_bytes
            if commit.durable.done():  # its caller was cancelled
                continue
            if error is None:
                commit.durable.set_result(None)
            else:
                commit.durable.set_exception(error)

    def _give_up(self, error: Exception) -> None:
        self._closed_because = error
        batch = list(self._queue)
        self._queue.clear()
        self._finish(batch, error)

    def _is_full(self, commit: _Commit) -> bool:
        return (
            self._waiting_changes + len(commit.changes) > self._waiting_changes_max
            or self._waiting_bytes + commit.num_bytes > self._waiting_bytes_max
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _num_bytes(change: Change) -> int:
    if not isinstance(change, Put):
        return CHANGE_BYTES
    payload = len(change.record.payload) if isinstance(change.record, ResultRecord) else 0
    return CHANGE_BYTES + payload + len(change.body or b"")
