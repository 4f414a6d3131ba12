"""The PostgreSQL driver: one connection that writes and holds the lease, a few that read.

The lease is a session advisory lock of the writing connection itself, so no write can outlive it: a server that was cut
off cannot commit on a session that is gone. After a lost connection (the database restarted, a network cut) the driver
connects again, takes the lock again, and sees in the row `lease` whether another server has written meanwhile; if so it
is out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import asyncpg

from tx_async.errors import ContentLost, LeaseHeld, StorageError
from tx_async.journal import migrate
from tx_async.journal.lease import Holder, held
from tx_async.journal.transaction import Transaction, checksum, read_result, verify
from tx_async.wire.records import RECORD_TYPES, Change, Record, ResultRecord, decode_record

T = TypeVar("T")

RECONNECT_S_MAX = 30.0
"""A lost database is tried for so long before a transaction fails with `StorageError`; the next transaction tries
again.
"""
RECONNECT_PAUSE_S_MIN = 0.05
RECONNECT_PAUSE_S_MAX = 2.0
LEASE_WAIT_S = 2.0
"""How long a start waits for the session of a dead server to end."""
CONNECT_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 60
READERS_MAX = 4
LOCK_CLASS = 0x74785F61
"""First half of the advisory lock's key ("tx_a"); the second is a hash of the schema's name."""

_SETTINGS = {
    "application_name": "tx_async",
    "synchronous_commit": "on",
    # A host that vanished without a word loses its session, and so the lease, after about 25 seconds.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_LOST = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,  # asyncpg's own: the connection is closed
    asyncpg.InternalClientError,  # asyncpg's own: the server ended the session between two queries
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)
"""The database or the way to it is gone for a while: connecting again may help."""
_BROKEN_SESSION = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Nobody knows what state the session is in: it is ended, and with it whatever it was about to do."""
_UNSTORABLE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError, TypeError)
"""The rows themselves cannot be stored (a NUL in a key). asyncpg's client-side DataError is an InterfaceError, too."""

_log = logging.getLogger(__name__)


class PostgresDriver:
    """`Driver` on a database."""

    def __init__(self, url: str, *, reconnect_s_max: float = RECONNECT_S_MAX, lease_wait_s: float = LEASE_WAIT_S):
        self._url = url
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
        return f"<PostgresDriver {_without_password(self._url)}, {'connected' if self._writer else 'not connected'}>"

    async def open(self) -> None:
        self._lease_lost = asyncio.get_running_loop().create_future()
        try:
            self._writer = await self._connect()
            await self._take_lease(self._writer)
            await self._migrate(self._writer)
            await self._write_lease(self._writer)
            await _warn_if_not_durable(self._writer)
            self._watch(self._writer)
            self._readers = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=READERS_MAX,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
            )
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
            await self.close()
            raise StorageError(f"The journal {_without_password(self._url)} cannot be opened: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def load(self) -> list[Record]:
        async def load() -> list[Record]:
            rows = []
            for table in RECORD_TYPES:
                rows += await self._pool.fetch(f"SELECT record FROM {table} ORDER BY position")
            return [decode_record(row["record"]) for row in rows]

        return await self._persist(load, "read")

    async def apply(self, changes: Sequence[Change]) -> None:
        transaction = Transaction(changes)

        async def write() -> None:
            async with self._writing:
                writer = await self._connected()
                try:
                    async with writer.transaction():
                        await _write(writer, transaction)
                except _BROKEN_SESSION:
                    writer.terminate()
                    raise

        # A commit whose answer was lost is written again: upserts and deletions by key end in the same state.
        await self._persist(write, "written")

    async def read_body(self, request_id: str) -> bytes:
        query = "SELECT num_bytes, checksum, body FROM request_body WHERE key = $1"
        row = await self._persist(lambda: self._pool.fetchrow(query, request_id), "read")
        if row is None:
            raise ContentLost(f"The journal has no body of request {request_id} (any more).")
        return verify(request_id, row["body"], row["num_bytes"], row["checksum"])

    async def read_result(self, request_id: str) -> ResultRecord:
        query = "SELECT record FROM result WHERE key = $1"
        row = await self._persist(lambda: self._pool.fetchval(query, request_id), "read")
        return await read_result(request_id, row, self.read_body)

    async def lost(self) -> None:
        assert self._lease_lost is not None, "open the driver first"
        await asyncio.shield(self._lease_lost)

    async def close(self) -> None:
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        for connection in (self._readers, self._writer):
            if connection is not None:
                await _close(connection)
        self._readers = self._writer = None
        if self._lease_lost is not None:
            self._lease_lost.cancel()

    @property
    def _pool(self) -> asyncpg.Pool:
        if self._readers is None or self._closed:
            raise StorageError(f"The journal {_without_password(self._url)} is closed.")
        return self._readers

    # ---- connecting

    async def _persist(self, attempt: Callable[[], Awaitable[T]], verb: str) -> T:
        """Try until it succeeds, fails for a reason that trying again does not change, or `reconnect_s_max` has
        passed.
        """
        give_up_at = time.monotonic() + self._reconnect_s_max
        pause_s = RECONNECT_PAUSE_S_MIN
        while True:
            try:
                return await attempt()
            except _UNSTORABLE:
                raise
            except _LOST as error:
                if self._closed or time.monotonic() + pause_s > give_up_at:
                    raise self._storage_error(verb, error) from error
                _log.warning("PostgreSQL is out of reach (%s); trying again in %.2f s", _name(error), pause_s)
            except asyncpg.PostgresError as error:
                raise self._storage_error(verb, error) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_PAUSE_S_MAX)

    async def _connected(self) -> asyncpg.Connection:
        """The writing session, lease included; a lost one is replaced. Only while holding `_writing`."""
        assert self._lease_lost is not None, "open the driver first"
        if self._lease_lost.done() and not self._lease_lost.cancelled():
            raise self._lease_lost.exception() or AssertionError("only an exception ends the lease")
        if self._closed:
            raise StorageError(f"The journal {_without_password(self._url)} is closed.")
        if self._writer is None or self._writer.is_closed():
            self._writer = None
            self._writer = await self._connect_again()
            _log.warning("Connected to PostgreSQL again: %r", self)
        return self._writer

    async def _connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(
            self._url, timeout=CONNECT_TIMEOUT_S, command_timeout=COMMAND_TIMEOUT_S, server_settings=_SETTINGS
        )

    async def _connect_again(self) -> asyncpg.Connection:
        writer = await self._connect()
        try:
            await self._take_lease(writer)
            await self._check_instance(writer)
        except LeaseHeld as error:
            await _close(writer)
            assert self._lease_lost is not None
            self._lease_lost.set_exception(error)
            self._lease_lost.exception()  # whoever waits in `lost` gets it; if nobody does, that is no leak to warn of
            raise
        except BaseException:
            await _close(writer)
            raise
        self._watch(writer)
        return writer

    def _watch(self, writer: asyncpg.Connection) -> None:
        """Connect again as soon as the session is lost, not only at the next write: others might take the lease."""
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

    async def _take_lease(self, writer: asyncpg.Connection) -> None:
        """Raises `LeaseHeld` when another session keeps the lock for `lease_wait_s`."""
        give_up_at = time.monotonic() + self._lease_wait_s
        while not await writer.fetchval("SELECT pg_try_advisory_lock($1, hashtext(current_schema()))", LOCK_CLASS):
            if time.monotonic() > give_up_at:
                raise held(_without_password(self._url), await _read_holder(writer))
            await self._end_own_old_session(writer)
            await asyncio.sleep(RECONNECT_PAUSE_S_MIN)

    async def _end_own_old_session(self, writer: asyncpg.Connection) -> None:
        """After a cut connection the database may not know yet that our old session is dead, and it still has the
        lock.
        """
        if self._writer_pid == 0:
            return
        holder = await _read_holder(writer)
        if holder is not None and holder.instance == self._holder.instance:
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = $1 "
                "AND classid = $2::bigint::oid AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            await writer.execute(query, self._writer_pid, LOCK_CLASS)

    async def _write_lease(self, writer: asyncpg.Connection) -> None:
        await writer.execute(
            "INSERT INTO lease (id, instance, host, pid, since) VALUES (1, $1, $2, $3, $4) ON CONFLICT (id) DO UPDATE "
            "SET instance = excluded.instance, host = excluded.host, pid = excluded.pid, since = excluded.since",
            self._holder.instance,
            self._holder.host,
            self._holder.pid,
            self._holder.since,
        )

    async def _check_instance(self, writer: asyncpg.Connection) -> None:
        """Raises `LeaseHeld` when another server has served this journal since: our state in memory is out of date."""
        holder = await _read_holder(writer)
        if holder is None or holder.instance != self._holder.instance:
            raise held(_without_password(self._url), holder)

    async def _migrate(self, writer: asyncpg.Connection) -> None:
        await writer.execute(migrate.CREATE_SCHEMA_VERSION)
        current = await writer.fetchval(migrate.READ_SCHEMA_VERSION)
        for migration in migrate.pending("postgres", current or 0):
            async with writer.transaction():
                await writer.execute(migration.sql)
                await writer.execute("INSERT INTO schema_version VALUES ($1, $2)", migration.number, migration.name)

    def _storage_error(self, verb: str, error: Exception) -> StorageError:
        return StorageError(f"The journal {_without_password(self._url)} could not be {verb}: {_name(error)}")


async def _write(writer: asyncpg.Connection, transaction: Transaction) -> None:
    for table, changes in transaction.tables.items():
        if changes.deletes:
            await writer.execute(f"DELETE FROM {table} WHERE key = ANY($1::text[])", list(changes.deletes))
        if changes.puts:
            await writer.execute(
                f"INSERT INTO {table} (key, record) "
                "SELECT key, record FROM unnest($1::text[], $2::bytea[]) WITH ORDINALITY AS row (key, record, number) "
                "ORDER BY number ON CONFLICT (key) DO UPDATE SET record = excluded.record",
                list(changes.puts),
                list(changes.puts.values()),
            )
    if transaction.bodies.deletes:
        await writer.execute("DELETE FROM request_body WHERE key = ANY($1::text[])", list(transaction.bodies.deletes))
    if transaction.bodies.puts:
        await _write_bodies(writer, transaction.bodies.puts)


async def _write_bodies(writer: asyncpg.Connection, bodies: dict[str, bytes]) -> None:
    checksums = await asyncio.to_thread(lambda: [checksum(body) for body in bodies.values()])
    # One by one: the event loop gets a turn after each body, which `executemany` would copy into one message.
    for (key, body), digest in zip(bodies.items(), checksums, strict=True):
        await writer.execute(
            "INSERT INTO request_body (key, num_bytes, checksum, body) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (key) DO UPDATE "
            "SET num_bytes = excluded.num_bytes, checksum = excluded.checksum, body = excluded.body",
            key,
            len(body),
            digest,
            body,
        )


async def _read_holder(connection: asyncpg.Connection) -> Holder | None:
    try:
        row = await connection.fetchrow("SELECT instance, host, pid, since FROM lease")
    except asyncpg.UndefinedTableError:
        return None
    return Holder(**row) if row is not None else None


async def _warn_if_not_durable(writer: asyncpg.Connection) -> None:
    if await writer.fetchval("SHOW fsync") != "on":
        _log.warning("PostgreSQL runs with fsync = off: accepted requests can be lost when its host crashes.")


async def _close(connection: asyncpg.Connection | asyncpg.Pool) -> None:
    """Politely for a moment, then not: the other side may be gone."""
    try:
        await asyncio.wait_for(connection.close(), 1.0)
    except (asyncpg.PostgresError, *_LOST):
        connection.terminate()


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _without_password(url: str) -> str:
    """For messages. The query goes, too: it may hold a password as well."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    credentials, at, place = rest.rpartition("@")
    return f"{scheme}://{credentials.partition(':')[0]}{at}{place}"
