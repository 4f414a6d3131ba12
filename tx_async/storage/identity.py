"""The identity that a storage carries: a number drawn once, to which everything stored there belongs.

It travels with the storage, so a folder that was moved or a bucket that was renamed with its content is still the same.
"""

from __future__ import annotations

import json
import secrets
import time

from tx_async.errors import NotFound
from tx_async.storage.store import IDENTITY, Store

FORMAT = 1


def ensure_identity_sync(store: Store) -> str:
    """The storage's own identity, or a new one where there is none yet. Raises `StorageError`."""
    try:
        return store.identity_sync()
    except NotFound:
        identity = {"created_at": time.time(), "format": FORMAT, "storage_id": secrets.token_hex(16)}
        store.create_sync(IDENTITY, json.dumps(identity, indent=1).encode())
        return store.identity_sync()
