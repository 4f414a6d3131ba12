"""Decides which server serves a journal. Live state is in one server's memory, so a second one on the same journal must
refuse to start."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from tx_async.errors import JournalReplaced, LeaseHeld
from tx_async.private import FILE_MODE


class Holder(Struct, frozen=True, kw_only=True):
    instance: str
    """Drawn at random: two starts with the same process id are two holders."""
    host: str
    pid: int
    since: float
    """Seconds since the epoch."""

    @classmethod
    def this_process(cls) -> Holder:
        return cls(instance=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(), since=time.time())

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on host {self.host} since {since}"


class FileLock:
    """An operating-system lock on a file that names its holder.

    The kernel frees it with its last descriptor, so a dead holder needs no time-out, and process ids are never guessed
    at. The file stays: removing it would let two servers lock two files of one name.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, holder: Holder) -> None:
        """Raises `LeaseHeld` naming who has it, `OSError` when the file cannot be written."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, msgspec.json.encode(holder), 0)
        except BlockingIOError as error:
            other = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise held(self._path, _decode(other)) from error
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Files:
    """Whether a database's file, and its log, are still those that were opened. A file that was deleted or replaced
    goes on taking writes, for nobody."""

    def __init__(self, path: Path):
        self._paths = (path, path.with_name(path.name + "-wal"))
        #: path -> (device, inode)
        self._known: dict[Path, tuple[int, int]] = {}

    def opened(self) -> None:
        """Remember the files as they are now."""
        for path in self._paths:
            if (found := _identity(path)) is not None:
                self._known[path] = found

    def check(self) -> None:
        """Raises `JournalReplaced` when one of them is another file now, or gone."""
        for path, known in self._known.items():
            found = _identity(path)
            if found != known:
                what = "deleted" if found is None else "replaced"
                raise JournalReplaced(
                    f"{path} was {what} under this server. The server stops, because what it writes there is lost; put "
                    "the file back, or restore a backup, and start again."
                )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


class Fence(Struct):
    """What every commit verifies in its own transaction: that no other server has served the journal since this one
    opened it (`epoch`), and that the journal has all that this server has committed (`commits`)."""

    epoch: int = 0
    commits: int = 0
    """Transactions of this epoch that are durable."""

    def check(self, place: object, found: tuple[int, int] | None, holder: Holder | None) -> None:
        """found: (epoch, commits) in the journal; one commit more than ours is our own transaction whose answer was
        lost. Raises `LeaseHeld`, `JournalReplaced`."""
        if found is not None and found[0] > self.epoch:
            raise held(place, holder)
        if found is None or found[0] < self.epoch or found[1] not in (self.commits, self.commits + 1):
            there = f"{found[1]} of epoch {found[0]}" if found else "none"
            raise JournalReplaced(
                f"The journal {place} was replaced or set back under this server, which has made {self.commits} "
                f"commits of epoch {self.epoch}; there are {there}. The server stops; the next start takes up what is "
                "there."
            )


def held(where: object, holder: Holder | None) -> LeaseHeld:
    who = f"by {holder}" if holder else "by another process"
    return LeaseHeld(f"The journal {where} is in use {who}. Stop that server first, or set another database_url.")


def _decode(data: bytes) -> Holder | None:
    try:
        return msgspec.json.decode(data, type=Holder)
    except msgspec.DecodeError:
        return None
