"""Download links: they carry their own permission, because the programs that follow them send no API key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

import msgspec

from tx_async.errors import NotFound
from tx_async.wire.records import CheckpointRecord, SessionRecord

LINK_LIFETIME_S = 3600
_SIGNATURE_BYTES = 16


class Permission(msgspec.Struct, frozen=True, array_like=True):
    """Permission to read the files of one checkpoint, or the trace of one session: of the one that had this name then,
    not of a later one."""

    path: str
    """Or a session_id, which differs from every path."""
    storage_key: str
    """Empty for a session."""
    created_at: float
    expires_at: float
    key_mark: bytes = b""
    """The mark of the key that asked for it: the link ends with that key."""

    def is_for(self, record: CheckpointRecord | SessionRecord) -> bool:
        return _identity(record) == (self.path, self.storage_key, self.created_at)


def _identity(record: CheckpointRecord | SessionRecord) -> tuple[str, str, float]:
    return record.key, getattr(record, "storage_key", ""), record.created_at


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Permission).decode


class Links:
    """Signs with a secret of this process: a restart ends all links, and the client asks for new ones."""

    def __init__(self, secret: bytes | None = None):
        self._secret = secret or secrets.token_bytes(32)

    def token(self, record: CheckpointRecord | SessionRecord, expires_at: float, key_digest: str = "") -> str:
        """Permission to read what belongs to a record until `expires_at`, safe in a URL. key_digest: the hash of the
        key that asks for it."""
        mark = self.mark_of(key_digest)
        text = _encode(Permission(*_identity(record), expires_at, mark))
        return base64.urlsafe_b64encode(self._sign(text) + text).decode().rstrip("=")

    def permission(self, token: str, now: float) -> Permission:
        """What a token permits. Raises `NotFound` for a forged or expired one."""
        try:
            data = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except (binascii.Error, ValueError):
            raise NotFound("This download link is not valid.") from None
        signature, text = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(text)):
            raise NotFound("This download link is not valid here; ask for a new one.")
        permission = _decode(text)
        if permission.expires_at < now:
            raise NotFound("This download link has expired; ask for a new one.")
        return permission

    def mark_of(self, key_digest: str) -> bytes:
        """The mark of a key that a link may carry: whoever sees the link learns nothing about the registry."""
        return self._sign(b"key " + key_digest.encode())

    def _sign(self, text: bytes) -> bytes:
        return hmac.digest(self._secret, text, hashlib.sha256)[:_SIGNATURE_BYTES]
