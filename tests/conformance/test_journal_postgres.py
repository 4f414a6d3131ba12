"""What only PostgreSQL goes through: it restarts, sessions are cut, another server takes over, a client is killed."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from tx_async.errors import ConfigError, LeaseHeld, StorageError
from tx_async.journal import postgres
from tx_async.journal.journal import Journal
from tx_async.journal.postgres import PostgresDriver
from tx_async.wire.records import Put, RequestRecord, SessionRecord

COMMIT_UNTIL_KILLED = Path(__file__).parents[1] / "journal" / "commit_until_killed.py"


def put(name: str) -> list[Put]:
    return [Put(SessionRecord(session_id=name, owner="alice", created_at=1.0))]


async def keys(url: str) -> list[str]:
    journal = Journal(PostgresDriver(url))
    records = await journal.open()
    await journal.close()
    return [record.key for record in records]


async def test_commits_outlast_a_crash_of_the_database(postgres_server, postgres_url: str):
    """The database crashes and comes back while commits arrive. None fails or is lost; the lease is ours again."""
    journal = Journal(PostgresDriver(postgres_url))
    await journal.open()
    await journal.commit(put("before"))
    await asyncio.to_thread(postgres_server.crash)
    commits = [asyncio.create_task(journal.commit(put(f"during{i}"))) for i in range(20)]
    await asyncio.sleep(0.3)
    assert not any(commit.done() for commit in commits)
    await asyncio.to_thread(postgres_server.start)
    await asyncio.gather(*commits)
    await journal.commit(put("after"))
    with pytest.raises(LeaseHeld):
        await PostgresDriver(postgres_url, lease_wait_s=0.2).open()
    await journal.close()
    assert await keys(postgres_url) == ["before", *(f"during{i}" for i in range(20)), "after"]


async def test_database_that_stays_away_fails_commits_and_the_journal_recovers(postgres_server, postgres_url: str):
    journal = Journal(PostgresDriver(postgres_url, reconnect_s_max=0.2))
    await journal.open()
    await asyncio.to_thread(postgres_server.crash)
    try:
        with pytest.raises(StorageError, match="could not be written"):
            await journal.commit(put("lost"))
    finally:
        await asyncio.to_thread(postgres_server.start)
    await journal.commit(put("kept"))
    await journal.close()
    assert await keys(postgres_url) == ["kept"]


async def other_connection(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url)


async def end_sessions(url: str) -> None:
    """Cut every other connection to the database, as an administrator or a failing network does."""
    connection = await other_connection(url)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await connection.close()


async def test_cut_session_is_replaced_in_the_background(postgres_url: str):
    """Nobody writes, but the lease must not stay free: the driver connects again by itself."""
    driver = PostgresDriver(postgres_url)
    journal = Journal(driver)
    await journal.open()
    await end_sessions(postgres_url)
    deadline = time.monotonic() + 10
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::bigint::oid"
    observer = await other_connection(postgres_url)
    while (
        driver._writer is None or driver._writer.is_closed() or not await observer.fetchval(query, postgres.LOCK_CLASS)
    ):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await observer.close()
    with pytest.raises(LeaseHeld):
        await PostgresDriver(postgres_url, lease_wait_s=0.2).open()
    await journal.commit(put("a"))
    await journal.close()


async def test_bodies_are_read_after_a_cut(postgres_url: str):
    journal = Journal(PostgresDriver(postgres_url))
    await journal.open()
    record = RequestRecord(
        request_id="r", owner="a", kind="k", subject="m", seq_id=1, body_digest="", body_bytes=0, created_at=0
    )
    await journal.commit([Put(record, b"body")])
    assert await journal.read_body("r") == b"body"
    await end_sessions(postgres_url)
    assert await journal.read_body("r") == b"body"
    await journal.close()


async def test_server_that_was_replaced_stops(postgres_url: str, monkeypatch: pytest.MonkeyPatch):
    """The first server is cut off; before it is back, a second one takes the lease, serves and leaves. What the first
    one believes is out of date: it must not write again, although the lease is free."""
    first = PostgresDriver(postgres_url)
    journal = Journal(first)
    await journal.open()
    await journal.commit(put("first"))
    supervisor = asyncio.create_task(journal.run())
    with monkeypatch.context() as patch:
        patch.setattr(first, "_reconnect_in_background", lambda: None)  # the network is still cut for the first one
        await end_sessions(postgres_url)
        await asyncio.sleep(0.05)
        second = PostgresDriver(postgres_url)
        await second.open()
        await second.apply(put("second"))
        await second.close()
    with pytest.raises(LeaseHeld, match="in use by process"):
        await journal.commit(put("too late"))
    with pytest.raises(LeaseHeld):
        await supervisor
    await journal.close()
    assert await keys(postgres_url) == ["first", "second"]


async def test_server_whose_lease_is_taken_learns_of_it_without_writing(postgres_url: str):
    """A second server waits for the lock and gets it the moment the first one's session is cut."""
    first = Journal(PostgresDriver(postgres_url))
    await first.open()
    supervisor = asyncio.create_task(first.run())
    second = PostgresDriver(postgres_url, lease_wait_s=1.0)
    waiting = asyncio.create_task(second.open())
    await asyncio.sleep(0.1)
    blocker = await other_connection(postgres_url)
    writer_pid = await blocker.fetchval("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted")
    # Take the lock in the queue behind the first server, so that its own reconnection finds it taken.
    taken = asyncio.create_task(
        blocker.fetchval("SELECT pg_advisory_lock($1, hashtext(current_schema()))", postgres.LOCK_CLASS)
    )
    await asyncio.sleep(0.05)
    killer = await other_connection(postgres_url)
    await killer.execute("UPDATE lease SET instance = 'another', host = 'elsewhere', pid = 7")
    await killer.execute("SELECT pg_terminate_backend($1::int)", writer_pid)
    await taken
    with pytest.raises(LeaseHeld, match="process 7 on host elsewhere"):
        await supervisor
    with pytest.raises(LeaseHeld, match="elsewhere"):
        await first.commit(put("too late"))
    await first.close()
    with pytest.raises(LeaseHeld):
        await waiting
    for connection in (blocker, killer):
        await connection.close()


async def test_own_session_that_the_database_believes_alive_does_not_lock_us_out(postgres_url: str):
    """The network swallowed the connection: the database still sees our old session with the lock. We end it."""
    driver = PostgresDriver(postgres_url)
    journal = Journal(driver)
    await journal.open()
    old = driver._writer
    assert old is not None
    driver._writer = None  # as if our side had noticed, and the other had not
    started = time.monotonic()
    await journal.commit(put("a"))
    assert time.monotonic() - started < postgres.LEASE_WAIT_S
    assert driver._writer is not None and driver._writer is not old
    old.terminate()
    await journal.close()
    assert await keys(postgres_url) == ["a"]


def test_every_acknowledged_request_is_found_after_kill_9(postgres_url: str):
    acknowledged: list[str] = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, str(COMMIT_UNTIL_KILLED), postgres_url, "4"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        acknowledged += process.communicate()[0].split("\n")[:-1]
    assert acknowledged
    assert set(acknowledged) <= set(asyncio.run(keys(postgres_url)))


async def test_newer_schema_is_refused(postgres_url: str):
    assert await keys(postgres_url) == []
    connection = await other_connection(postgres_url)
    await connection.execute("INSERT INTO schema_version VALUES (99, 'future')")
    await connection.close()
    with pytest.raises(ConfigError, match="schema version 99"):
        await PostgresDriver(postgres_url).open()


async def test_database_that_refuses_to_write_is_reported(postgres_url: str):
    """A standby, or an administrator's read-only mode: reading would work, but no request could be accepted."""
    assert await keys(postgres_url) == []
    with pytest.raises(StorageError, match="read-only transaction"):
        await PostgresDriver(f"{postgres_url}&default_transaction_read_only=on").open()


@pytest.mark.parametrize(
    "url", ["postgresql://user:secret@127.0.0.1:1/db", "postgresql://user:secret@no-such-host.invalid/db"]
)
async def test_unreachable_database_is_reported_without_its_password(url: str, caplog: pytest.LogCaptureFixture):
    driver = PostgresDriver(url)
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError, match="cannot be opened") as caught:
        await driver.open()
    assert "secret" not in caught.value.message + repr(driver) + caplog.text
