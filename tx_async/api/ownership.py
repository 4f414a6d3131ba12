"""What belongs to another tenant does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.errors import NotFound, UnknownCheckpoint
from tx_async.wire.records import CheckpointRecord


class Owned(Protocol):
    @property
    def owner(self) -> str: ...


R = TypeVar("R", bound=Owned)


def owned(records: Mapping[str, R], key: str, owner: str, missing: type[NotFound]) -> R:
    """The owner's own record. Raises `missing` for an unknown key and for a record of somebody else alike."""
    record = records.get(key)
    if record is None or record.owner != owner:
        raise missing()
    return record


def readable_checkpoint(call: Call, path: str) -> CheckpointRecord:
    """The caller's own checkpoint, or a published one. Raises `InvalidRequest`, `UnknownCheckpoint`."""
    checkpoint = call.scheduler.checkpoints.get(validation.tinker_path(path))
    if checkpoint is None or (checkpoint.owner != call.owner and not checkpoint.public):
        raise UnknownCheckpoint()
    return checkpoint
