"""The SQLite driver: one connection on one thread, write-ahead log, every commit synced.

Every transaction passes a fence: the epoch of the server that makes it, and how many it has made (`lease.py`).

Beside `tx.db` lie `tx.db-wal` (SQLite's log), `tx.db.lock` (the lease) and `tx.db.payloads/` (large bodies).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from tx_async.durable import sync_folder
from tx_async.errors import ContentLost, StorageError
from tx_async.journal import migrate
from tx_async.journal.lease import Fence, FileLock, Files, Holder
from tx_async.journal.payloads import BODY_INLINE_BYTES_MAX, Payloads
from tx_async.journal.transaction import TableChanges, Transaction, checksum, read_result, verify
from tx_async.private import make_folder, opener
from tx_async.wire.records import RECORD_TYPES, Change, Record, ResultRecord, decode_record

T = TypeVar("T")

WAL_BYTES_MAX = 64 * 2**20
"""A log that a large transaction has made longer than this is cut back when it is reused."""
FREE_PAGES_MAX = 4_096
"""More free pages than this are given back to the file system, `FREE_PAGES_MAX` at a time."""
VACUUM_EVERY_COMMITS = 64
LOOK_S = 1.0
"""Seconds between two checks that the file under an idle server is still the one that it opened."""

_PRAGMAS = (
    "PRAGMA auto_vacuum = INCREMENTAL",  # takes effect on a new database only, and only before the log exists
    "PRAGMA synchronous = FULL",
    "PRAGMA fullfsync = ON",  # macOS: fsync alone does not reach the platter
    f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}",
    "PRAGMA temp_store = MEMORY",
)


_log = logging.getLogger(__name__)


class _Connection(aiosqlite.Connection):
    """aiosqlite with one more verb."""

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Call `function` on the connection's thread: a whole transaction costs one hop between threads, not one for
        each statement."""
        return await self._execute(function, self._conn)


class SqliteDriver:
    """Implements `Driver` on an SQLite file."""

    def __init__(self, path: str | Path, *, look_s: float = LOOK_S):
        """look_s: seconds between two checks that the file is still ours."""
        #: absolute, so that the lease, the log and the payloads are found whatever the working directory
        self.path = Path(path).absolute()
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._payloads = Payloads(self.path.with_name(self.path.name + ".payloads"))
        self._connection: _Connection | None = None
        self._commits_until_vacuum = VACUUM_EVERY_COMMITS
        self._look_s = look_s
        #: changed on the connection's thread only
        self._fence = Fence()
        #: the database's file and its log as they were opened
        self._files = Files(self.path)

    def __repr__(self) -> str:
        return f"<SqliteDriver {self.path}>"

    async def open(self) -> None:
        holder = Holder.this_process()
        try:
            make_folder(self.path.parent)
            self._lock.acquire(holder)
            self._connection = connection = _Connection(partial(_connect, self.path), 64)
            await connection
            live_files = await connection.run(partial(_prepare, holder, self._fence))
            self._files.opened()
            await self._payloads.open(live_files)
            sync_folder(self.path.parent)
        except (sqlite3.Error, OSError) as error:
            await self.close()
            raise StorageError(f"The journal {self.path} cannot be opened: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def load(self) -> list[Record]:
        return await self._read(_load)

    async def apply(self, changes: Sequence[Change]) -> None:
        transaction = Transaction(changes)
        files = await self._payloads.write(_large(transaction.bodies))
        try:
            forgotten = await self._connected.run(partial(self._write_fenced, transaction, files))
        except Exception as error:
            if _certainly_undone(error):
                self._payloads.discard(name for name, _ in files.values())
            raise self._blame(error) from error
        self._payloads.discard(forgotten)
        await self._vacuum_sometimes()

    async def read_body(self, request_id: str) -> bytes:
        row = await self._read(partial(_read_body, request_id))
        if row is None:
            raise ContentLost(f"The journal has no body of request {request_id} (any more).")
        num_bytes, expected, body, file = row
        stored = body if file is None else await self._payloads.read(request_id, file)
        return verify(request_id, stored, num_bytes, expected)

    async def read_result(self, request_id: str) -> ResultRecord:
        row = await self._read(partial(_read_result, request_id))
        return await read_result(request_id, row, self.read_body)

    async def lost(self) -> None:
        """The kernel keeps the lock as long as this process lives. But the database's file may be taken away under it,
        or the lock's file, and then we would not see the next server."""
        while True:
            await asyncio.sleep(self._look_s)
            if self._connection is None:
                continue
            try:
                await self._connection.run(self._look)
            except sqlite3.Error as error:  # the next write reports a disk that fails
                _log.debug("The journal %s was not looked at: %s", self.path, error)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        await self._payloads.close()
        self._lock.release()

    # ---- on the connection's thread

    def _write_fenced(
        self, transaction: Transaction, files: dict[str, tuple[str, bytes]], connection: sqlite3.Connection
    ) -> list[str]:
        self._files.check()
        forgotten = _write(transaction, files, partial(_pass_fence, self.path, self._fence), connection)
        self._fence.commits += 1
        return forgotten

    def _look(self, connection: sqlite3.Connection) -> None:
        self._files.check()
        self._fence.check(self.path, *_read_fence(connection))

    # ---- on the event loop

    @property
    def _connected(self) -> _Connection:
        if self._connection is None:
            raise StorageError(f"The journal {self.path} is closed.")
        return self._connection

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await self._connected.run(function)
        except sqlite3.Error as error:
            raise StorageError(f"The journal {self.path} cannot be read: {error}") from error

    async def _vacuum_sometimes(self) -> None:
        self._commits_until_vacuum -= 1
        if self._commits_until_vacuum <= 0:
            self._commits_until_vacuum = VACUUM_EVERY_COMMITS
            await self._connected.run(_give_back_free_pages)

    def _blame(self, error: Exception) -> Exception:
        """Errors of the disk become `StorageError`. Errors that the rows themselves cause stay as they are, for
        `Journal` to sort out."""
        if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.DataError | sqlite3.IntegrityError):
            return StorageError(f"The journal {self.path} could not be written: {error}")
        return error


# ---- on the connection's thread


def _connect(path: Path) -> sqlite3.Connection:
    with contextlib.suppress(FileExistsError):  # SQLite gives its log the mode of the database
        os.close(opener(str(path), os.O_RDWR | os.O_CREAT | os.O_EXCL))
    return sqlite3.connect(path, isolation_level=None, timeout=5.0)


def _prepare(holder: Holder, fence: Fence, connection: sqlite3.Connection) -> list[str]:
    """Apply settings and migrations, and begin a new epoch in the lease's row. Returns the payload files that rows
    name."""
    for pragma in _PRAGMAS:
        connection.execute(pragma)
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StorageError(f"SQLite cannot use its write-ahead log here (journal_mode is {mode}): use a local disk.")
    _migrate(connection)
    rows = connection.execute(
        "INSERT INTO lease (id, instance, host, pid, since, epoch, commits) VALUES (1, ?, ?, ?, ?, 1, 0) "
        "ON CONFLICT (id) DO UPDATE SET instance = excluded.instance, host = excluded.host, pid = excluded.pid, "
        "since = excluded.since, epoch = epoch + 1, commits = 0 RETURNING epoch",
        (holder.instance, holder.host, holder.pid, holder.since),
    ).fetchall()
    fence.epoch, fence.commits = rows[0][0], 0
    return [name for (name,) in connection.execute("SELECT file FROM request_body WHERE file IS NOT NULL")]


def _migrate(connection: sqlite3.Connection) -> None:
    connection.execute(migrate.CREATE_SCHEMA_VERSION)
    current = connection.execute(migrate.READ_SCHEMA_VERSION).fetchone()[0]
    for migration in migrate.pending("sqlite", current):
        version = f"INSERT INTO schema_version VALUES ({migration.number}, '{migration.name}');"
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{migration.sql}\n{version}\nCOMMIT;")
        except sqlite3.Error:
            _roll_back(connection)
            raise


def _load(connection: sqlite3.Connection) -> list[Record]:
    return [
        decode_record(record)
        for table in RECORD_TYPES
        for (record,) in connection.execute(f"SELECT record FROM {table} ORDER BY position")
    ]


def _write(
    transaction: Transaction,
    files: dict[str, tuple[str, bytes]],
    pass_fence: Callable[[sqlite3.Connection], None],
    connection: sqlite3.Connection,
) -> list[str]:
    """One transaction, durable when this returns. Returns the payload files that no row names any more."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        pass_fence(connection)
        for table, changes in transaction.tables.items():
            _write_records(connection, table, changes)
        forgotten = _write_bodies(connection, transaction.bodies, files)
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise
    return forgotten


def _pass_fence(path: Path, fence: Fence, connection: sqlite3.Connection) -> None:
    """Raises `LeaseHeld`, `JournalReplaced`; then the transaction has no effect."""
    statement = "UPDATE lease SET commits = ? WHERE id = 1 AND epoch = ? AND commits IN (?, ?)"
    passed = connection.execute(statement, (fence.commits + 1, fence.epoch, fence.commits, fence.commits + 1))
    if passed.rowcount != 1:
        fence.check(path, *_read_fence(connection))


def _read_fence(connection: sqlite3.Connection) -> tuple[tuple[int, int] | None, Holder | None]:
    row = connection.execute("SELECT epoch, commits, instance, host, pid, since FROM lease WHERE id = 1").fetchone()
    if row is None:
        return None, None
    return row[:2], Holder(instance=row[2], host=row[3], pid=row[4], since=row[5])


def _write_records(connection: sqlite3.Connection, table: str, changes: TableChanges[bytes]) -> None:
    if changes.deletes:
        connection.executemany(f"DELETE FROM {table} WHERE key = ?", ((key,) for key in changes.deletes))
    if changes.puts:
        connection.executemany(
            f"INSERT INTO {table} (key, record) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET record = excluded.record",
            changes.puts.items(),
        )


def _write_bodies(
    connection: sqlite3.Connection, changes: TableChanges[bytes], files: dict[str, tuple[str, bytes]]
) -> list[str]:
    forgotten = []
    for key in changes.deletes | dict.fromkeys(changes.puts):
        row = connection.execute("DELETE FROM request_body WHERE key = ? RETURNING file", (key,)).fetchall()
        forgotten += [file for (file,) in row if file is not None]
    connection.executemany(
        "INSERT INTO request_body (key, num_bytes, checksum, body, file) VALUES (?, ?, ?, ?, ?)",
        (_body_row(key, body, files.get(key)) for key, body in changes.puts.items()),
    )
    return forgotten


def _body_row(key: str, body: bytes, file: tuple[str, bytes] | None) -> tuple[Any, ...]:
    if file is None:
        return key, len(body), checksum(body), body, None
    name, digest = file
    return key, len(body), digest, None, name


def _read_body(request_id: str, connection: sqlite3.Connection) -> tuple[int, bytes, bytes, str | None] | None:
    query = "SELECT num_bytes, checksum, body, file FROM request_body WHERE key = ?"
    return connection.execute(query, (request_id,)).fetchone()


def _read_result(request_id: str, connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT record FROM result WHERE key = ?", (request_id,)).fetchone()
    return row[0] if row else None


def _give_back_free_pages(connection: sqlite3.Connection) -> None:
    """Deleted rows leave free pages, which new rows reuse; only a long surplus is worth the writes that return it."""
    try:
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free > FREE_PAGES_MAX:
            # A script, because this pragma is stepped once a page, which `execute` does not do.
            connection.executescript(f"PRAGMA incremental_vacuum({FREE_PAGES_MAX})")
    except sqlite3.Error:
        # The commit before this is durable; the next commit reports a full disk.
        _roll_back(connection)


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _certainly_undone(error: Exception) -> bool:
    """False when the log could not be synced: after a crash the transaction may still be found, and then it needs its
    files. If it is not found, the next start sweeps them."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF != sqlite3.SQLITE_IOERR


def _large(bodies: TableChanges[bytes]) -> dict[str, bytes]:
    return {key: body for key, body in bodies.puts.items() if len(body) > BODY_INLINE_BYTES_MAX}
