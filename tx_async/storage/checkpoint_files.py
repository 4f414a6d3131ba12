"""Directory-like checkpoints: some files and a `metadata.json`, which is written last and names every file with size
and hash.

A checkpoint is complete exactly when its metadata.json exists, so it is there whole or not at all:

    <key>/adapter_model.safetensors
    <key>/metadata.json   {"checksum": "…", "files": {"adapter_model.safetensors": {"num_bytes": 42, "sha256": "…"}},
                           "format": 1, "metadata": {…}}

`checksum` is the SHA-256 of the rest of metadata.json. Deletion removes metadata.json first, for the same reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tx_async.errors import CorruptedCheckpoint, InvalidRequest, NotFound, StorageError, UnknownCheckpoint
from tx_async.storage.store import Entry, Store

METADATA = "metadata.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""An adapter's files, as PEFT calls them."""
OPTIMIZER = "optimizer.safetensors"
"""The file with the adapter's optimizer moments."""
FORMAT = 1


class FileInfo(Struct, frozen=True):
    num_bytes: int
    sha256: str


class Manifest(Struct, frozen=True):
    """The content of metadata.json."""

    metadata: dict[str, Any]
    """What the writer recorded about the checkpoint."""
    files: dict[str, FileInfo]
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


def write_checkpoint_sync(
    store: Store, key: str, files: Mapping[str, bytes | Path], metadata: Mapping[str, Any]
) -> Manifest:
    """Store a complete checkpoint under `key`; durable when this returns. A `Path` is read in pieces, twice.

    What an earlier attempt left there is replaced. Until the last write the key has no checkpoint, never a mixed one.
    """
    for name in files:
        if name == METADATA or "/" in name:
            raise InvalidRequest(f"{name!r} cannot be the name of a checkpoint's file.")
    manifest = Manifest(dict(metadata), {name: file_info(data) for name, data in files.items()})
    encoded = encode_manifest(
        manifest
    )  # before anything is written: metadata that is not JSON must not cost the old checkpoint
    delete_checkpoint_sync(store, key)
    store.put_many_sync({f"{key}/{name}": data for name, data in files.items()})
    store.put_sync(f"{key}/{METADATA}", encoded)
    return manifest


def read_manifest_sync(store: Store, key: str) -> Manifest:
    """Raises `UnknownCheckpoint` when the key has no complete checkpoint, `CorruptedCheckpoint` when its list is
    damaged.
    """
    try:
        data = store.get_sync(f"{key}/{METADATA}")
    except NotFound as error:
        raise UnknownCheckpoint(f"No complete checkpoint is stored under {key}.") from error
    return decode_manifest(key, data)


def read_checkpoint_sync(
    store: Store, key: str, verify: bool = True, only: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The metadata, and the files' bytes by name. `only`: read just these, if they are there. Raises like
    `read_manifest_sync`, and `CorruptedCheckpoint` naming the first file that is missing or differs from its recorded
    hash."""
    manifest = read_manifest_sync(store, key)
    return manifest.metadata, {
        name: _read_file(store, key, name, info, verify)
        for name, info in manifest.files.items()
        if only is None or name in only
    }


def verify_checkpoint_sync(store: Store, key: str) -> Manifest:
    """Read every file in pieces and compare it with its hash. Raises like `read_checkpoint_sync`."""
    manifest = read_manifest_sync(store, key)
    for name, info in manifest.files.items():
        state, num_bytes = hashlib.sha256(), 0
        try:
            for chunk in store.stream_sync(f"{key}/{name}"):
                state.update(chunk)
                num_bytes += len(chunk)
        except NotFound as error:
            raise _missing(key, name) from error
        _compare(key, name, info, FileInfo(num_bytes, state.hexdigest()))
    return manifest


def copy_checkpoint_sync(store: Store, source: str, target: str) -> Manifest:
    """Copy a whole checkpoint to another key. Damage is copied as it is: the hashes stay those of the original."""
    manifest = read_manifest_sync(store, source)
    delete_checkpoint_sync(store, target)
    for name in (*manifest.files, METADATA):
        store.copy_sync(f"{source}/{name}", f"{target}/{name}")
    return manifest


def delete_checkpoint_sync(store: Store, key: str) -> None:
    """Does nothing when there is none. A crash on the way leaves an incomplete checkpoint, which a sweep removes."""
    store.delete_sync(f"{key}/{METADATA}")
    for entry in _files_of(store, key):
        store.delete_sync(entry.key)


def list_checkpoints_sync(store: Store, prefix: str = "") -> list[str]:
    """Keys of the complete checkpoints below `prefix/`."""
    ending = f"/{METADATA}"
    return sorted(entry.key.removesuffix(ending) for entry in store.iterate_sync(prefix) if entry.key.endswith(ending))


def find_incomplete_sync(store: Store, older_than_s: float, prefix: str = "") -> list[str]:
    """Keys of folders that dead saves have left: without metadata.json, and without a file newer than
    `older_than_s`."""
    newest: dict[str, float] = {}
    complete: set[str] = set()
    for entry in store.iterate_sync(prefix):
        folder, _, name = entry.key.rpartition("/")
        if name == METADATA:
            complete.add(folder)
        newest[folder] = max(newest.get(folder, 0.0), entry.modified_at)
    limit = time.time() - older_than_s
    return sorted(key for key, modified_at in newest.items() if key and key not in complete and modified_at <= limit)


def sweep_incomplete_sync(store: Store, older_than_s: float, prefix: str = "") -> list[str]:
    """Remove what dead saves have left. Returns the keys. `older_than_s` must exceed the longest save."""
    incomplete = find_incomplete_sync(store, older_than_s, prefix)
    for key in incomplete:
        for entry in _files_of(store, key):
            store.delete_sync(entry.key)
    return incomplete


# ---- the same for coroutines


async def write_checkpoint(
    store: Store, key: str, files: Mapping[str, bytes | Path], metadata: Mapping[str, Any]
) -> Manifest:
    return await asyncio.to_thread(write_checkpoint_sync, store, key, files, metadata)


async def read_manifest(store: Store, key: str) -> Manifest:
    return await asyncio.to_thread(read_manifest_sync, store, key)


async def read_checkpoint(store: Store, key: str, verify: bool = True) -> tuple[dict[str, Any], dict[str, bytes]]:
    return await asyncio.to_thread(read_checkpoint_sync, store, key, verify)


async def verify_checkpoint(store: Store, key: str) -> Manifest:
    return await asyncio.to_thread(verify_checkpoint_sync, store, key)


async def copy_checkpoint(store: Store, source: str, target: str) -> Manifest:
    return await asyncio.to_thread(copy_checkpoint_sync, store, source, target)


async def delete_checkpoint(store: Store, key: str) -> None:
    await asyncio.to_thread(delete_checkpoint_sync, store, key)


async def list_checkpoints(store: Store, prefix: str = "") -> list[str]:
    return await asyncio.to_thread(list_checkpoints_sync, store, prefix)


async def sweep_incomplete(store: Store, older_than_s: float, prefix: str = "") -> list[str]:
    return await asyncio.to_thread(sweep_incomplete_sync, store, older_than_s, prefix)


# ---- parts


def file_info(data: bytes | Path) -> FileInfo:
    if isinstance(data, Path):
        with open(data, "rb") as file:
            return FileInfo(data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())


def _read_file(store: Store, key: str, name: str, info: FileInfo, verify: bool) -> bytes:
    try:
        data = store.get_sync(f"{key}/{name}")
    except NotFound as error:
        raise _missing(key, name) from error
    if verify:
        _compare(key, name, info, file_info(data))
    return data


def _compare(key: str, name: str, expected: FileInfo, actual: FileInfo) -> None:
    if actual != expected:
        raise CorruptedCheckpoint(
            f"The checkpoint {key} is damaged: {name} has {actual.num_bytes} bytes with SHA-256 {actual.sha256}, "
            f"recorded are {expected.num_bytes} bytes with {expected.sha256}. Use an earlier checkpoint."
        )


def _missing(key: str, name: str) -> CorruptedCheckpoint:
    return CorruptedCheckpoint(f"The checkpoint {key} is damaged: {name} is missing. Use an earlier checkpoint.")


def _files_of(store: Store, key: str) -> list[Entry]:
    """The files directly in the folder `key`; folders below it are other checkpoints."""
    return [entry for entry in store.list_sync(key) if entry.key.rpartition("/")[0] == key]


def encode_manifest(manifest: Manifest) -> bytes:
    content = msgspec.to_builtins(manifest)
    return json.dumps({"checksum": _checksum(content), **content}, indent=1, sort_keys=True, allow_nan=False).encode()


def decode_manifest(key: str, data: bytes) -> Manifest:
    """Decode the bytes of metadata.json. Raises `CorruptedCheckpoint`."""
    try:
        content = json.loads(data)
        expected = content.pop("checksum")
        actual = _checksum(content)
        if actual != expected:
            raise CorruptedCheckpoint(
                f"The checkpoint {key} is damaged: {METADATA} has checksum {actual}, recorded is {expected}. "
                "Use an earlier checkpoint."
            )
        manifest = msgspec.convert(content, Manifest)
    except (ValueError, KeyError, AttributeError, msgspec.ValidationError) as error:
        raise CorruptedCheckpoint(f"The checkpoint {key} is damaged: {METADATA} cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise StorageError(f"The checkpoint {key} has format {manifest.format}; this server reads format {FORMAT}.")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
