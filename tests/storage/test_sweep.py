"""What writers that died have left is removed, and nothing else."""

import os
import time
from pathlib import Path

import pytest

from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage import local
from tx_async.storage.store import Store
from tx_async.storage.sweep import OLDER_THAN_S, sweep


def age(base: Path, seconds: float) -> None:
    for path in (base, *base.rglob("*")):
        then = time.time() - seconds
        os.utime(path, times=(then, then))


async def test_what_dead_writers_left_is_removed_when_it_is_old(tmp_path: Path):
    store = Store(tmp_path)
    checkpoints.write_checkpoint_sync(store, "run/weights/whole", {"a": b"1"}, {})
    store.put_sync("run/weights/half/a", b"1")
    store.put_sync("notes/of/the/user", b"1")
    (tmp_path / local.INCOMING / "unfinished").write_bytes(b"1")
    (tmp_path / "run/snapshots/7").mkdir(parents=True)
    age(tmp_path, OLDER_THAN_S + 60)
    store.put_sync("run/weights/begun/a", b"1")
    await sweep(store, ["run"])
    assert [entry.key for entry in store.list_sync()] == [
        "notes/of/the/user",
        "run/weights/begun/a",
        "run/weights/whole/a",
        "run/weights/whole/metadata.json",
    ]
    assert list((tmp_path / local.INCOMING).iterdir()) == []
    assert not (tmp_path / "run/snapshots/7").exists()


async def test_what_cannot_be_removed_keeps_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path)
    store.put_sync("second/weights/half/a", b"1")
    hidden = tmp_path / "first/weights/half/.nfs0001"
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"1")
    age(tmp_path, OLDER_THAN_S + 60)
    await sweep(store, ["first", "second"])
    assert hidden.exists() and not (tmp_path / "second").exists()
    assert ".nfs0001" in caplog.text


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_storage_that_is_away_is_one_line_for_all_runs(is_there: bool, tmp_path: Path, caplog):
    """A share that is not mounted: its mount point is an empty folder, or not there."""
    base = tmp_path / "share"
    if is_there:
        base.mkdir()
    await sweep(Store(base, "its identity"), [f"run-{number}" for number in range(5)])
    [record] = caplog.records
    assert str(base) in record.getMessage() and "until the storage is back" in record.getMessage()
