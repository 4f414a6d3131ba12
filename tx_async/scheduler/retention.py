"""What may be forgotten, by named limits. Pure: the catalog in, changes out."""

from __future__ import annotations

from collections.abc import Container

from msgspec import Struct

from tx_async.scheduler.catalog import Catalog
from tx_async.wire.records import Change, Delete


class Limits(Struct, frozen=True, kw_only=True):
    result_retention_s: float
    session_retention_s: float


class Forgotten(Struct, frozen=True):
    changes: tuple[Change, ...]
    storage_keys: tuple[str, ...]
    """Files that may be deleted once the changes are durable, unless something else names them."""


def expired(catalog: Catalog, needed: Container[str], limits: Limits, now: float) -> Forgotten:
    """`needed`: request ids that a training run may have to replay."""
    changes: list[Change] = []
    keys: list[str] = []
    for request_id, result in catalog.results.items():
        if now - result.finished_at > limits.result_retention_s and request_id not in needed:
            changes += [Delete("result", request_id), Delete("request", request_id)]
    for checkpoint in catalog.checkpoints.values():
        if checkpoint.expires_at is not None and checkpoint.expires_at <= now:
            changes.append(Delete("checkpoint", checkpoint.path))
            keys.append(checkpoint.storage_key)
    old = {
        session.session_id
        for session in catalog.sessions.values()
        if session.status != "active" and now - session.created_at > limits.session_retention_s
    }
    for sampler in catalog.samplers.values():
        if sampler.session_id in old:
            changes.append(Delete("sampler", sampler.sampler_id))
            if sampler.storage_key:
                keys.append(sampler.storage_key)
    changes += [Delete("session", session_id) for session_id in old]
    return Forgotten(tuple(changes), tuple(keys))
