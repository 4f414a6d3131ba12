"""What follows from accepted work, on its way to the disk: made durable in order, then visible.

An item is given to the journal when it is decided, so the journal's order is the order of decisions. Items become
visible in that order, too. When the disk fails, everything that is not visible yet is written again, oldest first: a
full disk delays results and loses none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from msgspec import Struct

from tx_async.errors import StorageError
from tx_async.journal.journal import Journal
from tx_async.scheduler.events import Append, DeleteFiles, Finish
from tx_async.wire.records import Change, Put

COMMIT_RETRY_S = 0.5

_log = logging.getLogger(__name__)

Item = Append | Finish | DeleteFiles


class _Entry(Struct):
    item: Item
    durable: asyncio.Future[None]
    visible: asyncio.Future[None] | None


class Outbox:
    def __init__(self, journal: Journal, show: Callable[[Item], None]):
        """`show` is called when an item, and everything before it, is durable."""
        self.journal = journal
        self.show = show
        #: decided, not visible yet; oldest first
        self._entries: deque[_Entry] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._entries)

    def post(self, item: Item) -> None:
        self._add(item, None)

    async def commit(self, changes: Sequence[Change]) -> None:
        """Post changes, and wait until they and everything before them are durable."""
        visible = asyncio.get_running_loop().create_future()
        self._add(Append(tuple(changes)), visible)
        await visible

    def _add(self, item: Item, visible: asyncio.Future[None] | None) -> None:
        self._entries.append(_Entry(item, self._write(item), visible))
        self._arrived.set()

    def _write(self, item: Item) -> asyncio.Future[None]:
        durable = self.journal.append(changes_of(item), may_refuse=False)
        durable.add_done_callback(_look_at)
        return durable

    async def run(self) -> None:
        while True:
            while not self._entries:
                self._arrived.clear()
                await self._arrived.wait()
            entry = self._entries[0]
            try:
                await entry.durable
            except StorageError as error:
                _log.error("Results wait for the journal: %s", error)
                await asyncio.sleep(COMMIT_RETRY_S)
                self._write_again()
                continue
            self._entries.popleft()
            self.show(entry.item)
            if entry.visible is not None and not entry.visible.done():
                entry.visible.set_result(None)

    def _write_again(self) -> None:
        """All of them: a later one may have got through, and must stay the later one."""
        for entry in self._entries:
            entry.durable = self._write(entry.item)


def changes_of(item: Item) -> tuple[Change, ...]:
    match item:
        case Append():
            return item.changes
        case Finish():
            return (Put(item.result), *item.changes)
        case DeleteFiles():
            return ()


def _look_at(future: asyncio.Future[None]) -> None:
    """Failures are dealt with when the entry's turn has come."""
    if not future.cancelled():
        future.exception()
