"""Migrations: the same numbers for every database, forward only."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tx_async.errors import ConfigError
from tx_async.journal import migrate, sqlite
from tx_async.journal.sqlite import SqliteDriver
from tx_async.wire.records import IdentityRecord, Put, SessionRecord, encode_record


def test_databases_have_the_same_migrations():
    names = [[(m.number, m.name) for m in migrate.read_migrations(dialect)] for dialect in ("sqlite", "postgres")]
    assert names[0] == names[1] and names[0][0][0] == 1


def write(folder: Path, *names: str) -> Path:
    (folder / "sqlite").mkdir()
    for name in names:
        (folder / "sqlite" / name).write_text("CREATE TABLE t (x)")
    return folder


def test_pending_are_the_ones_after_the_current(tmp_path: Path):
    schemas = write(tmp_path, "0002_b.sql", "0001_a.sql", "0003_c.sql")
    assert [m.name for m in migrate.pending("sqlite", 1, schemas)] == ["b", "c"]
    assert migrate.pending("sqlite", 3, schemas) == []


def test_gap_in_the_numbers_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="without gaps"):
        migrate.read_migrations("sqlite", write(tmp_path, "0001_a.sql", "0003_c.sql"))


def test_odd_name_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="NNNN"):
        migrate.read_migrations("sqlite", write(tmp_path, "1-a.sql"))


async def test_newer_schema_is_refused_and_left_alone(tmp_path: Path):
    """A newer server has migrated this journal; going back to an older server must not touch it."""
    path = tmp_path / "tx.db"
    driver = SqliteDriver(path)
    await driver.open()
    await driver.close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, 'future')")
    connection.close()
    with pytest.raises(ConfigError, match=r"schema version 99; this server knows versions up to \d+"):
        await SqliteDriver(path).open()


async def test_failing_migration_leaves_the_schema_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tx.db"
    driver = SqliteDriver(path)
    await driver.open()
    await driver.close()
    broken = migrate.Migration(2, "broken", "CREATE TABLE half (x); CREATE TABLE session (x);")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite.migrate, "pending", lambda dialect, current: [broken])
        with pytest.raises(Exception, match="already exists"):
            await SqliteDriver(path).open()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    assert connection.execute(migrate.READ_SCHEMA_VERSION).fetchone() == (len(migrate.read_migrations("sqlite")),)
    connection.close()
    driver = SqliteDriver(path)
    await driver.open()
    await driver.close()


async def test_a_journal_of_the_previous_schema_is_brought_up_to_date(tmp_path: Path):
    """As a server of the release before left it: records stay, the identity's table and the fence are there."""
    path = tmp_path / "tx.db"
    first = migrate.read_migrations("sqlite")[0]
    session = SessionRecord(session_id="s", owner="alice", created_at=1.0)
    connection = sqlite3.connect(path)
    connection.executescript(f"{migrate.CREATE_SCHEMA_VERSION}; {first.sql}")
    connection.execute("INSERT INTO schema_version VALUES (1, 'initial')")
    connection.execute("INSERT INTO session (key, record) VALUES ('s', ?)", (encode_record(session),))
    connection.execute("INSERT INTO lease VALUES (1, 'aa', 'host', 1, 1.0)")
    connection.commit()
    connection.close()
    driver = SqliteDriver(path)
    await driver.open()
    await driver.apply([Put(IdentityRecord(journal_id="j"))])
    assert await driver.load() == [session, IdentityRecord(journal_id="j")]
    await driver.close()
