"""The SQLite journal against a real disk: kill -9, a torn log, a full disk, damaged bodies, leftovers, growth."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, JournalReplaced, LeaseHeld, StorageError
from tx_async.journal.factory import driver_for, open_journal
from tx_async.journal.journal import Journal
from tx_async.journal.sqlite import FREE_PAGES_MAX, VACUUM_EVERY_COMMITS, SqliteDriver
from tx_async.wire.records import Delete, DropBody, Put, RequestRecord, SessionRecord

COMMIT_UNTIL_KILLED = Path(__file__).with_name("commit_until_killed.py")
LARGE = 100_000


def request(name: str) -> RequestRecord:
    return RequestRecord(
        request_id=name, owner="a", kind="OptimStep", subject="m", seq_id=1, body_digest="", body_bytes=0, created_at=0
    )


def session(name: str) -> SessionRecord:
    return SessionRecord(session_id=name, owner="alice", created_at=1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tx.db"


@pytest.fixture
async def driver(path: Path) -> AsyncIterator[SqliteDriver]:
    driver = SqliteDriver(path)
    await driver.open()
    yield driver
    await driver.close()


async def open_and_close(path: Path) -> list[str]:
    """Names of the records that a server would find."""
    driver = SqliteDriver(path)
    await driver.open()
    try:
        return [record.key for record in await driver.load()]
    finally:
        await driver.close()


def payloads(path: Path) -> list[Path]:
    return sorted(Path(f"{path}.payloads").iterdir())


def start_and_kill(path: Path, num_clients: int, seconds: float = 0.0, num_commits: int = 0) -> list[str]:
    """Names that a server acknowledged before kill -9, which comes after so many of them and so many seconds."""
    command = [sys.executable, str(COMMIT_UNTIL_KILLED), f"sqlite://{path}", str(num_clients)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    first = [process.stdout.readline().removesuffix("\n") for _ in range(num_commits)]
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    lines = process.communicate()[0].split("\n")
    return first + lines[:-1]  # the last is empty, or cut


def expected_body(name: str) -> bytes:
    client, number = map(int, name.split("-"))
    return name.encode() * (20_000 if number % 8 == client else 2)


@pytest.mark.parametrize("seed", range(3))
async def test_every_acknowledged_request_is_found_after_kill_9(path: Path, seed: int):
    """Three servers in a row are killed in the middle of commits; the fourth finds each request that any of them
    acknowledged, with its body, and takes the lease at once."""
    acknowledged: list[str] = []
    for _ in range(2):
        acknowledged += start_and_kill(path, num_clients=6, seconds=random.Random(seed).uniform(0.05, 0.3))
    assert acknowledged
    driver = SqliteDriver(path)
    started = time.monotonic()
    await driver.open()
    assert time.monotonic() - started < 2
    found = {record.key for record in await driver.load()}
    assert set(acknowledged) <= found
    for name in found:
        assert await driver.read_body(name) == expected_body(name)
    num_large = sum(len(expected_body(name)) > 64 * 1024 for name in found)
    assert len(payloads(path)) == num_large
    await driver.close()


def test_truncated_log_keeps_a_prefix_of_the_commits(path: Path, tmp_path: Path):
    """The log's tail is torn off or overwritten: what is left is a state after some commit."""
    # So few that the log is not written back into the database and begun anew: all of it counts.
    acknowledged = start_and_kill(path, num_clients=1, num_commits=30)
    log = Path(f"{path}-wal").read_bytes()
    rng = random.Random(1)
    lengths = []
    for trial in range(8):
        copy = tmp_path / f"copy{trial}" / "tx.db"
        copy.parent.mkdir()
        shutil.copy(path, copy)
        shutil.copytree(f"{path}.payloads", f"{copy}.payloads")
        cut = rng.randrange(len(log))
        Path(f"{copy}-wal").write_bytes(log[:cut] + (rng.randbytes(len(log) - cut) if trial % 2 else b""))
        names = asyncio.run(open_and_close(copy))
        assert names == [f"0-{number}" for number in range(len(names))]
        lengths.append(len(names))
    assert min(lengths) < len(acknowledged)


FULL_DISK = """
import asyncio, logging, resource, signal, sys
from tx_async.errors import StorageError
from tx_async.journal.journal import Journal
from tx_async.journal.sqlite import SqliteDriver
from tx_async.wire.records import Put, RequestRecord

def put(name, size):
    return [Put(RequestRecord(request_id=name, owner="a", kind="k", subject="m", seq_id=1, body_digest="", body_bytes=0,
                              created_at=0), b"x" * size)]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    journal = Journal(SqliteDriver(sys.argv[1]))
    await journal.open()
    await journal.commit(put("before", 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit(400_000)
    acknowledged, errors = ["before"], []
    names = [(f"r{i}", 30_000 if i % 3 else 500_000) for i in range(30)]
    for name, size in names:
        try:
            await journal.commit(put(name, size))
            acknowledged.append(name)
        except StorageError as error:
            errors.append(str(error))
    assert errors and all("The journal" in error and "could not" in error for error in errors), errors
    limit(resource.RLIM_INFINITY)
    await journal.commit(put("after", 500_000))
    acknowledged.append("after")
    await journal.close()
    journal = Journal(SqliteDriver(sys.argv[1]))
    found = [record.key for record in await journal.open()]
    assert found == acknowledged, (found, acknowledged)
    for name in found:
        assert set(await journal.read_body(name)) == {ord("x")}
    await journal.close()
    print(len(acknowledged), len(errors), errors[0], errors[-1], sep="\\n")

logging.disable()
asyncio.run(main())
"""


def test_full_disk_fails_commits_and_the_journal_recovers(path: Path):
    """A limit on the size of files stands for the full disk: it stops the log and large bodies alike. Callers learn of
    it, what was acknowledged stays, and when there is room again the same journal goes on."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_acknowledged, num_errors, first, last = done.stdout.strip().split("\n")
    assert int(num_acknowledged) >= 3 and int(num_errors) >= 10
    assert "File too large" in first and ("disk I/O error" in last or "full" in last)


async def test_sqlite_full_error_names_the_disk(driver: SqliteDriver, path: Path):
    await driver._connected.run(lambda connection: connection.execute("PRAGMA max_page_count = 40").fetchall())
    with pytest.raises(StorageError, match=r"tx.db could not be written: database or disk is full"):
        await driver.apply(
            [Put(request(f"r{i}"), b"x" * 50_000) for i in range(10)] + [Put(request("big"), b"x" * LARGE)]
        )
    assert await driver.load() == []
    await driver._connected.run(lambda connection: connection.execute("PRAGMA max_page_count = 1000000").fetchall())
    await driver.apply([Put(request("big"), b"y" * LARGE)])
    assert await driver.read_body("big") == b"y" * LARGE
    await driver.close()
    assert len(payloads(path)) == 1, "the failed transaction's file is gone"


def test_read_only_folder_is_reported_at_start():
    """Root may write anywhere, so the child becomes nobody first."""
    script = """
import asyncio, os, sys
from tx_async.errors import StorageError
from tx_async.journal.sqlite import SqliteDriver

async def main():
    driver = SqliteDriver(sys.argv[1])
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        await driver.open()
    except StorageError as error:
        print(error)

asyncio.run(main())
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        done = subprocess.run(
            [sys.executable, "-c", script, f"{folder}/tx.db"], capture_output=True, text=True, check=False
        )
        os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr
    assert f"The journal {folder}/tx.db cannot be opened" in done.stdout and "Permission denied" in done.stdout


def test_file_that_is_no_database_is_reported_and_left_alone(path: Path):
    path.write_bytes(b"this is a text, and a rather long one" * 100)
    with pytest.raises(StorageError, match=r"tx\.db cannot be opened: file is not a database"):
        asyncio.run(SqliteDriver(path).open())
    assert path.read_bytes().startswith(b"this is a text")


def test_second_process_is_refused_by_name(path: Path):
    command = [sys.executable, str(COMMIT_UNTIL_KILLED), f"sqlite://{path}", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    try:
        with pytest.raises(LeaseHeld, match=rf"in use by process {process.pid} on host .* since .* UTC"):
            asyncio.run(SqliteDriver(path).open())
    finally:
        process.kill()
        process.communicate()
    asyncio.run(open_and_close(path))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
async def test_damaged_body_is_reported(driver: SqliteDriver, path: Path, damage: str):
    await driver.apply([Put(request("r"), bytes(LARGE))])
    (payload,) = payloads(path)
    if damage == "remove":
        payload.unlink()
    elif damage == "truncate":
        os.truncate(payload, 10)
    else:
        with payload.open("r+b") as file:
            file.seek(LARGE // 2)
            file.write(b"\x01")
    with pytest.raises(StorageError, match=r"body of request r (is damaged|cannot be read)"):
        await driver.read_body("r")


async def test_damaged_small_body_is_reported(driver: SqliteDriver, path: Path):
    await driver.apply([Put(request("r"), b"abc")])
    await driver._connected.run(lambda connection: connection.execute("UPDATE request_body SET body = x'616264'"))
    with pytest.raises(StorageError, match="body of request r is damaged"):
        await driver.read_body("r")


async def test_payload_files_go_with_their_rows(driver: SqliteDriver, path: Path):
    await driver.apply([Put(request(f"r{i}"), b"x" * LARGE) for i in range(4)])
    assert len(payloads(path)) == 4
    await driver.apply([DropBody("r0"), Delete("request", "r1"), Put(request("r2"), b"y" * LARGE)])
    await driver.close()
    assert len(payloads(path)) == 2


async def test_orphaned_payloads_are_swept_at_start(driver: SqliteDriver, path: Path):
    """A crash between the payload's sync and the transaction leaves a file that no row names."""
    await driver.apply([Put(request("r"), b"x" * LARGE)])
    await driver.close()
    (named,) = payloads(path)
    (Path(f"{path}.payloads") / ("0" * 32)).write_bytes(b"orphan")
    successor = SqliteDriver(path)
    await successor.open()
    assert payloads(path) == [named]
    assert await successor.read_body("r") == b"x" * LARGE
    await successor.close()


def num_bytes(path: Path) -> int:
    """Of the database and its log."""
    log = Path(f"{path}-wal")
    return path.stat().st_size + (log.stat().st_size if log.exists() else 0)


async def test_files_stay_flat_over_many_cycles(driver: SqliteDriver, path: Path):
    """A long run: requests come and go, few at a time. Neither the database nor its log grows with their number."""
    sizes = []
    for cycle in range(120):
        names = [f"{cycle}-{i}" for i in range(20)]
        await driver.apply([Put(request(name), b"x" * (20_000 if i % 10 else LARGE)) for i, name in enumerate(names)])
        await driver.apply([Delete("request", name) for name in names])
        sizes.append(num_bytes(path))
    assert max(sizes[60:]) <= 1.1 * max(sizes[:60])
    assert max(sizes) < 12 * 2**20


async def test_space_of_a_large_backlog_is_given_back(driver: SqliteDriver, path: Path):
    names = [f"r{i}" for i in range(800)]
    for start in range(0, 800, 100):
        await driver.apply([Put(request(name), b"x" * 60_000) for name in names[start : start + 100]])
    await driver._connected.run(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    full = num_bytes(path)
    assert full > 2 * FREE_PAGES_MAX * 4096
    await driver.apply([Delete("request", name) for name in names])
    for number in range(5 * VACUUM_EVERY_COMMITS):
        await driver.apply([Put(session(f"s{number % 3}"))])
    await driver.close()
    assert num_bytes(path) < full - 2 * FREE_PAGES_MAX * 4096 + 2**20


async def test_commits_are_synced(driver: SqliteDriver):
    settings = await driver._connected.run(
        lambda connection: [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("synchronous", "journal_mode", "auto_vacuum")
        ]
    )
    assert settings == [2, "wal", 2]


async def test_five_hundred_commits_share_few_syncs(path: Path):
    journal = Journal(SqliteDriver(path))
    await journal.open()
    await asyncio.gather(*(journal.commit([Put(session(f"s{i}"))]) for i in range(500)))
    assert journal.statistics().commits <= 3
    await journal.close()


async def test_factory_follows_the_configuration(tmp_path: Path):
    journal = open_journal(ServerConfig(data_dir=str(tmp_path / "home")))
    await journal.open()
    await journal.close()
    assert (tmp_path / "home" / "tx_async.db").exists()
    for slashes in ("sqlite://", "sqlite:///"):
        journal = open_journal(ServerConfig(database_url=f"{slashes}{tmp_path}/other.db"))
        await journal.open()
        await journal.close()
    connection = sqlite3.connect(tmp_path / "other.db")
    assert connection.execute("SELECT pid FROM lease").fetchall() == [(os.getpid(),)]
    connection.close()


@pytest.mark.parametrize("url", ["mysql://host/db", "tx.db", "sqlite://", "sqlite:///", "sqlite://tx.db"])
def test_unusable_url_is_refused(url: str):
    with pytest.raises(ConfigError, match="database_url"):
        driver_for(url)


# ---- the fence


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path, timeout=10) as connection:
        connection.execute(statement)
    connection.close()


async def test_server_whose_epoch_has_passed_writes_nothing(driver: SqliteDriver, path: Path):
    """The lock's file was deleted, so a second server could lock another one of its name."""
    await driver.apply([Put(session("before"))])
    path.with_name(path.name + ".lock").unlink()
    second = SqliteDriver(path)
    await second.open()
    with pytest.raises(LeaseHeld, match=f"in use by process {os.getpid()}"):
        await driver.apply([Put(session("too late"))])
    await second.apply([Put(session("after"))])
    assert [record.key for record in await second.load()] == ["before", "after"]
    await second.close()


async def test_journal_that_was_set_back_stops_the_server(driver: SqliteDriver, path: Path):
    for name in ("a", "b", "c"):
        await driver.apply([Put(session(name))])
    change(path, "UPDATE lease SET commits = 1")
    with pytest.raises(JournalReplaced, match="has made 3 commits"):
        await driver.apply([Put(session("d"))])


@pytest.mark.parametrize("what", ["deleted", "replaced", "log deleted"])
async def test_file_that_is_taken_away_is_noticed_within_seconds(path: Path, what: str):
    """Nobody writes, and still the server stops; a commit at once does not go into a file that nobody will find."""
    driver = SqliteDriver(path, look_s=0.05)
    journal = Journal(driver)
    await journal.open()
    await journal.commit([Put(session("a"))])
    stopped = asyncio.create_task(journal.run())
    taken = path.with_name(path.name + "-wal") if what == "log deleted" else path
    if what == "replaced":
        shutil.copy(path, path.with_name("copy"))
        path.with_name("copy").replace(path)
    else:
        taken.unlink()
    with pytest.raises(JournalReplaced, match=f"{taken.name} was (deleted|replaced)"):
        await journal.commit([Put(session("b"))])
    with pytest.raises(JournalReplaced):
        await asyncio.wait_for(stopped, 10)
    await journal.close()


async def test_looks_at_a_busy_journal_raise_no_alarm(path: Path):
    driver = SqliteDriver(path, look_s=0.001)
    journal = Journal(driver)
    await journal.open()
    supervised = asyncio.create_task(journal.run())
    for i in range(100):
        await journal.commit([Put(session(f"s{i}"))])
    assert not supervised.done()
    await journal.close()
    await supervised
