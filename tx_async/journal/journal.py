"""The journal actor: group commit over one driver.

Whatever arrives while a transaction is on its way to the disk joins the next one, so a commit carries as many changes as there
are waiters. `commit` returns when its changes are durable; callers answer their clients only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tx_async.wire.records import Change, Record


class Driver(Protocol):
    """One database. `tests/conformance/test_journal.py` lists its behaviours; a driver is ready when all of them pass."""

    async def open(self) -> None:
        """Migrate to the newest schema and take the lease. Raises `LeaseHeld` with the holder's name, host and pid."""
        ...

    async def load(self) -> list[Record]:
        """All live records, without bodies; each table in order of insertion."""
        ...

    async def apply(self, changes: Sequence[Change]) -> None:
        """One transaction, durable when this returns (all of the changes or, after an error, none)."""
        ...

    async def read_body(self, request_id: str) -> bytes:
        """The body put with a `RequestRecord`. Raises `StorageError` when it is gone or damaged."""
        ...

    async def close(self) -> None:
        """Release the lease."""
        ...
