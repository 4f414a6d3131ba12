"""Who serves a journal. Live state is in one server's memory, so a second one on the same journal must refuse to
start.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from tx_async.errors import LeaseHeld
from tx_async.private import FILE_MODE


class Holder(Struct, frozen=True, kw_only=True):
    instance: str
    """Random: two starts of one process id are two holders."""
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


def held(where: object, holder: Holder | None) -> LeaseHeld:
    who = f"by {holder}" if holder else "by another process"
    return LeaseHeld(f"The journal {where} is in use {who}. Stop that server first, or set another database_url.")


def _decode(data: bytes) -> Holder | None:
    try:
        return msgspec.json.decode(data, type=Holder)
    except msgspec.DecodeError:
        return None
