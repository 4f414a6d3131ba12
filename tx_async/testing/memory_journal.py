"""A journal driver in memory, with faults on demand, for simulations.

`MemoryDisk` is what survives a crash; a `MemoryJournal` is one server's connection to it::

    disk = MemoryDisk()
    driver = MemoryJournal(disk)
    journal = Journal(driver)
    ...
    driver.faults.append(Fault(crash="after"))   # the next transaction is durable, but nobody hears of it
    ...
    journal = Journal(MemoryJournal(disk))       # the server that starts next
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tx_async.errors import ContentLost, StorageError
from tx_async.journal.lease import Holder, held
from tx_async.journal.transaction import Transaction, checksum, read_result, verify
from tx_async.wire.records import RECORD_TYPES, Change, Record, ResultRecord, decode_record


class Fault(Struct, frozen=True, kw_only=True):
    """What happens to one `apply`."""

    error: str = ""
    """Raise `StorageError` with this text; nothing is written."""
    delay_s: float = 0.0
    """Time that the disk takes before anything else happens."""
    crash: Literal["", "before", "after"] = ""
    """The server dies before, or after, the transaction is durable."""


class SimulatedCrash(StorageError):
    """The simulated server has died. Open another journal on the same disk."""


class MemoryDisk:
    """What is durable: encoded records by table and key in order of insertion, bodies with their checksums, the
    lease.
    """

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, bytes]] = {name: {} for name in RECORD_TYPES}
        self.bodies: dict[str, tuple[int, bytes, bytes]] = {}
        self.holder: Holder | None = None
        self.num_transactions = 0

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(rows)} {name}" for name, rows in self.tables.items() if rows)
        return f"<MemoryDisk [{rows or 'empty'} | {len(self.bodies)} bodies | {self.num_transactions} transactions]>"

    def write(self, transaction: Transaction) -> None:
        """All of it or nothing: like a database, the disk takes only keys that are text."""
        for changes in (*transaction.tables.values(), transaction.bodies):
            for key in (*changes.deletes, *changes.puts):
                key.encode()
        for name, changes in transaction.tables.items():
            rows = self.tables[name]
            for key in changes.deletes:
                rows.pop(key, None)
            rows.update(changes.puts)
        for key in transaction.bodies.deletes:
            self.bodies.pop(key, None)
        for key, body in transaction.bodies.puts.items():
            self.bodies[key] = (len(body), checksum(body), body)
        self.num_transactions += 1


class MemoryJournal:
    """`Driver` on a `MemoryDisk`."""

    def __init__(self, disk: MemoryDisk | None = None):
        self.disk = disk or MemoryDisk()
        #: what happens to the next calls of `apply`, one each
        self.faults: deque[Fault] = deque()
        self._holder = Holder.this_process()
        self._crashed = False
        self._lost = asyncio.Event()

    def __repr__(self) -> str:
        return f"<MemoryJournal on {self.disk!r}>"

    async def open(self) -> None:
        if self.disk.holder is not None:
            raise held(self.disk, self.disk.holder)
        self.disk.holder = self._holder

    async def load(self) -> list[Record]:
        self._check()
        return [decode_record(data) for rows in self.disk.tables.values() for data in rows.values()]

    async def apply(self, changes: Sequence[Change]) -> None:
        self._check()
        transaction = Transaction(changes)
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
            self._check()
        if fault.error:
            raise StorageError(fault.error)
        if fault.crash == "before":
            self._die()
        self.disk.write(transaction)
        if fault.crash == "after":
            self._die()

    async def read_body(self, request_id: str) -> bytes:
        self._check()
        if request_id not in self.disk.bodies:
            raise ContentLost(f"The journal has no body of request {request_id} (any more).")
        num_bytes, expected, body = self.disk.bodies[request_id]
        return verify(request_id, body, num_bytes, expected)

    async def read_result(self, request_id: str) -> ResultRecord:
        self._check()
        return await read_result(request_id, self.disk.tables["result"].get(request_id), self.read_body)

    async def lost(self) -> None:
        await self._lost.wait()
        raise held(self.disk, self.disk.holder)

    async def close(self) -> None:
        if self.disk.holder is self._holder:
            self.disk.holder = None

    def crash(self) -> None:
        """The server dies now: nothing more gets through, and the lease is free."""
        self._crashed = True
        if self.disk.holder is self._holder:
            self.disk.holder = None

    def steal(self, other: Holder) -> None:
        """Another server takes the lease, as after a long network partition."""
        self.disk.holder = other
        self._lost.set()

    def _die(self) -> None:
        self.crash()
        raise SimulatedCrash()

    def _check(self) -> None:
        if self._crashed:
            raise SimulatedCrash()
        if self.disk.holder is None:
            raise StorageError("The journal is closed.")
        if self.disk.holder is not self._holder:
            raise held(self.disk, self.disk.holder)
