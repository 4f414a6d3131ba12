"""One list of behaviours for every kind of storage. `memory` goes the road of the clouds: obstore all the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tx_async.errors import CorruptedCheckpoint, InvalidRequest, NotFound, StorageError, UnknownCheckpoint
from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage.identity import ensure_identity_sync
from tx_async.storage.store import IDENTITY, Store

RUN = "s-12:train:0"
"""Model ids have colons."""


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "base" if request.param == "local" else "memory:///")


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list_sync(prefix)]


async def test_put_get_list_size_delete(store: Store):
    await store.put(f"{RUN}/weights/a", b"12345")
    store.put_many_sync({f"{RUN}/weights/b": b"", "other/ünï 名": b"x"})
    assert await store.get(f"{RUN}/weights/a") == b"12345"
    assert await store.get("other/ünï 名") == b"x"
    assert [entry.key for entry in await store.list(RUN)] == [f"{RUN}/weights/a", f"{RUN}/weights/b"]
    assert [entry.num_bytes for entry in await store.list()] == [1, 5, 0]
    assert f"{RUN}/weights/a" in await store.list_keys(RUN)
    await store.delete(f"{RUN}/weights/a")
    await store.delete(f"{RUN}/weights/a")
    assert f"{RUN}/weights/a" not in await store.list_keys(RUN)
    assert await store.delete_prefix(RUN) == 1
    assert keys(store) == ["other/ünï 名"]


async def test_prefix_is_a_folder_not_a_beginning(store: Store):
    store.put_many_sync({"run/1": b"", "run-2/1": b"", "running": b""})
    assert keys(store, "run") == ["run/1"]
    assert store.delete_prefix_sync("run") == 1
    assert keys(store) == ["run-2/1", "running"]


def test_put_replaces(store: Store):
    store.put_sync("a/b", b"old")
    store.put_sync("a/b", b"new")
    assert store.get_sync("a/b") == b"new"


def test_what_is_not_there_is_not_found(store: Store):
    with pytest.raises(NotFound, match="a/nothing"):
        store.get_sync("a/nothing")
    with pytest.raises(NotFound):
        list(store.stream_sync("a/nothing"))
    with pytest.raises(NotFound):
        store.copy_sync("a/nothing", "b")
    assert store.list_sync("a") == []
    assert store.delete_prefix_sync("a") == 0


HIDDEN_OR_OUTSIDE = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "/", ".", "a/./b", ".hidden/x"]
UNPRINTABLE_OR_TOO_LONG = ["a\\b", "a\0b", "a\nb", "a#1", "x" * 256, "/".join(["x" * 200] * 6)]


@pytest.mark.parametrize("key", [*HIDDEN_OR_OUTSIDE, *UNPRINTABLE_OR_TOO_LONG])
def test_keys_cannot_leave_the_base(store: Store, key: str, tmp_path: Path):
    calls = (
        lambda: store.put_sync(key, b"x"),
        lambda: store.get_sync(key),
        lambda: list(store.stream_sync(key)),
        lambda: store.delete_sync(key),
        lambda: store.delete_prefix_sync(f"{key}/.."),
        lambda: store.copy_sync(key, "fine"),
        lambda: store.copy_sync("fine", key),
        lambda: checkpoints.write_checkpoint_sync(store, key, {"f": b""}, {}),
        lambda: checkpoints.read_checkpoint_sync(store, key),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match="not allowed"):
            call()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_large_objects_travel_in_pieces(store: Store, tmp_path: Path):
    data = bytes(range(256)) * 80_000
    (tmp_path / "source").write_bytes(data)
    store.put_sync("big", tmp_path / "source")
    pieces = [piece async for piece in store.stream("big")]
    assert b"".join(pieces) == data
    assert b"".join(store.stream_sync("big")) == data


def test_checkpoint_comes_back_equal(store: Store, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"from a file")
    files = {"adapter.safetensors": b"\x00\x01", "adapter_config.json": b"{}", "file": tmp_path / "file"}
    metadata = {"step": 3, "rate": 1e-4, "nested": {"name": "ünï"}}
    manifest = checkpoints.write_checkpoint_sync(store, f"{RUN}/weights/1", files, metadata)
    assert manifest.num_bytes == 2 + 2 + 11
    read = checkpoints.read_checkpoint_sync(store, f"{RUN}/weights/1")
    assert read == (metadata, files | {"file": b"from a file"})
    assert checkpoints.verify_checkpoint_sync(store, f"{RUN}/weights/1") == manifest
    assert checkpoints.list_checkpoints_sync(store) == [f"{RUN}/weights/1"]


async def test_checkpoint_coroutines_do_the_same(store: Store):
    manifest = await checkpoints.write_checkpoint(store, "a", {"f": b"1"}, {"step": 1})
    assert await checkpoints.read_checkpoint(store, "a") == ({"step": 1}, {"f": b"1"})
    assert await checkpoints.read_manifest(store, "a") == manifest == await checkpoints.verify_checkpoint(store, "a")
    await checkpoints.copy_checkpoint(store, "a", "b")
    await checkpoints.delete_checkpoint(store, "a")
    assert await checkpoints.list_checkpoints(store) == ["b"]
    assert await checkpoints.read_checkpoint(store, "b") == ({"step": 1}, {"f": b"1"})
    assert await checkpoints.sweep_incomplete(store, 0) == []


def test_without_metadata_there_is_no_checkpoint(store: Store):
    store.put_sync("run/half/adapter", b"x")
    with pytest.raises(UnknownCheckpoint, match="run/half"):
        checkpoints.read_checkpoint_sync(store, "run/half")
    assert checkpoints.list_checkpoints_sync(store) == []


def test_saved_again_under_one_key_has_only_the_new_files(store: Store):
    """A save is replayed after a crash: the second attempt replaces the first, wherever that one ended."""
    checkpoints.write_checkpoint_sync(store, "c", {"a": b"1", "b": b"2"}, {"step": 1})
    checkpoints.write_checkpoint_sync(store, "c/below", {"x": b"9"}, {})
    checkpoints.write_checkpoint_sync(store, "c", {"a": b"3"}, {"step": 2})
    assert checkpoints.read_checkpoint_sync(store, "c") == ({"step": 2}, {"a": b"3"})
    assert keys(store, "c") == ["c/a", "c/below/metadata.json", "c/below/x", "c/metadata.json"]


def test_metadata_that_is_no_json_leaves_the_old_checkpoint(store: Store):
    checkpoints.write_checkpoint_sync(store, "c", {"a": b"1"}, {"step": 1})
    with pytest.raises(ValueError):
        checkpoints.write_checkpoint_sync(store, "c", {"a": b"2"}, {"loss": float("nan")})
    assert checkpoints.read_checkpoint_sync(store, "c") == ({"step": 1}, {"a": b"1"})


@pytest.mark.parametrize("name", ["metadata.json", "a/b", "../a", ""])
def test_names_of_files_are_plain(store: Store, name: str):
    with pytest.raises(InvalidRequest):
        checkpoints.write_checkpoint_sync(store, "c", {name: b""}, {})
    assert checkpoints.list_checkpoints_sync(store) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "remove"])
def test_damage_of_a_file_is_reported_not_loaded(store: Store, damage: str):
    data = bytes(1_000)
    checkpoints.write_checkpoint_sync(store, "c", {"good": b"g", "bad": data}, {})
    damaged = {"flip": data[:500] + b"\x01" + data[501:], "truncate": data[:-1], "append": data + b"\0"}
    if damage == "remove":
        store.delete_sync("c/bad")
    else:
        store.put_sync("c/bad", damaged[damage])
    for read in (checkpoints.read_checkpoint_sync, checkpoints.verify_checkpoint_sync):
        with pytest.raises(CorruptedCheckpoint, match="bad is missing" if damage == "remove" else "bad has") as caught:
            read(store, "c")
        if damage != "remove":
            info = checkpoints.read_manifest_sync(store, "c").files["bad"]
            assert info.sha256 in caught.value.message and str(info.num_bytes) in caught.value.message


def test_any_flipped_byte_of_the_metadata_is_found(store: Store):
    manifest = checkpoints.write_checkpoint_sync(store, "c", {"a": b"1"}, {"step": 1, "rank": 8})
    original = store.get_sync("c/metadata.json")
    found = 0
    for position in range(len(original)):
        flipped = bytearray(original)
        flipped[position] ^= 1
        store.put_sync("c/metadata.json", bytes(flipped))
        try:
            assert checkpoints.read_manifest_sync(store, "c") == manifest, "white space may change, content may not"
        except CorruptedCheckpoint:
            found += 1
    assert found > len(original) / 2


def test_copy_is_complete_and_independent(store: Store):
    checkpoints.write_checkpoint_sync(store, "source", {"a": b"1", "b": b"2"}, {"step": 1})
    checkpoints.copy_checkpoint_sync(store, "source", f"{RUN}/weights/copy")
    checkpoints.delete_checkpoint_sync(store, "source")
    assert checkpoints.read_checkpoint_sync(store, f"{RUN}/weights/copy") == ({"step": 1}, {"a": b"1", "b": b"2"})
    assert keys(store, "source") == []


def test_incomplete_leftovers_are_swept_when_old_enough(store: Store):
    checkpoints.write_checkpoint_sync(store, "run/good", {"a": b"1"}, {})
    store.put_many_sync({"run/half/a": b"1", "run/half/b": b"2"})
    store.put_sync("run/half/below/c", b"3")
    checkpoints.write_checkpoint_sync(store, "run/half/complete", {"a": b"1"}, {})
    assert checkpoints.sweep_incomplete_sync(store, older_than_s=3_600) == []
    assert checkpoints.sweep_incomplete_sync(store, older_than_s=0) == ["run/half", "run/half/below"]
    assert checkpoints.list_checkpoints_sync(store) == ["run/good", "run/half/complete"]
    assert checkpoints.find_incomplete_sync(store, older_than_s=0) == []


async def test_many_at_once(store: Store):
    await asyncio.gather(
        *(checkpoints.write_checkpoint(store, f"r/{i}", {"f": b"%d" % i}, {"i": i}) for i in range(30))
    )
    found = await checkpoints.list_checkpoints(store)
    assert len(found) == 30
    for key in found:
        metadata, files = await checkpoints.read_checkpoint(store, key)
        assert files == {"f": b"%d" % metadata["i"]}


# ---- whose it is


def test_a_storage_gets_its_identity_once(store: Store):
    assert ensure_identity_sync(store) == ensure_identity_sync(store)
    assert not store.create_sync(IDENTITY, b"{}")


def test_nothing_is_lost_for_good_in_a_storage_that_is_away(store: Store):
    """Without its identity, or with another one, "not found" may mean that it is not mounted."""
    store.storage_id = ensure_identity_sync(store)
    with pytest.raises(NotFound):
        store.get_sync("a/b")
    assert store.list_sync("a") == []
    identity = store.get_sync(IDENTITY)
    for away in (lambda: store.delete_sync(IDENTITY), lambda: store.put_sync(IDENTITY, b'{"storage_id": "another"}')):
        away()
        for ask in (store.get_sync, store.list_sync):
            with pytest.raises(StorageError, match="is away"):
                ask("a/b")
        with pytest.raises(StorageError, match="is away"):
            checkpoints.read_manifest_sync(store, "a/b")
        store.storage_id, known = "", store.storage_id
        store.put_sync(IDENTITY, identity)
        store.storage_id = known
    with pytest.raises(NotFound):
        store.get_sync("a/b")
