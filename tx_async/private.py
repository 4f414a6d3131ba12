"""Keeps a server's data private to its user: files 0600, folders 0700, whatever the umask of the shell that started it.

The umask of the process covers what libraries write; code that must not depend on it uses `opener` and `make_folder`.
`close_folder` closes data of earlier releases, and folders that were made by hand.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tx_async.config import ServerConfig
from tx_async.errors import ConfigError

UMASK = 0o077
FILE_MODE = 0o600
FOLDER_MODE = 0o700
_OTHERS = 0o077

_log = logging.getLogger(__name__)


@contextmanager
def private_umask() -> Iterator[None]:
    """Files that this process, and processes that it starts, make in this context are private to its user."""
    before = os.umask(UMASK)
    try:
        yield
    finally:
        os.umask(before)


def opener(path: str, flags: int) -> int:
    """For `open(…, opener=opener)`: a file that it creates is private from its first moment."""
    return os.open(path, flags, FILE_MODE)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents; each is private."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


def check_writable(folder: Path, setting: str) -> None:
    """Raises `ConfigError` unless a file can be written in `folder`, or in the nearest of its parents where it has not
    been made yet. The file never has a name where the system can do without, and is gone at once where not."""
    nearest = folder.absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"1")
    except OSError as error:
        raise _unwritable(folder, setting, error) from error


def make_writable_folder(folder: Path, setting: str) -> None:
    """Make a folder in which files can be written. Raises `ConfigError`."""
    try:
        make_folder(folder)
    except OSError as error:
        raise _unwritable(folder, setting, error) from error
    check_writable(folder, setting)


def _unwritable(folder: Path, setting: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{setting} {folder} cannot be made or written on host {socket.gethostname()}: {error.strerror or error}. Name "
        "a folder that this user can write to."
    )


def close_data(config: ServerConfig) -> None:
    """Close whatever an earlier release, or somebody by hand, has left open of the data that this server keeps."""
    journal = config.sqlite_file or config.data_path / "tx_async.db"
    close_folder(config.data_path, journal.parent.glob(f"{journal.name}*"))
    for place in (config.resolved_checkpoints_base, config.resolved_compilation_cache_dir):
        if "://" not in place:
            folder = Path(place).expanduser()
            close_folder(folder, folder.glob("*"))


def close_folder(folder: Path, contents: Iterable[Path] = ()) -> None:
    """Make a folder of ours private, with `contents` and everything below them; warn where that is not permitted.

    The folder comes first, because then nobody can reach its content. A folder that programs share (sticky, the root of
    the file system, a home) is left as it is.
    """
    if _is_shared(folder):
        _log.warning("%s is a folder for other things, too: its mode is left as it is", folder)
    elif not _close(folder):
        return
    for path in contents:
        for entry in _below(path):
            _close(entry)


def _is_shared(folder: Path) -> bool:
    try:
        is_sticky = bool(folder.stat().st_mode & stat.S_ISVTX)
    except OSError:
        return False
    return is_sticky or folder.absolute() in (Path("/"), Path.home())


def _close(path: Path) -> bool:
    """Make one path private. Returns whether it was open."""
    try:
        mode = stat.S_IMODE(path.stat(follow_symlinks=False).st_mode)
        if path.is_symlink() or not mode & _OTHERS:
            return False
        path.chmod(mode & ~_OTHERS)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("%s can be read by others, and its mode cannot be changed: %s", path, error.strerror)
        return False
    return True


def _below(path: Path) -> Iterator[Path]:
    """The path itself, and everything below it."""
    if path.is_symlink():
        return
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder) / name for name in (*folders, *files))
