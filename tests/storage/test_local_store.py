"""What only a local folder can go through: power cuts at each point of a write, a full disk, a killed process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tx_async.errors import ConfigError, StorageError
from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage import local
from tx_async.storage.store import Store

SAVE_FOR_EVER = """
import sys
from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage.store import Store

store = Store(sys.argv[1])
for number in range(1_000_000):
    # Every third save goes over an older one, as a replay does.
    key = f"s:train:0/weights/{number // 3}"
    body = bytes([number % 256]) * 300_000
    checkpoints.write_checkpoint_sync(store, key, {"a": body, "b": body[:1000], "c": b"c"}, {"number": number})
    print(number, flush=True)
"""


@pytest.mark.parametrize("saves_before_the_kill", [1, 4, 9])
def test_kill_during_save_leaves_complete_checkpoints_or_none(tmp_path: Path, saves_before_the_kill: int):
    """kill -9 in the middle of saves: whatever is listed afterwards is whole, and the rest is swept."""
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(saves_before_the_kill):
        saved = int(process.stdout.readline())
    time.sleep(0.003)  # into the next save
    process.send_signal(signal.SIGKILL)
    saved = max([saved, *map(int, process.communicate()[0].split())])
    store = Store(tmp_path)
    complete = checkpoints.list_checkpoints_sync(store)
    for key in complete:
        metadata, files = checkpoints.read_checkpoint_sync(store, key)
        assert files["a"] == bytes([metadata["number"] % 256]) * 300_000
    # All but the one that was being replaced when the process died.
    assert {f"s:train:0/weights/{number}" for number in range(saved // 3)} <= set(complete)
    checkpoints.sweep_incomplete_sync(store, older_than_s=0)
    store.remove_leftovers_sync(older_than_s=0)
    assert checkpoints.list_checkpoints_sync(store) == complete
    files_left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files_left) == 4 * len(complete)


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_failed_put_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str):
    store = Store(tmp_path)
    store.put_sync("a/b", b"old")

    def no_space(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*{"write": (local, "_write"), "fsync": (os, "fsync"), "rename": (os, "replace")}[fails], no_space)
        with pytest.raises(StorageError, match=r"a/b could not be written .*No space left"):
            store.put_sync("a/b", b"new")
    assert store.get_sync("a/b") == b"old"
    assert list((tmp_path / local.INCOMING).iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_checkpoint(tmp_path: Path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the middle."""
    script = """
import resource, signal, sys
from tx_async.errors import StorageError
from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage.store import Store

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
store = Store(sys.argv[1])
try:
    checkpoints.write_checkpoint_sync(store, "run/c", {"small": b"1", "large": bytes(200_000)}, {})
except StorageError as error:
    print(error)
assert checkpoints.list_checkpoints_sync(store) == []
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.write_checkpoint_sync(store, "run/c", {"small": b"1", "large": bytes(200_000)}, {})
assert checkpoints.list_checkpoints_sync(store) == ["run/c"]
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run/c/large could not be written" in done.stdout and "File too large" in done.stdout


def test_large_objects_are_never_whole_in_memory(tmp_path: Path):
    store = Store(tmp_path)
    store.put_sync("big", bytes(20_000_000))
    pieces = [len(piece) for piece in store.stream_sync("big")]
    assert sum(pieces) == 20_000_000 and max(pieces) < 10_000_000


def test_missing_source_is_not_a_missing_key(tmp_path: Path):
    with pytest.raises(StorageError, match="could not be written"):
        Store(tmp_path / "base").put_sync("a", tmp_path / "nothing")


def test_leftovers_of_dead_writers_are_not_listed_and_removed_when_old(tmp_path: Path):
    store = Store(tmp_path)
    store.put_sync("a", b"1")
    (tmp_path / local.INCOMING / "leftover").write_bytes(b"half")
    assert [entry.key for entry in store.list_sync()] == ["a"]
    assert store.remove_leftovers_sync(older_than_s=3_600) == 0
    assert store.remove_leftovers_sync(older_than_s=0) == 1
    assert list((tmp_path / local.INCOMING).iterdir()) == []


def test_a_folder_whose_writer_died_before_its_first_file_is_removed_when_old(tmp_path: Path):
    store = Store(tmp_path)
    store.put_sync("run/weights/1", b"1")
    left = tmp_path / "run/snapshots/7"
    left.mkdir(parents=True)
    assert store.remove_leftovers_sync(older_than_s=3_600) == 0
    for folder in (left, left.parent):
        os.utime(folder, (0, 0))
    assert store.remove_leftovers_sync(older_than_s=3_600) == 1  # which makes the folder around it new
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"weights", "1", "snapshots"}


def test_empty_folders_go_with_their_last_file(tmp_path: Path):
    store = Store(tmp_path)
    checkpoints.write_checkpoint_sync(store, "s:train:0/weights/1", {"a": b"1"}, {})
    checkpoints.delete_checkpoint_sync(store, "s:train:0/weights/1")
    assert [path.name for path in tmp_path.iterdir()] == [local.INCOMING]


@pytest.mark.parametrize("base", ["ftp://host/x", "s3://"])
def test_base_that_cannot_be_used_is_refused_at_start(base: str):
    with pytest.raises(ConfigError, match="checkpoints_base"):
        Store(base)


def test_base_that_is_a_file_is_refused_at_start(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="checkpoints_base"):
        Store(tmp_path / "file")


def test_file_url_and_path_are_the_same_place(tmp_path: Path):
    Store(f"file://{tmp_path}").put_sync("a:b/c", b"1")
    assert Store(tmp_path).get_sync("a:b/c") == (tmp_path / "a:b" / "c").read_bytes() == b"1"
