"""`tx-async backup` and `tx-async restore`: a consistent copy of the journal and of every file that it names, taken
while the server runs.

    DIR/tx_async.db, tx_async.db.payloads/   the journal as of one moment
    DIR/checkpoints/                         the storage's identity, and what the journal's records name
    DIR/backup.json                          written last: a folder without it is not a backup

The journal is copied first. A running server goes on meanwhile and may delete files that the copy still names; then the
journal is copied again, and with it only the files that are not yet here: each attempt is shorter than the one before.
Every checkpoint and body is compared with its hash, here and after a restore.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, ContentLost, NotFound, TxError
from tx_async.journal.transaction import verify
from tx_async.storage.checkpoint_files import (
    METADATA,
    Manifest,
    delete_checkpoint_sync,
    list_checkpoints_sync,
    read_manifest_sync,
    verify_checkpoint_sync,
)
from tx_async.storage.store import IDENTITY, Store
from tx_async.wire.records import (
    RECORD_TYPES,
    CheckpointRecord,
    ModelRecord,
    Record,
    RequestRecord,
    SamplerRecord,
    decode_record,
)

JOURNAL = "tx_async.db"
STORAGE = "checkpoints"
MANIFEST = "backup.json"
FORMAT = 1
ATTEMPTS = 30
"""How often the journal is copied at most, because a busy server's deletions may spoil a copy."""


def backup(config: ServerConfig, folder: Path) -> str:
    """Returns a sentence that says what was copied. Raises `ConfigError`."""
    source = journal_path(config)
    if not source.is_file():
        raise ConfigError(f"There is no journal {source}. Name the server's --data-dir.")
    _check_empty(folder)
    for attempt in range(ATTEMPTS):
        try:
            return _copy(config, source, folder)
        except (NotFound, ContentLost) as error:
            if attempt == ATTEMPTS - 1:
                _clear(folder)
                raise ConfigError(f"The backup is incomplete: {error.message}") from error
        except (TxError, OSError, sqlite3.Error) as error:
            _clear(folder)
            raise ConfigError(f"The backup failed: {error}") from error
    raise AssertionError("every attempt returns or raises")


def restore(folder: Path, config: ServerConfig) -> str:
    """Restore into the data_dir, or the places, of `config`, which must be empty. Raises `ConfigError`."""
    manifest = _read_manifest(folder)
    target = journal_path(config)
    if target.exists():
        raise ConfigError(f"{target} is there already: restore into a data_dir that has no journal.")
    if _hash(folder / JOURNAL) != manifest["journal_sha256"]:
        raise ConfigError(f"{folder / JOURNAL} is damaged: its hash is not the one that was recorded.")
    try:
        store = Store(config.resolved_checkpoints_base)
        _copy_storage(Store(folder / STORAGE), store, _records(folder / JOURNAL))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(_payloads(folder / JOURNAL), _payloads(target), dirs_exist_ok=True)
        _check_bodies(folder / JOURNAL, _payloads(target))
        shutil.copyfile(folder / JOURNAL, target)  # last: without it a server has nothing to start with
    except (TxError, OSError, sqlite3.Error) as error:
        raise ConfigError(f"The restore failed: {error}") from error
    return f"Restored {manifest['records']} records to {target} and their files to {store.address}."


def journal_path(config: ServerConfig) -> Path:
    """The journal's file. Raises `ConfigError` for a database that has backup tools of its own."""
    if config.sqlite_file is None:
        raise ConfigError(
            "The journal is a PostgreSQL database: copy it with pg_dump (or a base backup) first, then the storage. "
            "tx_async/journal/README.md says how."
        )
    return config.sqlite_file


def _copy(config: ServerConfig, source: Path, folder: Path) -> str:
    """One attempt. What goes first is what a running server deletes soonest: bodies, then snapshots."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(_payloads(folder / JOURNAL), ignore_errors=True)
    _copy_database(source, folder / JOURNAL)
    _copy_payloads(source, folder / JOURNAL)
    records = _records(folder / JOURNAL)
    copied = Store(folder / STORAGE)
    num_checkpoints = _copy_storage(Store(config.resolved_checkpoints_base), copied, records)
    _check_bodies(folder / JOURNAL, _payloads(folder / JOURNAL))
    for key in {*list_checkpoints_sync(copied)} - {*_keys(records)}:  # of earlier attempts
        delete_checkpoint_sync(copied, key)
    manifest = {
        "created_at": time.time(),
        "format": FORMAT,
        "journal_sha256": _hash(folder / JOURNAL),
        "records": len(records),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return f"{len(records)} records and {num_checkpoints} checkpoints and snapshots are in {folder}, and verified."


# ---- the journal


def _copy_database(source: Path, target: Path) -> None:
    """Copy the state of one moment: SQLite's own backup ignores the server's lock and does not disturb its commits."""
    with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
        if (found := copy.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise ConfigError(f"The journal {source} is damaged: {found}")


def _copy_payloads(source: Path, target: Path) -> None:
    _payloads(target).mkdir(exist_ok=True)
    with closing(sqlite3.connect(target)) as copy:
        for (name,) in copy.execute("SELECT file FROM request_body WHERE file IS NOT NULL"):
            try:
                shutil.copyfile(_payloads(source) / name, _payloads(target) / name)
            except FileNotFoundError as error:
                raise ContentLost(f"The body {name} was deleted meanwhile.") from error


def _check_bodies(journal: Path, payloads: Path) -> None:
    with closing(sqlite3.connect(journal)) as copy:
        for key, num_bytes, expected, body, file in copy.execute("SELECT * FROM request_body"):
            verify(key, body if file is None else (payloads / file).read_bytes(), num_bytes, expected)


def _records(journal: Path) -> list[Record]:
    with closing(sqlite3.connect(journal)) as copy:
        return [
            decode_record(record)
            for table in RECORD_TYPES
            for (record,) in copy.execute(f"SELECT record FROM {table} ORDER BY position")
        ]


def _payloads(journal: Path) -> Path:
    return journal.with_name(journal.name + ".payloads")


# ---- the storage


def _copy_storage(source: Store, target: Store, records: list[Record]) -> int:
    """Returns the number of checkpoints and snapshots. Raises `NotFound` for one that was deleted."""
    keys = _keys(records)
    for key in keys:
        manifest = read_manifest_sync(source, key)
        if _is_there(target, key, manifest):
            continue
        try:
            for name in (*manifest.files, METADATA):
                target.put_sync(f"{key}/{name}", source.get_sync(f"{key}/{name}"))
        except NotFound:
            target.delete_prefix_sync(key)
            raise
        verify_checkpoint_sync(target, key)
    try:
        target.put_sync(IDENTITY, source.get_sync(IDENTITY))
    except NotFound:  # the server has never reached its storage
        if keys:
            raise
    return len(keys)


def _is_there(target: Store, key: str, manifest: Manifest) -> bool:
    try:
        return read_manifest_sync(target, key) == manifest
    except NotFound:
        return False


def _keys(records: list[Record]) -> list[str]:
    """Of everything that the records name: the runs' snapshots first, the oldest of a run before its newer ones."""
    by_haste = sorted(records, key=lambda record: not isinstance(record, ModelRecord))
    return list(dict.fromkeys(key for record in by_haste for key in _keys_of(record)))


def _keys_of(record: Record) -> list[str]:
    match record:
        case CheckpointRecord(storage_key=key):
            return [key]
        case SamplerRecord(storage_key=str(key)):
            return [key]
        case RequestRecord(storage_key=key) if key:
            return [key]
        case ModelRecord():
            base = [record.created_from] if record.created_from and record.dropped_seq_id == 0 else []
            live = record.status == "live"
            return [*base, *(snapshot.key for snapshot in record.snapshots)] if live else []
    return []


# ---- the folder


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: a backup gets a folder of its own.")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: a backup gets a folder of its own.")


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_manifest(folder: Path) -> dict[str, object]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{folder} is not a complete backup: {MANIFEST} is missing or cannot be read.") from error
    return manifest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
