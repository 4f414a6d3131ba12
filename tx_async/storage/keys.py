"""Keys of stored objects: parts joined by "/", relative to the store's base, and unable to leave it."""

from __future__ import annotations

from tx_async.errors import InvalidRequest

KEY_BYTES_MAX = 1_024
"""S3's limit for a whole key."""
PART_BYTES_MAX = 255
"""A file system's limit for one name."""
_FORBIDDEN = frozenset("\\#")
"""Separators of other systems, and the mark of obstore's own temporary files."""


def check_key(key: str) -> str:
    """Returns the key. Raises `InvalidRequest` for one that is absolute, has empty, hidden or parent parts, or is too
    long."""
    reason = _objection(key)
    if reason:
        raise InvalidRequest(f"The storage key {key!r} is not allowed: {reason}.")
    return key


def _objection(key: str) -> str:
    if not key.isprintable() or _FORBIDDEN & set(key):
        return "it contains a control character, a backslash or a #"
    if len(key.encode(errors="replace")) > KEY_BYTES_MAX:
        return f"it is longer than {KEY_BYTES_MAX} bytes"
    for part in key.split("/"):
        if not part:
            return "it has an empty part"
        if part.startswith("."):
            return "a part begins with a dot"
        if len(part.encode(errors="replace")) > PART_BYTES_MAX:
            return f"a part is longer than {PART_BYTES_MAX} bytes"
    return ""
