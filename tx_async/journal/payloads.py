"""Large request bodies as files beside an SQLite database, so that megabytes do not travel through its write-ahead log.

A file is written and synced, and its folder synced, before the transaction that names it begins; it is removed after
the transaction that forgets it. A crash in between leaves a file that no row names, which the next start sweeps. Names
are never used twice, so a row can never find another body's bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tx_async.durable import sync_folder
from tx_async.errors import ContentLost, StorageError
from tx_async.journal.transaction import checksum
from tx_async.private import make_folder, opener

BODY_INLINE_BYTES_MAX = 64 * 1024
"""Larger bodies get a file of their own."""
WRITERS = min(4, os.cpu_count() or 1)
"""Threads that write bodies: enough to keep a disk busy, too few to crowd out the event loop."""

_log = logging.getLogger(__name__)


class Payloads:
    """The payload folder of one journal. Every method that touches the disk does so on a thread of its pool."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="payloads")

    async def open(self, live: Collection[str]) -> int:
        """Make the folder and remove every file that `live` does not name. Returns how many were removed."""
        return await self._run(self._sweep, frozenset(live))

    async def write(self, bodies: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
        """Durably store bodies by key. Returns (file name, checksum) for each key; after an error none of the files is
        left."""
        if not bodies:
            return {}
        names = {key: secrets.token_hex(16) for key in bodies}
        written = await asyncio.gather(
            *(self._run(self._write, names[key], body) for key, body in bodies.items()), return_exceptions=True
        )
        try:
            checksums = [_result(outcome) for outcome in written]
            # One sync of the folder makes all the new names durable.
            await self._run(sync_folder, self._folder)
        except OSError as error:
            self.discard(names.values())
            raise StorageError(f"The journal could not write a request body to {self._folder}: {error}") from error
        return {key: (names[key], digest) for key, digest in zip(bodies, checksums, strict=True)}

    async def read(self, request_id: str, name: str) -> bytes:
        try:
            return await self._run((self._folder / name).read_bytes)
        except FileNotFoundError as error:
            raise ContentLost(f"The journal's body of request {request_id} cannot be read: {error}") from error
        except OSError as error:
            raise StorageError(f"The journal's body of request {request_id} cannot be read: {error}") from error

    def discard(self, names: Iterable[str]) -> None:
        """Remove, in the background, files that no row names any more. The next start sweeps those that this leaves."""
        names = list(names)
        if names:
            self._threads.submit(self._remove, names)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def __repr__(self) -> str:
        return f"<Payloads {self._folder}>"

    async def _run(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _write(self, name: str, body: bytes) -> bytes:
        """Write and sync one file; its folder is synced by the caller."""
        with open(self._folder / name, "xb", buffering=0, opener=opener) as file:
            view = memoryview(body)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        return checksum(body)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("The payload %s could not be removed: %s", self._folder / name, error)

    def _sweep(self, live: frozenset[str]) -> int:
        make_folder(self._folder)
        orphans = [entry.name for entry in os.scandir(self._folder) if entry.name not in live]
        self._remove(orphans)
        return len(orphans)


def _result(outcome: bytes | BaseException) -> bytes:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
