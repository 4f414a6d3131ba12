"""The file of API keys, edited: `tx-async keys`. `api/owner.py` says what its lines look like and reads it.

A key is printed once, when it is made; the file holds its SHA-256. Every change replaces the file as a whole, so that a
server that reads it meanwhile sees the old file or the new one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tx_async.api.owner import hash_key, new_key, read_registry
from tx_async.errors import ConfigError

ID_DIGITS = 8
"""So much of a key's hash is its id in listings."""


def add(path: Path, name: str) -> str:
    """Make a key, register its hash under `name`, return the key. Raises `ConfigError` for a taken or odd name."""
    if not name or name != name.strip() or any(char in name for char in "#\r\n"):
        raise ConfigError(f"{name!r} cannot name a key: use one line without '#' and without spaces around it.")
    registry = read_registry(str(path)) if path.exists() else {}
    if name in registry.values():
        raise ConfigError(f"{path} has a key named {name!r} already: revoke it first, or choose another name.")
    key = new_key()
    _write(path, registry | {hash_key(key): name})
    return key


def listed(path: Path) -> list[tuple[str, str]]:
    """(id, name) of every key."""
    return [(digest[:ID_DIGITS], name) for digest, name in read_registry(str(path)).items()]


def revoke(path: Path, name_or_id: str) -> str:
    """Remove one key by its name or id; returns its name. Raises `ConfigError` when none is meant, or several."""
    registry = read_registry(str(path))
    meant = [digest for digest, name in registry.items() if name_or_id in (name, digest[:ID_DIGITS], digest)]
    if len(meant) != 1:
        raise ConfigError(f"{path} has {len(meant)} keys called {name_or_id!r}; `tx-async keys list` shows them all.")
    name = registry.pop(meant[0])
    _write(path, registry)
    return name


def _write(path: Path, registry: dict[str, str]) -> None:
    """Replace the file atomically; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# API keys of a tx_async server: <sha256 of the key> <name>", *(f"{d} {n}" for d, n in registry.items())]
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
