"""Checkpoint bytes by key: a local folder, `s3://`, `gs://`, `az://` (obstore), or `memory:///` for tests.

A put is atomic, and durable when it returns. Every verb comes twice: `…_sync` for worker threads, and a coroutine of
the same name for the server, which runs the first on a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import obstore
from msgspec import Struct
from obstore.store import LocalStore, ObjectStore, from_url

from tx_async.errors import ConfigError, NotFound, StorageError
from tx_async.private import make_folder
from tx_async.storage import local
from tx_async.storage.keys import check_key

CHUNK_BYTES = 8 * 2**20
"""Pieces in which large objects travel."""


class Entry(Struct, frozen=True):
    key: str
    num_bytes: int
    modified_at: float
    """Seconds since the epoch, by the storage's own clock."""


class Store:
    """One place of storage. It keeps no state: what is stored is what is listed."""

    def __init__(self, base: str | Path):
        self.base = str(base)
        #: the folder of a local store; None for all others
        self._folder = _local_folder(self.base)
        self._objects = _open(self.base, self._folder)

    def __repr__(self) -> str:
        return f"<Store {self.base}>"

    # ---- write

    def put_sync(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or the content of a file, under a key; what was there before is replaced."""
        self.put_many_sync({key: data})

    def put_many_sync(self, items: Mapping[str, bytes | Path]) -> None:
        """As `put_sync` for each item; cheaper on a local disk. Atomic for each key, not for all together."""
        for key in items:
            check_key(key)
        with _errors(self, "written", ", ".join(items)):
            if self._folder is not None:
                local.put_files(self._folder, items)
                return
            for key, data in items.items():
                obstore.put(self._objects, key, data, chunk_size=CHUNK_BYTES)

    def delete_sync(self, key: str) -> None:
        """Nothing happens when the key is not there."""
        check_key(key)
        with _errors(self, "deleted", key):
            try:
                obstore.delete(self._objects, key)
            except FileNotFoundError:
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

    def get_range_sync(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end of the object."""
        check_key(key)
        with _errors(self, "read", key):
            end = min(start + length, obstore.head(self._objects, key)["size"])
            if end <= start:
                return b""
            return obstore.get_range(self._objects, key, start=start, end=end).to_bytes()

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

    def download_sync(self, key: str, path: Path) -> None:
        """Write an object to a file, in pieces."""
        with open(path, "wb") as file:
            for chunk in self.stream_sync(key):
                file.write(chunk)

    def exists_sync(self, key: str) -> bool:
        check_key(key)
        with _errors(self, "read", key):
            try:
                obstore.head(self._objects, key)
            except FileNotFoundError:
                return False
            return True

    def iterate_sync(self, prefix: str = "") -> Iterator[Entry]:
        """Everything below `prefix/`, in no particular order, without holding all of it."""
        if prefix:
            check_key(prefix)
        with _errors(self, "listed", prefix):
            for page in obstore.list(self._objects, prefix or None):
                for found in page:
                    if not found["path"].startswith(f"{local.INCOMING}/"):
                        yield Entry(found["path"], found["size"], found["last_modified"].timestamp())

    def list_sync(self, prefix: str = "") -> list[Entry]:
        """Everything below `prefix/`, sorted by key."""
        return sorted(self.iterate_sync(prefix), key=lambda entry: entry.key)

    def size_sync(self, prefix: str = "") -> int:
        """Bytes of everything below `prefix/`."""
        return sum(entry.num_bytes for entry in self.iterate_sync(prefix))

    def remove_leftovers_sync(self, older_than_s: float) -> int:
        """Remove unfinished files and empty folders of writers that died; object stores keep none. Returns how many."""
        with _errors(self, "swept", local.INCOMING):
            return local.remove_leftovers(self._folder, older_than_s) if self._folder is not None else 0

    # ---- the same for coroutines

    async def put(self, key: str, data: bytes | Path) -> None:
        await asyncio.to_thread(self.put_sync, key, data)

    async def put_many(self, items: Mapping[str, bytes | Path]) -> None:
        await asyncio.to_thread(self.put_many_sync, items)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    async def delete_prefix(self, prefix: str) -> int:
        return await asyncio.to_thread(self.delete_prefix_sync, prefix)

    async def copy(self, source: str, target: str) -> None:
        await asyncio.to_thread(self.copy_sync, source, target)

    async def get(self, key: str) -> bytes:
        return await asyncio.to_thread(self.get_sync, key)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        return await asyncio.to_thread(self.get_range_sync, key, start, length)

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.exists_sync, key)

    async def list(self, prefix: str = "") -> list[Entry]:
        return await asyncio.to_thread(self.list_sync, prefix)

    async def list_keys(self, prefix: str = "") -> list[str]:
        """Of everything below `prefix/`, sorted."""
        return [entry.key for entry in await self.list(prefix)]

    async def remove_leftovers(self, older_than_s: float) -> int:
        return await asyncio.to_thread(self.remove_leftovers_sync, older_than_s)

    async def size(self, prefix: str = "") -> int:
        return await asyncio.to_thread(self.size_sync, prefix)


def _local_folder(base: str) -> Path | None:
    if base.startswith("file://"):
        return Path(base.removeprefix("file://")).absolute()
    return None if "://" in base else Path(base).expanduser().absolute()


def _open(base: str, folder: Path | None) -> ObjectStore:
    try:
        if folder is not None:
            make_folder(folder)
            return LocalStore(folder, automatic_cleanup=True)
        return from_url(base)
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise ConfigError(f"checkpoints_base {base!r} cannot be used: {_first_line(error)}") from error


@contextmanager
def _errors(store: Store, verb: str, what: str) -> Iterator[None]:
    """The libraries' errors in our own terms."""
    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        if isinstance(error, FileNotFoundError) and verb in ("read", "copied"):
            raise NotFound(f"Nothing is stored under {what}.") from error
        raise StorageError(f"{what} could not be {verb} in {store.base}: {_first_line(error)}") from error


def _sync_if_there(folder: Path) -> None:
    """The last deletion in a folder removes the folder."""
    if os.path.isdir(folder):
        local.sync_folder(folder)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
