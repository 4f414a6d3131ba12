"""RestClient's reads and writes of training runs and checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import msgspec

from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.api.ownership import owned
from tx_async.errors import InvalidRequest, UnknownCheckpoint, UnknownTrainingRun
from tx_async.wire import tinker
from tx_async.wire.records import CheckpointRecord, ModelRecord

PAGE_MAX = 1000

_TYPES: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
T = TypeVar("T")


# ---- training runs


async def list_training_runs(call: Call) -> tinker.TrainingRunsResponse:
    """The caller's runs, most recently used first."""
    checkpoints, scope, project_id = _by_run(call), access_scope(call), call.query("project_id")
    models = [m for m in call.scheduler.models.values() if _may_read(call, m, scope, checkpoints[m.model_id])]
    if project_id:
        models = [model for model in models if _project_of(call, model) == project_id]
    models.sort(key=lambda model: (model.last_request_at or model.created_at, model.model_id), reverse=True)
    page, cursor = paginate(call, models, limit_default=20)
    runs = [_training_run(model, checkpoints[model.model_id]) for model in page]
    return tinker.TrainingRunsResponse(training_runs=runs, cursor=cursor)


async def get_training_run(call: Call) -> tinker.TrainingRun:
    model = readable_run(call)
    return _training_run(model, _by_run(call)[model.model_id])


def readable_run(call: Call) -> ModelRecord:
    """The run that the path names. Raises `UnknownTrainingRun` also for one that the caller may not read."""
    model = call.scheduler.models.get(call.path("run"))
    checkpoints, scope = _by_run(call)[call.path("run")], access_scope(call)
    if model is None or not _may_read(call, model, scope, checkpoints):
        raise UnknownTrainingRun()
    return model


def _by_run(call: Call) -> defaultdict[str, list[CheckpointRecord]]:
    """The checkpoints that the caller may read, by run: one pass for all runs of an answer."""
    found: defaultdict[str, list[CheckpointRecord]] = defaultdict(list)
    for checkpoint in call.scheduler.checkpoints.values():
        if checkpoint.owner == call.owner or checkpoint.public or call.is_admin:
            found[checkpoint.model_id].append(checkpoint)
    return found


def _may_read(call: Call, model: ModelRecord, scope: str, checkpoints: Sequence[CheckpointRecord]) -> bool:
    """Whether a run may be read: the caller's own; with access_scope=accessible also runs with a published checkpoint,
    and for an admin all."""
    return model.owner == call.owner or (scope == "accessible" and (bool(checkpoints) or call.is_admin))


def access_scope(call: Call) -> str:
    """The scope of a listing: an admin who names none sees all."""
    scope = call.query("access_scope", "accessible" if call.is_admin else "owned")
    if scope not in ("owned", "accessible"):
        raise InvalidRequest(f"access_scope is {scope!r}; it must be owned or accessible.")
    return scope


def _training_run(model: ModelRecord, checkpoints: Sequence[CheckpointRecord]) -> tinker.TrainingRun:
    return tinker.TrainingRun(
        training_run_id=model.model_id,
        base_model=model.base_model,
        model_owner=model.owner,
        is_lora=True,
        lora_rank=model.lora.rank,
        last_request_time=timestamp(model.last_request_at or model.created_at),
        corrupted=model.status == "corrupted",
        last_checkpoint=_newest(checkpoints, "weights"),
        last_sampler_checkpoint=_newest(checkpoints, "sampler_weights"),
        user_metadata=text_metadata(model.user_metadata),
    )


def _newest(checkpoints: Iterable[CheckpointRecord], kind: str) -> tinker.Checkpoint | None:
    newest = max((c for c in checkpoints if c.kind == kind), key=lambda c: c.created_at, default=None)
    return None if newest is None else checkpoint_info(newest)


def _project_of(call: Call, model: ModelRecord) -> str | None:
    session = call.scheduler.sessions.get(model.session_id)
    return session.project_id if session else None


# ---- checkpoints


async def list_checkpoints(call: Call) -> tinker.CheckpointsResponse:
    """The checkpoints of one run, newest first."""
    model = call.scheduler.models.get(call.path("run")) if call.is_admin else None
    model = model or owned(call.scheduler.models, call.path("run"), call.owner, UnknownTrainingRun)
    return tinker.CheckpointsResponse(checkpoints=[checkpoint_info(c) for c in _sorted(_by_run(call)[model.model_id])])


async def list_user_checkpoints(call: Call) -> tinker.CheckpointsResponse:
    mine = [checkpoint for checkpoint in call.scheduler.checkpoints.values() if checkpoint.owner == call.owner]
    page, cursor = paginate(call, _sorted(mine), limit_default=100)
    return tinker.CheckpointsResponse(checkpoints=[checkpoint_info(checkpoint) for checkpoint in page], cursor=cursor)


async def delete_checkpoint(call: Call) -> tinker.Accepted:
    await call.scheduler.delete_checkpoint(call.owner, own_checkpoint(call).path)
    return tinker.Accepted()


async def publish_checkpoint(call: Call) -> tinker.Accepted:
    """Publishing twice succeeds: the SDK would retry a 409 for minutes."""
    return await _update(call, public=True)


async def unpublish_checkpoint(call: Call) -> tinker.Accepted:
    return await _update(call, public=False)


async def set_checkpoint_ttl(call: Call, request: tinker.CheckpointTtlRequest) -> tinker.Accepted:
    """The time counts from now; null keeps the checkpoint for ever."""
    ttl_seconds = validation.ttl_seconds(request.ttl_seconds)
    return await _update(call, expires_at=None if ttl_seconds is None else call.api.clock.now() + ttl_seconds)


def own_checkpoint(call: Call) -> CheckpointRecord:
    """The checkpoint that the path names."""
    path = f"tinker://{call.path('run')}/{call.path('kind')}/{call.path('name')}"
    return owned(call.scheduler.checkpoints, path, call.owner, UnknownCheckpoint)


async def _update(call: Call, **changes: Any) -> tinker.Accepted:
    checkpoint = own_checkpoint(call)
    changed = msgspec.structs.replace(checkpoint, **changes)
    if changed != checkpoint:
        await call.scheduler.update_checkpoint(call.owner, changed)
    return tinker.Accepted()


def checkpoint_info(checkpoint: CheckpointRecord) -> tinker.Checkpoint:
    return tinker.Checkpoint(
        checkpoint_id=f"{checkpoint.kind}/{checkpoint.name}",
        checkpoint_type=_TYPES[checkpoint.kind],
        time=timestamp(checkpoint.created_at),
        tinker_path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=text_metadata(checkpoint.user_metadata),
        expires_at=None if checkpoint.expires_at is None else timestamp(checkpoint.expires_at),
    )


def _sorted(checkpoints: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.created_at, checkpoint.path), reverse=True)


# ---- shared


def paginate(call: Call, items: Sequence[T], limit_default: int) -> tuple[Sequence[T], tinker.Cursor]:
    limit = query_number(call, "limit", limit_default, PAGE_MAX)
    offset = query_number(call, "offset", 0, 2**53)
    return items[offset : offset + limit], tinker.Cursor(offset=offset, limit=limit, total_count=len(items))


def query_number(call: Call, name: str, default: int, highest: int) -> int:
    text = call.query(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InvalidRequest(f"{name} is {text[:50]!r}; it must be a whole number that is not negative.")
    return min(int(text), highest)


def timestamp(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def text_metadata(metadata: dict[str, Any]) -> dict[str, str] | None:
    """The SDK reads only text: other values are shown as JSON."""
    if not metadata:
        return None
    return {
        key: value if isinstance(value, str) else msgspec.json.encode(value).decode() for key, value in metadata.items()
    }
