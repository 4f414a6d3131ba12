"""Who is asking. A tenant is its API key: what it makes belongs to the key's hash, and the key itself is never kept.

Without a registry any key will do, on loopback only (it has one user, or several who trust each other); with one, only
the keys whose hashes it lists do. The file has one key a line, `<hash> <name>`; `#` begins a comment.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Mapping
from pathlib import Path

from tx_async.errors import ConfigError, Unauthorized

KEY_PREFIX = "tml-"
"""The SDK refuses keys that begin otherwise."""
HASH_DIGITS = 64


def new_key() -> str:
    """An API key of 256 random bits."""
    return KEY_PREFIX + secrets.token_hex(32)


def hash_key(key: str) -> str:
    """What the registry holds of a key. Keys are random, so a plain hash is as hard to reverse as to guess."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def owner_of(key: str) -> str:
    """The name under which records belong to a key; it reveals nothing of it, and is no registry hash."""
    return "owner-" + hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def read_registry(path: str) -> dict[str, str]:
    """hash -> name of every registered key. Raises `ConfigError` naming the line that is wrong."""
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {error}") from error
    registry: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.split("#", 1)[0].strip().partition(" ")
        if not digest:
            continue
        if len(digest) != HASH_DIGITS or set(digest) - set("0123456789abcdef"):
            raise ConfigError(f"{path}, line {number}: a line is `<sha256 of the key> <name>`.")
        registry[digest] = name.strip()
    return registry


class Owners:
    """Turns the X-API-Key header into an owner."""

    def __init__(self, registry: Mapping[str, str] | None = None):
        #: hash -> name of the accepted keys; None accepts every key
        self._registry = registry

    def __repr__(self) -> str:
        return "<Owners any key>" if self._registry is None else f"<Owners {len(self._registry)} keys>"

    def authenticate(self, key: str | None, reached_at: str = "") -> str:
        """The owner. reached_at: the server's own address on this connection, "" = none. Raises `Unauthorized`."""
        if self._registry is None:
            if is_address(reached_at) and not is_loopback(reached_at):
                raise Unauthorized(
                    "This server has no API keys and therefore answers on loopback only: its operator must set "
                    "api_keys_file (`tx-async keys add NAME` makes one)."
                )
        elif not key or hash_key(key) not in self._registry:
            raise Unauthorized()
        return owner_of(key or "")

    def name_of(self, key: str | None) -> str:
        """How the registry calls a key."""
        return (self._registry or {}).get(hash_key(key or ""), "")


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.strip("[]")).is_loopback if is_address(host) else host == "localhost"


def is_address(host: str) -> bool:
    """A number, not a name: what a server finds in its own socket."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
