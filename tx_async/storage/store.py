"""Checkpoint bytes by key: a local folder, `s3://`, `gs://`, `az://` (obstore), or `memory:///` for tests.

A put is atomic, and durable when it returns. A storage that carries another identity than the expected one, or none, is
away: a key that is not found there does not count as gone, and nothing is written to such a folder. Every verb comes
twice: `…_sync` for worker threads, and a coroutine of the same name for the server, which runs the first on a thread.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from msgspec import Struct
from obstore.store import LocalStore, ObjectStore, from_url

from tx_async.durable import sync_folder
from tx_async.errors import ConfigError, NotFound, StorageError
from tx_async.private import make_folder
from tx_async.storage import local
from tx_async.storage.keys import check_key

CHUNK_BYTES = 8 * 2**20
"""The size of the pieces in which large objects travel."""
IDENTITY = "identity.json"
"""The key of the object that says which storage this is."""
_CLOUD_OPTIONS: dict[str, Any] = {
    "retry_config": {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=20),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    },
}
"""Callers that can wait for a failed storage know for how long; here a call fails within half a minute."""


class Entry(Struct, frozen=True):
    key: str
    num_bytes: int
    modified_at: float
    """Seconds since the epoch, by the storage's own clock."""


class Store:
    """One place where bytes are stored. It keeps no state: what is stored is what is listed."""

    def __init__(self, base: str | Path, storage_id: str = ""):
        """storage_id: what the storage calls itself in `identity.json`; "" while that is not known. A local folder that
        is not there is made, unless it has an identity: then it is away."""
        self.base = str(base)
        self.storage_id = storage_id
        #: the folder of a local store; None for all others
        self._folder = local_folder(self.base)
        self._opened: ObjectStore | None = None
        if not storage_id:
            self._objects  # noqa: B018 - errors that the operator can mend are raised at once

    def __repr__(self) -> str:
        return f"<Store {self.base}>"

    @property
    def address(self) -> str:
        """For messages: the whole path of a folder, or the address."""
        return str(self._folder or self.base)

    @property
    def _objects(self) -> ObjectStore:
        if self._opened is None:
            self._opened = _open(self.base, self._folder, mkdir=not self.storage_id)
        return self._opened

    def identity_sync(self) -> str:
        """What the storage calls itself. Raises `NotFound` when it carries no identity, `StorageError` when it does not
        answer or its identity is damaged."""
        try:
            return str(json.loads(self.get_sync(IDENTITY))["storage_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{IDENTITY} in {self.address} is damaged: {error}") from error

    def confirm_sync(self) -> None:
        """Raises `StorageError` unless the storage is there and the expected one."""
        if not self.storage_id:
            return
        try:
            found = self.identity_sync()
        except NotFound:
            found = ""
        if found != self.storage_id:
            what = f"carries the identity {found}" if found else "is empty, or not mounted"
            raise StorageError(
                f"The storage {self.address} is away: it {what}; this server's carries {self.storage_id}."
            )

    # ---- write

    def put_sync(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or the content of a file, under a key; what was there before is replaced."""
        self.put_many_sync({key: data})

    def put_many_sync(self, items: Mapping[str, bytes | Path]) -> None:
        """Like `put_sync` for each item, but cheaper on a local disk. Atomic for each key, not for all together."""
        for key in items:
            check_key(key)
        with _errors(self, "written", ", ".join(items)):
            if self._folder is not None:
                self.confirm_sync()  # a mount point without its mount would accept everything, and hide it later
                local.put_files(self._folder, items)
                return
            for key, data in items.items():
                obstore.put(self._objects, key, data, chunk_size=CHUNK_BYTES)

    def create_sync(self, key: str, data: bytes) -> bool:
        """Store bytes unless the key is taken; then False. Of several writers exactly one succeeds."""
        check_key(key)
        with _errors(self, "written", key):
            try:
                obstore.put(self._objects, key, data, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            if self._folder is not None:
                local.sync_file(self._folder / key)
            return True

    def delete_sync(self, key: str) -> None:
        """Does nothing when the key is not there."""
        check_key(key)
        with _errors(self, "deleted", key):
            try:
                obstore.delete(self._objects, key)
            except FileNotFoundError:
                self.confirm_sync()
                return
            if self._folder is not None:
                _sync_if_there((self._folder / key).parent)

    def delete_prefix_sync(self, prefix: str) -> int:
        """Delete everything below `prefix/`. Returns the number of objects."""
        keys = [entry.key for entry in self.list_sync(prefix)]
        for key in keys:
            self.delete_sync(key)
        return len(keys)

    def copy_sync(self, source: str, target: str) -> None:
        """Raises `NotFound` when the source is not there."""
        check_key(source)
        check_key(target)
        with _errors(self, "copied", source):
            if self._folder is not None:
                local.put_files(self._folder, {target: self._folder / source})
            else:
                obstore.copy(self._objects, source, target)

    # ---- read

    def get_sync(self, key: str) -> bytes:
        """Raises `NotFound` when nothing is stored there."""
        check_key(key)
        with _errors(self, "read", key):
            if self._folder is not None:
                return (self._folder / key).read_bytes()
            return obstore.get(self._objects, key).bytes().to_bytes()

    def stream_sync(self, key: str) -> Iterator[bytes]:
        """The object in pieces of about `CHUNK_BYTES`."""
        check_key(key)
        with _errors(self, "read", key):
            for chunk in obstore.get(self._objects, key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """The object in pieces of about `CHUNK_BYTES`."""
        check_key(key)
        with _errors(self, "read", key):
            result = await obstore.get_async(self._objects, key)
            async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def iterate_sync(self, prefix: str = "") -> Iterator[Entry]:
        """Everything below `prefix/`, in no particular order, without holding all of it in memory."""
        if prefix:
            check_key(prefix)
        is_empty = True
        with _errors(self, "listed", prefix):
            for page in obstore.list(self._objects, prefix or None):
                for found in page:
                    if not found["path"].startswith(f"{local.INCOMING}/"):
                        is_empty = False
                        yield Entry(found["path"], found["size"], found["last_modified"].timestamp())
        if is_empty:
            self.confirm_sync()

    def list_sync(self, prefix: str = "") -> list[Entry]:
        """Everything below `prefix/`, sorted by key."""
        return sorted(self.iterate_sync(prefix), key=lambda entry: entry.key)

    def remove_leftovers_sync(self, older_than_s: float) -> int:
        """Remove unfinished files and empty folders of dead writers; object stores keep none. Returns how many."""
        with _errors(self, "swept", local.INCOMING):
            return local.remove_leftovers(self._folder, older_than_s) if self._folder is not None else 0

    # ---- the same for coroutines

    async def put(self, key: str, data: bytes | Path) -> None:
        await asyncio.to_thread(self.put_sync, key, data)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    async def delete_prefix(self, prefix: str) -> int:
        return await asyncio.to_thread(self.delete_prefix_sync, prefix)

    async def copy(self, source: str, target: str) -> None:
        await asyncio.to_thread(self.copy_sync, source, target)

    async def get(self, key: str) -> bytes:
        return await asyncio.to_thread(self.get_sync, key)

    async def list(self, prefix: str = "") -> list[Entry]:
        return await asyncio.to_thread(self.list_sync, prefix)

    async def list_keys(self, prefix: str = "") -> list[str]:
        """The keys of everything below `prefix/`, sorted."""
        return [entry.key for entry in await self.list(prefix)]

    async def remove_leftovers(self, older_than_s: float) -> int:
        return await asyncio.to_thread(self.remove_leftovers_sync, older_than_s)


def local_folder(base: str) -> Path | None:
    """The folder that a base names; None for object storage."""
    if base.startswith("file://"):
        return Path(base.removeprefix("file://")).absolute()
    return None if "://" in base else Path(base).expanduser().absolute()


def _open(base: str, folder: Path | None, mkdir: bool) -> ObjectStore:
    """Raises `ConfigError`, or `StorageError` for a folder that was there before."""
    try:
        if folder is not None:
            if mkdir:
                make_folder(folder)
            return LocalStore(folder, automatic_cleanup=True)
        return from_url(base) if base.startswith("memory:") else from_url(base, **_CLOUD_OPTIONS)
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        if not mkdir and folder is not None:
            raise StorageError(f"The storage {folder} is away: {_first_line(error)}") from error
        raise ConfigError(f"checkpoints_base {base!r} cannot be used: {_first_line(error)}") from error


@contextmanager
def _errors(store: Store, verb: str, what: str) -> Iterator[None]:
    """Translates the libraries' errors into our own."""
    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        if isinstance(error, FileNotFoundError) and verb in ("read", "copied"):
            if what != IDENTITY:
                store.confirm_sync()
            raise NotFound(f"Nothing is stored under {what}.") from error
        raise StorageError(f"{what} could not be {verb} in {store.base}: {_first_line(error)}") from error


def _sync_if_there(folder: Path) -> None:
    """The last deletion in a folder removes the folder."""
    if os.path.isdir(folder):
        sync_folder(folder)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
