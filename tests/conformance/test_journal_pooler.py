"""P14, every write is fenced: two servers never write one journal, whatever stands between them and PostgreSQL.

A real pgbouncer in transaction mode where the system has one; what it takes from a session (its locks) is also taken
away by hand, which always runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from tx_async.errors import JournalReplaced, LeaseHeld, StorageError
from tx_async.journal import postgres
from tx_async.journal.journal import Journal
from tx_async.journal.postgres import PostgresDriver
from tx_async.testing.server import free_port
from tx_async.wire.records import Put, RequestRecord, SessionRecord

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")


def put(name: str) -> list[Put]:
    return [Put(SessionRecord(session_id=name, owner="alice", created_at=1.0))]


async def keys(url: str) -> list[str]:
    """Of the records, read past the lease."""
    connection = await asyncpg.connect(url, statement_cache_size=0)
    async with connection.transaction():
        rows = await connection.fetch("SELECT key FROM session ORDER BY position")
    await connection.close()
    return [row["key"] for row in rows]


async def opened(driver: PostgresDriver) -> Journal:
    journal = Journal(driver)
    await journal.open()
    return journal


async def raised_by(waiting: asyncio.Task[None]) -> BaseException | None:
    await asyncio.wait([waiting], timeout=20)
    assert waiting.done()
    return waiting.exception()


# ---- locks that do not hold, by hand


async def test_server_whose_lock_was_lost_stops_at_its_next_commit(postgres_url: str):
    """Both believe to have the lock: the second epoch has begun, so nothing of the first server's is written."""
    first = PostgresDriver(postgres_url, renew_s=60)
    old = await opened(first)
    await old.commit(put("before"))
    await first._writer.execute("SELECT pg_advisory_unlock_all()")  # type: ignore[union-attr]
    new = await opened(PostgresDriver(postgres_url))
    stopped = asyncio.create_task(old.run())
    with pytest.raises(LeaseHeld, match="in use by process"):
        await old.commit(put("too late"))
    assert isinstance(await raised_by(stopped), LeaseHeld)
    await new.commit(put("after"))
    assert await keys(postgres_url) == ["before", "after"]
    await old.close()
    await new.close()


async def test_idle_server_whose_lock_was_lost_stops_within_seconds(postgres_url: str):
    first = PostgresDriver(postgres_url, renew_s=0.1)
    old = await opened(first)
    await first._writer.execute("SELECT pg_advisory_unlock_all()")  # type: ignore[union-attr]
    new = await opened(PostgresDriver(postgres_url))
    assert isinstance(await raised_by(asyncio.create_task(old.run())), LeaseHeld)
    await old.close()
    await new.close()


async def test_failover_to_a_standby_that_was_behind_stops_the_server(postgres_url: str):
    """The sessions are cut, and what answers next has the journal without its newest commits: what this server has in
    memory, and has told its clients, is not there. It must not go on as if it were."""
    journal = await opened(PostgresDriver(postgres_url))
    for name in ("a", "b", "c"):
        await journal.commit(put(name))
    standby = await asyncpg.connect(postgres_url)
    await standby.execute("DELETE FROM session WHERE key IN ('b', 'c'); UPDATE lease SET commits = commits - 2")
    await standby.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await standby.close()
    with pytest.raises(JournalReplaced, match="set back"):
        await journal.commit(put("d"))
    assert await keys(postgres_url) == ["a"]
    await journal.close()


async def test_failover_to_a_standby_that_has_everything_is_a_delay(postgres_url: str):
    journal = await opened(PostgresDriver(postgres_url))
    await journal.commit(put("a"))
    other = await asyncpg.connect(postgres_url)
    await other.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await other.close()
    await journal.commit(put("b"))
    assert await keys(postgres_url) == ["a", "b"]
    await journal.close()


async def test_commit_whose_answer_was_lost_is_made_once(postgres_url: str):
    """Durable, but nobody heard of it: the counter is one ahead, and the same commit passes again."""
    driver = PostgresDriver(postgres_url)
    journal = await opened(driver)
    await journal.commit(put("a"))
    other = await asyncpg.connect(postgres_url)
    await other.execute("UPDATE lease SET commits = commits + 1")
    await other.close()
    await journal.commit(put("b"))
    await journal.commit(put("c"))
    assert await keys(postgres_url) == ["a", "b", "c"]
    await journal.close()


# ---- a real pooler


@contextlib.contextmanager
def pgbouncer(folder: Path, sockets: Path, mode: str = "transaction") -> Iterator[int]:
    """The port of a pooler with two sessions for each database. It refuses to run as root, so it runs as PostgreSQL
    does, and must be able to read `folder`, which pytest's own folders do not let it."""
    port = free_port()
    owner = sockets.owner()
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={sockets} user=postgres pool_size=2\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\nmax_client_conn = 100\nserver_login_retry = 1\n"
    )
    folder.chmod(0o755)
    user = owner if os.geteuid() == 0 and pwd.getpwuid(os.geteuid()).pw_name != owner else None
    with (folder / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen([str(PGBOUNCER), str(settings)], stdout=log, stderr=log, cwd="/", user=user)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
async def pooled_url(postgres_server) -> AsyncIterator[str]:
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    with (
        tempfile.TemporaryDirectory() as name,
        postgres_server.new_database() as database,
        pgbouncer(Path(name), postgres_server.folder) as port,
    ):
        url = f"postgresql://postgres@127.0.0.1:{port}/{database}"
        await answers(url, Path(name))
        yield url


async def answers(url: str, folder: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            await (await asyncpg.connect(url, statement_cache_size=0)).close()
            return
        except (OSError, asyncpg.PostgresError) as error:
            assert time.monotonic() < deadline, f"{error}\n{(folder / 'pgbouncer.log').read_text()}"
            await asyncio.sleep(0.1)


async def test_pooler_is_found_out_and_the_journal_works_behind_it(pooled_url: str, caplog: pytest.LogCaptureFixture):
    driver = PostgresDriver(pooled_url)
    with caplog.at_level(logging.WARNING):
        journal = await opened(driver)
    assert "no lock of a session holds" in caplog.text
    request = RequestRecord(
        request_id="r", owner="a", kind="k", subject="m", seq_id=1, body_digest="", body_bytes=0, created_at=0
    )
    await journal.commit([Put(request, b"body")])
    await asyncio.gather(*(journal.commit(put(f"s{i}")) for i in range(20)))
    assert await asyncio.gather(*(journal.read_body("r") for _ in range(10))) == [b"body"] * 10
    await journal.close()
    assert len(await keys(pooled_url)) == 20


async def test_second_server_behind_a_pooler_is_refused_while_the_first_lives(
    pooled_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(postgres, "LEASE_ROW_S", 3.0)
    first = await opened(PostgresDriver(pooled_url, renew_s=0.2))
    supervised = asyncio.create_task(first.run())
    with pytest.raises(LeaseHeld, match="in use by process"):
        await PostgresDriver(pooled_url, renew_s=0.2).open()
    await first.commit(put("still"))
    await first.close()
    await asyncio.gather(supervised, return_exceptions=True)
    second = await opened(PostgresDriver(pooled_url, renew_s=0.2))  # it was given back: no waiting
    await second.close()


async def test_of_two_servers_behind_a_pooler_one_writes(pooled_url: str, monkeypatch: pytest.MonkeyPatch):
    """The first stood still for longer than its lease, as a stopped process does, and believes that it still serves."""
    monkeypatch.setattr(postgres, "LEASE_ROW_S", 0.5)
    old = await opened(PostgresDriver(pooled_url, renew_s=60))
    await old.commit(put("before"))
    await asyncio.sleep(0.6)
    new = await opened(PostgresDriver(pooled_url, renew_s=0.2))
    outcomes = await asyncio.gather(
        *(journal.commit(put(f"{name}{i}")) for i in range(5) for name, journal in (("old", old), ("new", new))),
        return_exceptions=True,
    )
    assert {type(outcome) for outcome in outcomes[0::2]} == {LeaseHeld} and outcomes[1::2] == [None] * 5
    assert await keys(pooled_url) == ["before", *(f"new{i}" for i in range(5))]
    await old.close()
    await new.close()


async def test_direct_connection_is_not_taken_for_a_pooler(postgres_url: str, caplog: pytest.LogCaptureFixture):
    driver = PostgresDriver(postgres_url)
    journal = await opened(driver)
    assert not driver._is_pooled and "pooler" not in caplog.text
    await journal.close()


async def test_without_prepared_statements_everything_works(postgres_url: str):
    journal = await opened(PostgresDriver(postgres_url, prepared_statements=False))
    await journal.commit(put("a"))
    with pytest.raises(StorageError):
        await journal.read_body("none")
    await journal.close()
    assert await keys(postgres_url) == ["a"]
