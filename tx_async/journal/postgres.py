"""The PostgreSQL driver: one connection that writes and holds the lease, a few that read.

The lease is a session advisory lock of the writing connection itself, so no write can outlive it: a server that was cut
off cannot commit on a session that is gone. After a lost connection (the database restarted, a network cut) the driver
connects again, takes the lock again, and sees in the row `lease` whether another server has written meanwhile; if so,
it has lost the lease. Behind a pooler that gives a session to each transaction no such lock holds: there the row is the
lease, renewed every `RENEW_S`, and `open` says so. Whatever the lock says, every transaction passes the fence
(`lease.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg

from tx_async.errors import ContentLost, LeaseHeld, StorageError
from tx_async.journal import migrate
from tx_async.journal.lease import Fence, Holder, held
from tx_async.journal.postgres_statements import (
    BROKEN_SESSION,
    IS_LOCKED,
    LOCK_CLASS,
    LOST,
    NOW,
    SETTINGS,
    close_connection,
    holder_of,
    name_of,
    read_holder,
    read_lease,
    shares_sessions,
    warn_if_not_durable,
    without_password,
    write_transaction,
)
from tx_async.journal.transaction import Transaction, read_result, verify
from tx_async.wire.records import RECORD_TYPES, Change, Record, ResultRecord, decode_record

T = TypeVar("T")

RECONNECT_S_MAX = 30.0
"""How long a transaction tries to reach a lost database before it fails with `StorageError`; the next one tries again.
"""
RECONNECT_PAUSE_S_MIN = 0.05
RECONNECT_PAUSE_S_MAX = 2.0
LEASE_WAIT_S = 2.0
"""How long a start waits for the session of a dead server to end."""
CONNECT_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 60
READERS_MAX = 4
RENEW_S = 2.0
"""Seconds between two looks at the row `lease`, and behind a pooler between two renewals."""
LEASE_ROW_S = 10.0
"""A lease that only the row holds is free once it has not been renewed for this long."""


_UNSTORABLE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError, TypeError)
"""The rows themselves cannot be stored (a NUL in a key). asyncpg's client-side DataError is an InterfaceError, too."""

_log = logging.getLogger(__name__)


class PostgresDriver:
    """Implements `Driver` on a PostgreSQL database."""

    def __init__(
        self,
        url: str,
        *,
        prepared_statements: bool = True,
        reconnect_s_max: float = RECONNECT_S_MAX,
        lease_wait_s: float = LEASE_WAIT_S,
        renew_s: float = RENEW_S,
    ):
        """prepared_statements: False for a pooler that loses them. Where sessions do not hold they are off anyway."""
        self._url = url
        self._prepared_statements = prepared_statements
        self._renew_s = renew_s
        #: True behind a pooler, where nothing of a session outlasts its transaction
        self._is_pooled = False
        #: False when a pooler refuses them: then every transaction sets them itself
        self._takes_settings = True
        self._fence = Fence()
        self._lease_wait_s = lease_wait_s
        self._reconnect_s_max = reconnect_s_max
        self._holder = Holder.this_process()
        #: the session that holds the advisory lock; None while it is lost
        self._writer: asyncpg.Connection | None = None
        self._writer_pid = 0
        self._readers: asyncpg.Pool | None = None
        #: serialises `apply` and the reconnection in the background
        self._writing = asyncio.Lock()
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False
        #: why this server may never write again
        self._lease_lost: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<PostgresDriver {without_password(self._url)}, {'connected' if self._writer else 'not connected'}>"

    async def open(self) -> None:
        self._lease_lost = asyncio.get_running_loop().create_future()
        try:
            await self._look_for_a_pooler()
            self._writer = await self._connect()
            await self._take_lease(self._writer)
            await self._migrate(self._writer)
            async with self._writer.transaction():
                await self._write_lease(self._writer)
            await warn_if_not_durable(self._writer)
            self._watch(self._writer)
            self._readers = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=READERS_MAX,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
                **self._statement_cache(),
            )
        except (asyncpg.PostgresError, *LOST, ValueError) as error:
            await self.close()
            raise StorageError(
                f"The journal {without_password(self._url)} cannot be opened: {name_of(error)}"
            ) from error
        except BaseException:
            await self.close()
            raise

    async def load(self) -> list[Record]:
        async def load() -> list[Record]:
            rows = []
            async with self._reader() as reader:
                for table in RECORD_TYPES:
                    rows += await reader.fetch(f"SELECT record FROM {table} ORDER BY position")
            return [decode_record(row["record"]) for row in rows]

        return await self._persist(load, "read")

    async def apply(self, changes: Sequence[Change]) -> None:
        transaction = Transaction(changes)

        async def write() -> None:
            async with self._writing:
                writer = await self._connected()
                try:
                    async with writer.transaction():
                        await self._pass_fence(writer)
                        await write_transaction(writer, transaction)
                except (*BROKEN_SESSION, asyncpg.ReadOnlySQLTransactionError):
                    writer.terminate()  # the latter: it has become a standby
                    raise
                except LeaseHeld as error:
                    self._lose_lease(error)
                    raise
                self._fence.commits += 1

        # A commit whose answer was lost is written again: upserts and deletions by key end in the same state.
        await self._persist(write, "written")

    async def read_body(self, request_id: str) -> bytes:
        query = "SELECT num_bytes, checksum, body FROM request_body WHERE key = $1"
        row = await self._persist(lambda: self._fetchrow(query, request_id), "read")
        if row is None:
            raise ContentLost(f"The journal has no body of request {request_id} (any more).")
        return verify(request_id, row["body"], row["num_bytes"], row["checksum"])

    async def read_result(self, request_id: str) -> ResultRecord:
        query = "SELECT record FROM result WHERE key = $1"
        row = await self._persist(lambda: self._fetchrow(query, request_id), "read")
        return await read_result(request_id, row["record"] if row else None, self.read_body)

    async def lost(self) -> None:
        assert self._lease_lost is not None, "open the driver first"
        while not self._lease_lost.done():
            await asyncio.wait([self._lease_lost], timeout=self._renew_s)
            if not self._lease_lost.done():
                await self._renew()
        await asyncio.shield(self._lease_lost)

    async def close(self) -> None:
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        if self._is_pooled and self._writer is not None and not self._writer.is_closed():
            await self._give_back_lease(self._writer)
        for connection in (self._readers, self._writer):
            if connection is not None:
                await close_connection(connection)
        self._readers = self._writer = None
        if self._lease_lost is not None:
            self._lease_lost.cancel()

    @property
    def _pool(self) -> asyncpg.Pool:
        if self._readers is None or self._closed:
            raise StorageError(f"The journal {without_password(self._url)} is closed.")
        return self._readers

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        """A reading connection, in a transaction where statements could otherwise run on two sessions."""
        async with self._pool.acquire() as reader:
            if self._prepared_statements:
                yield reader
            else:
                async with reader.transaction(readonly=True):
                    yield reader

    async def _fetchrow(self, query: str, *arguments: object) -> Any:
        async with self._reader() as reader:
            return await reader.fetchrow(query, *arguments)

    # ---- connecting

    async def _look_for_a_pooler(self) -> None:
        """Find out whether a connection keeps its session; say so where it does not."""
        first, second = await self._connect(prepared=False), await self._connect(prepared=False)
        try:
            self._is_pooled = await shares_sessions(first, second)
        finally:
            await close_connection(first)
            await close_connection(second)
        if self._is_pooled:
            self._prepared_statements = False
            _log.warning(
                "A pooler stands between this server and PostgreSQL, so no lock of a session holds: the lease is a row "
                "that is renewed every %g s, every commit checks it, and prepared statements are off.",
                self._renew_s,
            )

    async def _persist(self, attempt: Callable[[], Awaitable[T]], verb: str) -> T:
        """Repeat `attempt` until it succeeds, fails for a reason that a retry does not change, or `reconnect_s_max` has
        passed."""
        give_up_at = time.monotonic() + self._reconnect_s_max
        pause_s = RECONNECT_PAUSE_S_MIN
        while True:
            try:
                return await attempt()
            except _UNSTORABLE:
                raise
            except LOST as error:
                if self._closed or time.monotonic() + pause_s > give_up_at:
                    raise self._storage_error(verb, error) from error
                _log.warning("PostgreSQL is out of reach (%s); trying again in %.2f s", name_of(error), pause_s)
            except asyncpg.PostgresError as error:
                raise self._storage_error(verb, error) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_PAUSE_S_MAX)

    async def _connected(self) -> asyncpg.Connection:
        """The writing session, which holds the lease; a lost one is replaced. Call it only while holding `_writing`."""
        assert self._lease_lost is not None, "open the driver first"
        if self._lease_lost.done() and not self._lease_lost.cancelled():
            raise self._lease_lost.exception() or AssertionError("only an exception ends the lease")
        if self._closed:
            raise StorageError(f"The journal {without_password(self._url)} is closed.")
        if self._writer is None or self._writer.is_closed():
            self._writer = None
            self._writer = await self._connect_again()
            _log.info("Connected to PostgreSQL again: %r", self)
        return self._writer

    async def _connect(self, prepared: bool | None = None) -> asyncpg.Connection:
        settings = SETTINGS if self._takes_settings else {}
        try:
            return await asyncpg.connect(
                self._url,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
                server_settings=settings,
                **self._statement_cache(prepared),
            )
        except asyncpg.ProtocolViolationError as error:
            if not self._takes_settings or "startup parameter" not in str(error):
                raise
        self._takes_settings = False
        return await self._connect(prepared)

    def _statement_cache(self, prepared: bool | None = None) -> dict[str, Any]:
        keeps = self._prepared_statements if prepared is None else prepared
        return {} if keeps else {"statement_cache_size": 0}

    async def _connect_again(self) -> asyncpg.Connection:
        writer = await self._connect()
        try:
            await self._take_lease(writer)
            await self._check_fence(writer)
        except LeaseHeld as error:
            await close_connection(writer)
            self._lose_lease(error)
            raise
        except BaseException:
            await close_connection(writer)
            raise
        self._watch(writer)
        return writer

    def _watch(self, writer: asyncpg.Connection) -> None:
        """Connect again as soon as the session is lost, not only at the next write, before others take the lease."""
        self._writer_pid = writer.get_server_pid()
        writer.add_termination_listener(lambda _: self._reconnect_in_background())

    def _reconnect_in_background(self) -> None:
        if not self._closed and (self._reconnecting is None or self._reconnecting.done()):
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect(), name="postgres reconnect")

    async def _reconnect(self) -> None:
        async def connect() -> None:
            async with self._writing:
                await self._connected()

        try:
            await self._persist(connect, "reached")
        except (StorageError, LeaseHeld) as error:
            _log.error("%s", error)

    # ---- the lease

    def _lose_lease(self, error: LeaseHeld) -> None:
        assert self._lease_lost is not None
        if not self._lease_lost.done():
            self._lease_lost.set_exception(error)
            self._lease_lost.exception()  # whoever waits in `lost` gets it; asyncio must not warn where nobody does

    async def _take_lease(self, writer: asyncpg.Connection) -> None:
        """Raises `LeaseHeld` when another session keeps the lock for `lease_wait_s`, or another server renews the
        row."""
        if not self._is_pooled:
            await self._take_lock(writer)
        await self._wait_for_row(writer)

    async def _wait_for_row(self, writer: asyncpg.Connection) -> None:
        """Wait until a lease that only the row holds has not been renewed for `LEASE_ROW_S`."""
        first: float | None = None
        while True:
            async with writer.transaction():
                row = await read_lease(writer)
                if row is None or row["instance"] == self._holder.instance:
                    return
                is_locked = self._is_pooled and await writer.fetchval(IS_LOCKED, LOCK_CLASS)
            if row["age"] > LEASE_ROW_S and not is_locked:
                return
            if is_locked or row["renewed_at"] != (first := row["renewed_at"] if first is None else first):
                raise held(without_password(self._url), holder_of(row))
            await asyncio.sleep(self._renew_s / 4)

    async def _take_lock(self, writer: asyncpg.Connection) -> None:
        give_up_at = time.monotonic() + self._lease_wait_s
        while not await writer.fetchval("SELECT pg_try_advisory_lock($1, hashtext(current_schema()))", LOCK_CLASS):
            if time.monotonic() > give_up_at:
                raise held(without_password(self._url), await read_holder(writer))
            await self._end_own_old_session(writer)
            await asyncio.sleep(RECONNECT_PAUSE_S_MIN)

    async def _end_own_old_session(self, writer: asyncpg.Connection) -> None:
        """After a cut connection the database may not know yet that our old session is dead, and that session still
        holds the lock."""
        if self._writer_pid == 0:
            return
        holder = await read_holder(writer)
        if holder is not None and holder.instance == self._holder.instance:
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = $1 "
                "AND classid = $2::bigint::oid AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            await writer.execute(query, self._writer_pid, LOCK_CLASS)

    async def _write_lease(self, writer: asyncpg.Connection) -> None:
        await writer.execute(
            "INSERT INTO lease (id, instance, host, pid, since, epoch, commits, renewed_at) "
            f"VALUES (1, $1, $2, $3, $4, 1, 0, {NOW} * $5::int) ON CONFLICT (id) DO UPDATE "
            "SET instance = excluded.instance, host = excluded.host, pid = excluded.pid, since = excluded.since, "
            "epoch = lease.epoch + 1, commits = 0, renewed_at = excluded.renewed_at",
            self._holder.instance,
            self._holder.host,
            self._holder.pid,
            self._holder.since,
            int(self._is_pooled),
        )
        row = await read_lease(writer)
        self._fence.epoch, self._fence.commits = row["epoch"], 0

    async def _pass_fence(self, writer: asyncpg.Connection) -> None:
        """The first statement of every transaction. Raises `LeaseHeld`, `JournalReplaced`; then the transaction has no
        effect."""
        if not self._takes_settings:
            await writer.execute("SET LOCAL synchronous_commit = on")
        done = await writer.execute(
            f"UPDATE lease SET commits = $2::bigint + 1, renewed_at = {NOW} * $3::int "
            "WHERE id = 1 AND epoch = $1 AND commits IN ($2::bigint, $2::bigint + 1)",
            self._fence.epoch,
            self._fence.commits,
            int(self._is_pooled),
        )
        if done != "UPDATE 1":
            await self._check_fence(writer)

    async def _check_fence(self, writer: asyncpg.Connection) -> None:
        """Raises `LeaseHeld` when another server has served this journal since, `JournalReplaced` when this is an older
        state of it, as on a standby that was behind: what we have in memory is out of date."""
        async with writer.transaction():
            row = await read_lease(writer)
        found, holder = ((row["epoch"], row["commits"]), holder_of(row)) if row else (None, None)
        self._fence.check(without_password(self._url), found, holder)

    async def _renew(self) -> None:
        """Check that the lease is still ours; behind a pooler this also renews it. A database that does not answer is
        reported by the next write."""
        try:
            async with self._writing:
                writer = await self._connected()
                if self._is_pooled:
                    async with writer.transaction():
                        await writer.execute(
                            f"UPDATE lease SET renewed_at = {NOW} WHERE id = 1 AND epoch = $1", self._fence.epoch
                        )
                await self._check_fence(writer)
        except LeaseHeld as error:
            self._lose_lease(error)
        except (asyncpg.PostgresError, *LOST, StorageError) as error:
            _log.debug("The lease was not looked at: %s", name_of(error))

    async def _give_back_lease(self, writer: asyncpg.Connection) -> None:
        with contextlib.suppress(asyncpg.PostgresError, *LOST):
            async with writer.transaction():
                await writer.execute("UPDATE lease SET renewed_at = 0 WHERE id = 1 AND epoch = $1", self._fence.epoch)

    async def _migrate(self, writer: asyncpg.Connection) -> None:
        async with writer.transaction():
            await writer.execute(migrate.CREATE_SCHEMA_VERSION)
            current = await writer.fetchval(migrate.READ_SCHEMA_VERSION)
        for migration in migrate.pending("postgres", current or 0):
            async with writer.transaction():
                await writer.execute(migration.sql)
                await writer.execute("INSERT INTO schema_version VALUES ($1, $2)", migration.number, migration.name)

    def _storage_error(self, verb: str, error: Exception) -> StorageError:
        return StorageError(f"The journal {without_password(self._url)} could not be {verb}: {name_of(error)}")
