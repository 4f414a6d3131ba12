"""Exports that only their recipients can read: the age format (age-encryption.org), by pyrage.

Recipients are native X25519 keys (`age1…`) or SSH public keys. pyrage is imported where it is needed: most servers
never encrypt.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tx_async.errors import InvalidRequest

SUFFIX = ".age"
RECIPIENTS_MAX = 10
HEADS = (b"age-encryption.org/", b"-----BEGIN AGE ENCRYPTED FILE-----")
SHOWN = 8
PRIVATE_KEYS = ("AGE-SECRET-KEY", "PRIVATE KEY")
"""What age's and SSH's private keys say of themselves, in capitals."""


def check_recipients(recipients: Sequence[str]) -> tuple[str, ...]:
    """Returns the recipients. Raises `InvalidRequest` naming the place of the one that is wrong, from 0."""
    if len(recipients) > RECIPIENTS_MAX:
        raise InvalidRequest(f"age_encryption_recipients has {len(recipients)} entries; at most {RECIPIENTS_MAX}.")
    pyrage = _pyrage()
    for place, recipient in enumerate(recipients):
        if any(mark in recipient.upper() for mark in PRIVATE_KEYS):
            raise InvalidRequest(
                f"age_encryption_recipients[{place}] is a private key, which must stay yours: send the public one, "
                "age1… or ssh-…."
            )
        try:
            _parse(recipient)
        except pyrage.RecipientError:
            raise InvalidRequest(
                f"age_encryption_recipients[{place}], {_start(recipient)}, is not a recipient: send a public key, "
                "age1… or ssh-…."
            ) from None
    return tuple(recipients)


def encrypted(files: Mapping[str, bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """Every file as `NAME.age`, encrypted for all recipients; unchanged files when there are none."""
    if not recipients:
        return dict(files)
    keys = [_parse(recipient) for recipient in recipients]
    pyrage = _pyrage()
    return {name + SUFFIX: pyrage.encrypt(data, keys) for name, data in files.items()}


def encrypted_file(folder: Path, names: Sequence[str]) -> str:
    """The first of these files that is there only encrypted, with or without its suffix; else an empty string."""
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                if file.read(64).startswith(HEADS):
                    return name
        elif (folder / (name + SUFFIX)).is_file():
            return name + SUFFIX
    return ""


def _parse(recipient: str) -> Any:
    """Raises `pyrage.RecipientError`, whose message may hold the recipient."""
    pyrage = _pyrage()
    kind = pyrage.ssh.Recipient if recipient.startswith("ssh-") else pyrage.x25519.Recipient
    return kind.from_str(recipient)


def _start(recipient: str) -> str:
    """Enough to recognise an entry by. The rest may be a secret, and messages are stored and logged."""
    return repr(recipient[:SHOWN]) + ("…" if len(recipient) > SHOWN else "")


def _pyrage() -> Any:
    """Import pyrage: a compiled module, whose names type checkers do not see, and which not every server needs."""
    return importlib.import_module("pyrage")
