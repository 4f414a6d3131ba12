"""The one folder in which a running server keeps what must not outlive it: its socket file and its arenas.

The owner holds a lock on the folder, which the kernel releases when the process ends, however that happens. A folder
that can be locked therefore belongs to nobody, and the next server removes it. (A process id alone would not do: ids
are reused, and containers that share /dev/shm do not share them. The folder's name contains it for people to read.)
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from tx_async.errors import ConfigError

SOCKET_PATH_CHARACTERS_MAX = 100
"""Unix sockets have room for 103 (macOS) or 107 (Linux) bytes."""


class RuntimeDirectory:
    """A folder of mode 0700, made on creation; `close` removes it with all that it holds."""

    def __init__(self, root: Path | None = None):
        self.root = root or default_root()
        remove_leftovers(self.root)
        name = f"{_prefix()}{os.getpid()}-{process_start(os.getpid())}-{secrets.token_hex(3)}"
        self.path = self.root / name
        if len(str(self.socket)) > SOCKET_PATH_CHARACTERS_MAX:
            raise ConfigError(f"{self.socket} is too long for a socket file: set TMPDIR to a shorter folder.")
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._num_arenas = 0

    @property
    def socket(self) -> Path:
        return self.path / "worker.sock"

    def new_arena_path(self) -> Path:
        self._num_arenas += 1
        return self.path / f"arena-{self._num_arenas}"

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def default_root() -> Path:
    """A folder in memory where the system has one, else the temporary folder."""
    shared_memory = Path("/dev/shm")
    if os.access(shared_memory, os.W_OK | os.X_OK):
        return shared_memory
    return Path(tempfile.gettempdir())


def remove_leftovers(root: Path) -> list[Path]:
    """Remove the folders of servers of this user that ended without doing so."""
    removed = []
    for folder in root.glob(f"{_prefix()}*"):
        if _belongs_to_nobody(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def process_start(pid: int) -> int:
    """When a process began, in clock ticks of the system; 0 where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _prefix() -> str:
    return f"tx_async-{os.getuid()}-"


def _belongs_to_nobody(folder: Path) -> bool:
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or _is_just_being_made(folder):
            return False
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_just_being_made(folder: Path) -> bool:
    """Between mkdir and lock, another server's folder looks deserted; usually the pid in its name tells."""
    pid, start = (int(part) for part in folder.name.removeprefix(_prefix()).split("-")[:2])
    return pid != os.getpid() and start != 0 and process_start(pid) == start
