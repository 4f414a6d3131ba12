"""The PostgreSQL driver's statements: for records and bodies, for the row `lease`, and to find out whether a pooler
stands in between."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg

from tx_async.journal.lease import Holder
from tx_async.journal.transaction import Transaction, checksum

PROBE_S = 2.0
"""How long the probe for a pooler waits: one with a single session keeps a second transaction waiting."""
LOCK_CLASS = 0x74785F61
"""First half of the advisory lock's key ("tx_a"); the second is a hash of the schema's name."""

SETTINGS = {
    "application_name": "tx_async",
    "synchronous_commit": "on",
    # A host that vanished without a word loses its session, and so the lease, after about 25 seconds.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
LOST = (
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
BROKEN_SESSION = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The state of the session is unknown: it is ended, and with it whatever it was about to do."""


_log = logging.getLogger(__name__)


async def write_transaction(writer: asyncpg.Connection, transaction: Transaction) -> None:
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


NOW = "extract(epoch FROM clock_timestamp())"
IS_LOCKED = (
    "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::bigint::oid AND "
    "objid::bigint = hashtext(current_schema())::bigint & 4294967295 AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database()))"
)


async def read_lease(connection: asyncpg.Connection) -> Any:
    """The row, with the seconds since it was renewed; None where there is no such row, or no schema yet."""
    table = await connection.fetchval("SELECT to_regclass('lease')::text")
    if table is None:
        return None
    columns = await connection.fetchval(
        "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('lease') AND attname = 'epoch'"
    )
    if not columns:  # the table is that of an earlier release
        return await connection.fetchrow(
            "SELECT *, 0 AS epoch, 0 AS commits, 0 AS renewed_at, 'infinity'::float8 AS age FROM lease"
        )
    return await connection.fetchrow(f"SELECT *, ({NOW} - renewed_at)::float8 AS age FROM lease")


def holder_of(row: Any) -> Holder:
    return Holder(**{name: row[name] for name in ("instance", "host", "pid", "since")})


async def read_holder(connection: asyncpg.Connection) -> Holder | None:
    async with connection.transaction():
        row = await read_lease(connection)
    return holder_of(row) if row is not None else None


async def shares_sessions(first: asyncpg.Connection, second: asyncpg.Connection) -> bool:
    """Whether something between us and the database lends sessions to transactions: two connections get the same
    session, one gets two, or its process id differs from the one that the database reports."""
    pid = await _backend_pid(first)
    if pid != first.get_server_pid():
        return True
    async with second.transaction():
        if await second.fetchval("SELECT pg_backend_pid()") == pid:
            return True
        try:
            return await asyncio.wait_for(_backend_pid(first), PROBE_S) != pid
        except TimeoutError:
            return True


async def _backend_pid(connection: asyncpg.Connection) -> int:
    async with connection.transaction():
        return int(await connection.fetchval("SELECT pg_backend_pid()") or 0)


async def warn_if_not_durable(writer: asyncpg.Connection) -> None:
    async with writer.transaction():
        fsync = await writer.fetchval("SHOW fsync")
    if fsync != "on":
        _log.warning("PostgreSQL runs with fsync = off: accepted requests can be lost when its host crashes.")


async def close_connection(connection: asyncpg.Connection | asyncpg.Pool) -> None:
    """Close it in order, but terminate it if that takes more than a moment: the other side may be gone."""
    try:
        await asyncio.wait_for(connection.close(), 1.0)
    except (asyncpg.PostgresError, *LOST):
        connection.terminate()


def name_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def without_password(url: str) -> str:
    """The URL for messages. The query is left out, too: it may hold a password as well."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    credentials, at, place = rest.rpartition("@")
    return f"{scheme}://{credentials.partition(':')[0]}{at}{place}"
