"""Finds out whether a worker's host sees the storage that the server uses, or only a folder of the same name.

The server writes a word that nobody else can know before workers from other hosts may attach; each worker reads it
before it builds its engine. Each server keeps one small object for this.
"""

from __future__ import annotations

import hashlib
import secrets
import socket

from tx_async.errors import ConfigError, NotFound
from tx_async.storage.store import Store
from tx_async.wire.worker import StorageProbe

FOLDER = "probes"


async def write_probe(store: Store, server: str) -> StorageProbe:
    """server: a text that no other server of this host has. Raises `StorageError` where nothing can be written."""
    name = hashlib.sha256(f"{socket.gethostname()} {server}".encode()).hexdigest()[:16]
    probe = StorageProbe(f"{FOLDER}/{name}", secrets.token_hex(16))
    await store.put(probe.key, probe.word.encode())
    return probe


def check_probe(base: str, probe: StorageProbe) -> None:
    """Raises `ConfigError` where the server's `checkpoints_base` leads to another place, or to none."""
    try:
        found = Store(base).get_sync(probe.key)
    except NotFound:
        found = b""
    if found != probe.word.encode():
        raise ConfigError(
            f"On host {socket.gethostname()}, {base} is not the place that the server writes its checkpoints to. Set "
            "checkpoints_base to a folder that all hosts share, at the same path, or to object storage (s3://…)."
        )
