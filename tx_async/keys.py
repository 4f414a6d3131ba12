"""`tx-async keys`: edits the file of API keys. `api/key_file.py` defines its lines and reads it.

A key is printed once, when it is made; the file holds its SHA-256. Every change replaces the file as a whole, so that a
server that reads it meanwhile sees the old file or the new one; a running server follows by itself.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock

from tx_async.api.key_file import ROLES, Key, Role, format_line, is_pair, read_keys
from tx_async.api.owner import hash_key, new_key, owner_of
from tx_async.errors import ConfigError
from tx_async.private import FILE_MODE, make_folder

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
LOCK_S = 10.0


def add(path: Path, name: str, role: Role = "user", expires_at: float | None = None) -> str:
    """Make a key, register its hash under `name`, return the key. Raises `ConfigError` for a taken or odd name."""
    if not name or name != " ".join(name.split()) or "#" in name or any(is_pair(word) for word in name.split()):
        raise ConfigError(
            f"{name!r} cannot name a key: use one line of words, without '#' and without pairs like role=…."
        )
    if role not in ROLES:
        raise ConfigError(f"role {role!r} is unknown; known: {', '.join(ROLES)}.")
    with _locked(path):
        keys = read_keys(path) if path.exists() else {}
        if name in (key.name for key in keys.values()):
            raise ConfigError(f"{path} has a key named {name!r} already: revoke it first, or choose another name.")
        key = new_key()
        registered = Key(
            digest=hash_key(key), name=name, role=role, expires_at=expires_at, added_at=time.time(), owner=owner_of(key)
        )
        _write(path, [*keys.values(), registered])
    return key


def listed(path: Path) -> list[Key]:
    return list(read_keys(path).values())


def revoke(path: Path, name_or_id: str) -> str:
    """Remove one key by its name or id; returns its name. Raises `ConfigError` when no key matches, or several do."""
    read_keys(path)  # make no lock file beside a file that is not there
    with _locked(path):
        keys = read_keys(path)
        meant = [key for key in keys.values() if name_or_id in (key.name, key.key_id, key.digest)]
        if len(meant) != 1:
            raise ConfigError(
                f"{path} has {len(meant)} keys called {name_or_id!r}; `tx-async keys list` shows them all."
            )
        _write(path, [key for key in keys.values() if key is not meant[0]])
    return meant[0].name


def parse_expiry(text: str, now: float) -> float:
    """Seconds since the epoch of `90d`, `12h`, a number of seconds, or a date or time in ISO's form (UTC unless it
    says otherwise). Raises `ConfigError`, also for one that has passed."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text):
        expires_at = now + float(match[1]) * _UNITS[match[2] or "s"]
    else:
        try:
            time = datetime.fromisoformat(text)
        except ValueError as error:
            raise ConfigError(f"--expires {text!r} is not a time: write 90d, 12h, or 2027-01-01T12:00:00Z.") from error
        expires_at = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    if expires_at <= now:
        raise ConfigError(f"--expires {text!r} has passed already.")
    try:
        datetime.fromtimestamp(expires_at, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"--expires {text!r} is later than any date: leave it out for a key without end.") from error
    return expires_at


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands that edit at the same time lose neither's change."""
    try:
        make_folder(path.parent)
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_S, mode=FILE_MODE):
            yield
    except (OSError, filelock.Timeout) as error:
        raise ConfigError(f"{path} cannot be changed: {error}") from error


def _write(path: Path, keys: Iterable[Key]) -> None:
    """Replace the file atomically; only its owner may read it."""
    lines = [
        "# API keys of a tx_async server: <sha256 of the key> <name> [role=…] [expires=…]",
        *map(format_line, keys),
    ]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".keys-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
