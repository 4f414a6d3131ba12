"""The file of API keys, as a running server reads it: additions and revocations count from the next request on.

One key a line: `<sha256 of the key> <name>`, then `name=value` pairs about it. `#` begins a comment::

    9f86d081…  alice
    60303ae2…  bob's laptop  role=admin expires=2027-01-01T00:00:00Z added=2026-11-28T02:00:00Z owner=owner-3bf1…
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from msgspec import Struct

from tx_async.errors import ConfigError

HASH_DIGITS = 64
ID_DIGITS = 8
"""The first digits of a key's hash, this many of them, are its id in listings."""
_PAIRS = ("role", "expires", "added", "owner")

Role = Literal["user", "admin"]
ROLES: tuple[Role, ...] = ("user", "admin")
Keys = Mapping[str, "Key"]
"""Keys by their hash."""

_log = logging.getLogger(__name__)


class Key(Struct, frozen=True, kw_only=True):
    """A registered key; the key itself is never kept."""

    digest: str
    name: str
    role: Role = "user"
    """An admin also sees metrics from other machines, all runs, and the whole audit log."""
    expires_at: float | None = None
    """Seconds since the epoch; None = never."""
    added_at: float | None = None
    owner: str = ""
    """The owner under which its records lie (`owner.owner_of`); "" where a line was written by hand."""

    @property
    def key_id(self) -> str:
        return self.digest[:ID_DIGITS]

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


def read_keys(path: str | Path) -> dict[str, Key]:
    """Every registered key by its hash. Raises `ConfigError` naming the line that is wrong."""
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {error}") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if text := line.split("#", 1)[0].strip():
            key = _parse(text, f"{path}, line {number}")
            keys[key.digest] = key
    return keys


def format_line(key: Key) -> str:
    pairs = {
        "role": key.role if key.role != "user" else "",
        "expires": format_time(key.expires_at),
        "added": format_time(key.added_at),
        "owner": key.owner,
    }
    return " ".join([key.digest, key.name, *(f"{name}={value}" for name, value in pairs.items() if value)])


def format_time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def is_pair(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name in _PAIRS


def _parse(text: str, where: str) -> Key:
    digest, *words = text.split()
    if len(digest) != HASH_DIGITS or set(digest) - set("0123456789abcdef"):
        raise ConfigError(f"{where}: a line is `<sha256 of the key> <name>`.")
    pairs: dict[str, str] = {}
    while words and is_pair(words[-1]):
        name, _, value = words.pop().partition("=")
        pairs[name] = value
    if pairs.get("role", "user") not in ROLES:
        raise ConfigError(f"{where}: role is {pairs['role']!r}; it must be user or admin.")
    return Key(
        digest=digest,
        name=" ".join(words),
        role="admin" if pairs.get("role") == "admin" else "user",
        expires_at=_time(pairs.get("expires"), where),
        added_at=_time(pairs.get("added"), where),
        owner=pairs.get("owner", ""),
    )


def _time(text: str | None, where: str) -> float | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a time: write 2027-01-01 or 2027-01-01T12:00:00Z.") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


class KeyFile:
    """The keys that a file lists now. It is checked at each request (one `stat`), and read when it has changed.

    A file that cannot be read, or has a wrong line, changes nothing: the keys stay as they were, and the log says why.
    """

    def __init__(self, path: str, on_change: Callable[[Keys, Keys], None] = lambda before, after: None):
        """Raises `ConfigError` when it cannot be read now. on_change: called with the keys before and after."""
        self.path = Path(path).expanduser()
        self.on_change = on_change
        #: the state of the file that was last read, or could not be read; None when there was none
        self._seen = self._signature()
        self._keys = read_keys(self.path)

    def __repr__(self) -> str:
        return f"<KeyFile {self.path} [{len(self._keys)} keys]>"

    def current(self) -> Keys:
        if (signature := self._signature()) != self._seen:
            self._seen = signature
            self._read()
        return self._keys

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> None:
        try:
            keys = read_keys(self.path)
        except ConfigError as error:
            _log.error("The API keys stay as they were: %s", error.message)
            return
        before, self._keys = self._keys, keys
        added = [key.name for digest, key in keys.items() if digest not in before]
        revoked = [key.name for digest, key in before.items() if digest not in keys]
        _log.info("API keys: %d now; added: %s; revoked: %s", len(keys), _listed(added), _listed(revoked))
        self.on_change(before, keys)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
