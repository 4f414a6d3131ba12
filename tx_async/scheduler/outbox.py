"""The results of accepted work on their way to the disk: made durable in order, then visible.

One transaction runs at a time, with everything that was decided in the meantime, so that the disk never has a decision
without those before it. When the disk fails, the same transaction is tried again: a full disk delays results and loses
none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from msgspec import Struct

from tx_async.actor import Inbox
from tx_async.errors import StorageError
from tx_async.journal.journal import Journal
from tx_async.scheduler.core.instructions import Append, DeleteFiles, Finish
from tx_async.wire.records import Change, Put

COMMIT_RETRY_S = 0.5
BATCH_BYTES_MAX = 16 * 2**20
BATCH_ITEMS_MAX = 2_000

_log = logging.getLogger(__name__)

Item = Append | Finish | DeleteFiles


class _QueuedItem(Struct, eq=False):
    item: Item
    visible: asyncio.Future[None] | None = None
    """Set for those who wait until it, and everything before it, is visible."""


class Outbox:
    name = "outbox"

    def __init__(self, journal: Journal, show: Callable[[Item], None]):
        """`show` is called when an item, and everything before it, is durable."""
        self.journal = journal
        self.show = show
        #: decided, not visible yet; oldest first
        self._entries: Inbox[_QueuedItem] = Inbox()

    def __len__(self) -> int:
        return len(self._entries)

    def post(self, item: Item) -> None:
        self._entries.post(_QueuedItem(item))

    async def flush(self) -> None:
        """Wait until everything that was posted so far is visible."""
        if self._entries:
            newest = self._entries[-1]
            newest.visible = newest.visible or asyncio.get_running_loop().create_future()
            await asyncio.shield(newest.visible)  # others may wait for the same entry

    async def run(self) -> None:
        while await self._entries.wait():
            batch = self._next_batch()
            changes = [change for entry in batch for change in changes_of(entry.item)]
            await self._commit_surely(changes, batch[0].item.cause)
            for entry in batch:
                self._entries.popleft()
                self.show(entry.item)
                if entry.visible is not None and not entry.visible.done():
                    entry.visible.set_result(None)

    def _next_batch(self) -> list[_QueuedItem]:
        """The oldest entries, up to a size, and at least one."""
        batch: list[_QueuedItem] = []
        num_bytes = 0
        for entry in self._entries:
            num_bytes += len(entry.item.result.payload) if isinstance(entry.item, Finish) else 0
            if batch and (num_bytes > BATCH_BYTES_MAX or len(batch) == BATCH_ITEMS_MAX):
                break
            batch.append(entry)
        return batch

    async def _commit_surely(self, changes: list[Change], cause: str) -> None:
        while True:
            try:
                await self.journal.commit(changes, may_refuse=False)
                return
            except StorageError as error:
                _log.error("Results wait for the journal, the oldest for %s: %s", cause, error)
                await asyncio.sleep(COMMIT_RETRY_S)


def changes_of(item: Item) -> tuple[Change, ...]:
    match item:
        case Append():
            return item.changes
        case Finish():
            return (Put(item.result), *item.changes)
        case DeleteFiles():
            return ()
