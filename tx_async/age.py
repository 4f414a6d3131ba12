"""Exports that only their recipients can read: the age format (age-encryption.org), by pyrage.

Recipients are native X25519 keys (`age1…`) or SSH public keys. pyrage is imported where it is needed: most servers
never encrypt.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from tx_async.errors import InvalidRequest

SUFFIX = ".age"
RECIPIENTS_MAX = 10


def check_recipients(recipients: Sequence[str]) -> tuple[str, ...]:
    """Returns the recipients. Raises `InvalidRequest` naming the one that is wrong."""
    if len(recipients) > RECIPIENTS_MAX:
        raise InvalidRequest(f"age_encryption_recipients has {len(recipients)} entries; at most {RECIPIENTS_MAX}.")
    for recipient in recipients:
        _parse(recipient)
    return tuple(recipients)


def encrypted(files: Mapping[str, bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """Every file as `NAME.age`, encrypted for all recipients; unchanged files when there are none."""
    if not recipients:
        return dict(files)
    keys = [_parse(recipient) for recipient in recipients]
    pyrage = _pyrage()
    return {name + SUFFIX: pyrage.encrypt(data, keys) for name, data in files.items()}


def _parse(recipient: str) -> Any:
    pyrage = _pyrage()
    kind = pyrage.ssh.Recipient if recipient.startswith("ssh-") else pyrage.x25519.Recipient
    try:
        return kind.from_str(recipient)
    except pyrage.RecipientError as error:
        raise InvalidRequest(f"age_encryption_recipients: {recipient[:200]!r} is not a recipient: {error}.") from None


def _pyrage() -> Any:
    """Import pyrage: a compiled module, whose names type checkers do not see, and which not every server needs."""
    return importlib.import_module("pyrage")
