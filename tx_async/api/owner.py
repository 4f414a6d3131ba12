"""Authentication. A tenant is its API key: what it makes belongs to the key's hash, and the key itself is never kept.

Without a registry any key will do, on loopback only (it has one user, or several who trust each other); with one, only
the keys whose hashes it lists do (`key_file.py`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from tx_async.api.key_file import Key, KeyFile, Keys
from tx_async.config import ServerConfig
from tx_async.errors import Forbidden, Unauthorized

KEY_PREFIX = "tml-"
"""The SDK refuses keys without this prefix."""


def new_key() -> str:
    """An API key of 256 random bits."""
    return KEY_PREFIX + secrets.token_hex(32)


def hash_key(key: str) -> str:
    """The hash of a key that the registry holds. Keys are random, so a plain hash is as hard to reverse as to guess."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def owner_of(key: str) -> str:
    """The name under which records belong to a key; it reveals nothing about the key, and is not the registry's
    hash."""
    return "owner-" + hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class Owners:
    """Turns an API key into an owner."""

    def __init__(self, keys: Callable[[], Keys] | None = None, now: Callable[[], float] = time.time):
        """keys: those valid at this moment; None accepts every key."""
        self._keys = keys
        self._now = now

    def __repr__(self) -> str:
        return "<Owners any key>" if self._keys is None else f"<Owners {len(self._keys())} keys>"

    def authenticate(self, key: str | None, reached_at: str = "") -> str:
        """The owner. reached_at: the server's own address on this connection, "" = none. Raises `Unauthorized`."""
        if self._keys is None:
            if is_address(reached_at) and not is_loopback(reached_at):
                raise Unauthorized(
                    "This server has no API keys and therefore answers on loopback only: its operator must set "
                    "api_keys_file (`tx-async keys add NAME` makes one)."
                )
        else:
            if not key:
                raise Unauthorized("This server needs an API key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.")
            registered = self._keys().get(hash_key(key))
            if registered is None:
                raise Unauthorized()
            if registered.has_expired(self._now()):
                raise Unauthorized("This API key has expired: ask the server's operator for a new one.")
        return owner_of(key or "")

    def require_admin(self, key: str | None, reached_at: str = "") -> None:
        """Raises `Unauthorized`, or `Forbidden` for a key of role user. Where there are no keys, everybody is an
        admin."""
        self.authenticate(key, reached_at)
        if self._keys is not None and not self.is_admin(key):
            raise Forbidden("This is for keys of role admin (`tx-async keys add NAME --role admin`).")

    def is_admin(self, key: str | None) -> bool:
        registered = self.find(key)
        return registered is not None and registered.role == "admin"

    def find(self, key: str | None) -> Key | None:
        """The registry's entry for a key; None where there is no registry."""
        return self._keys().get(hash_key(key or "")) if self._keys else None

    def current_digests(self) -> list[str] | None:
        """The hashes of the keys valid at this moment; None where every key is."""
        if self._keys is None:
            return None
        return [digest for digest, key in self._keys().items() if not key.has_expired(self._now())]

    def roles(self) -> dict[str, tuple[str, str]]:
        """owner -> (role, id) of its key, where the registry says so."""
        keys = self._keys().values() if self._keys else ()
        return {key.owner: (key.role, key.key_id) for key in keys if key.owner}

    def registered(self) -> list[Key]:
        return list(self._keys().values()) if self._keys else []

    def names(self) -> dict[str, str]:
        """owner -> name of its key, where the registry says so."""
        return {key.owner: key.name for key in self._keys().values() if key.owner} if self._keys else {}


def open_owners(config: ServerConfig) -> Owners:
    """Raises `ConfigError` when the key registry cannot be read."""
    return Owners(KeyFile(config.api_keys_file).current if config.api_keys_file else None)


def key_of(headers: Mapping[str, str]) -> str | None:
    """`X-API-Key`, as the SDK sends it, or `Authorization: Bearer`, as most other programs do."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else headers.get("x-api-key")


def reached_at(scope: MutableMapping[str, Any]) -> str:
    """The server's own address on this connection; "" = none."""
    return (scope.get("server") or ("", None))[0]


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.strip("[]")).is_loopback if is_address(host) else host == "localhost"


def is_address(host: str) -> bool:
    """A number, not a name: what a server finds in its own socket."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
