"""The picture of the present that a viewer's page shows, and the changes since an earlier one. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tx_async.dashboard.viewer import Viewer
from tx_async.scheduler.interface import SchedulerApi
from tx_async.wire.dashboard import Overview
from tx_async.wire.records import ModelRecord, SessionRecord

RUNS_MAX = 200
"""How many of the most recently used runs a page is told of as they change; it asks for others, as many at once."""
Picture = dict[str, Any]
"""Section -> its content; "runs" by id."""


def take(
    scheduler: SchedulerApi,
    overview: Overview,
    viewer: Viewer,
    names: Mapping[str, str],
    server: Mapping[str, Any],
) -> Picture:
    """names: names of keys, by owner. server: sections about the whole server, for viewers who may see everything."""
    queues = [queue for queue in overview.queues if viewer.sees(queue.owner)]
    return {
        "base_model": msgspec.to_builtins(_base_model(scheduler)),
        "queues": [{"key": names.get(q.owner, q.owner), "requests": q.requests, "samples": q.samples} for q in queues],
        "runs": runs(scheduler, viewer, names),
        "num_runs": sum(viewer.sees(model.owner) for model in scheduler.models.values()),
        **(server if viewer.sees_all else {}),
    }


def _base_model(scheduler: SchedulerApi) -> dict[str, Any]:
    model = scheduler.base_model
    return {
        "name": model.name,
        "architecture": model.architecture,
        "max_context_length": model.max_context_length,
        "vocab_size": model.vocab_size,
        "max_lora_rank": model.max_lora_rank,
    }


def runs(scheduler: SchedulerApi, viewer: Viewer, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    seen = (model for model in scheduler.models.values() if viewer.sees(model.owner))
    newest = heapq.nlargest(RUNS_MAX, seen, key=_order)
    return {model.model_id: run(scheduler, model, names) for model in newest}


def find_runs(
    scheduler: SchedulerApi, viewer: Viewer, names: Mapping[str, str], words: Sequence[str], offset: int, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The runs that have each of the words in their id, name, tags, base model or key's name, most recently used first:
    `limit` of them from the one with the number `offset` on, and how many there are in all."""
    found = [
        model
        for model in scheduler.models.values()
        if viewer.sees(model.owner) and (not words or _has(scheduler, model, names, words))
    ]
    found.sort(key=_order, reverse=True)
    return [run(scheduler, model, names) for model in found[offset : offset + limit]], len(found)


def _has(scheduler: SchedulerApi, model: ModelRecord, names: Mapping[str, str], words: Sequence[str]) -> bool:
    session = scheduler.sessions.get(model.session_id)
    key = names.get(model.owner, model.owner)
    texts = (model.model_id, _name(model, session), model.base_model, key, *(session.tags if session else ()))
    text = " ".join(texts).lower()
    return all(word in text for word in words)


def _order(model: ModelRecord) -> tuple[float, str]:
    return used_at(model), model.model_id


def run(scheduler: SchedulerApi, model: ModelRecord, names: Mapping[str, str]) -> dict[str, Any]:
    view = scheduler.run_view(model)
    session = scheduler.sessions.get(model.session_id)
    return {
        "id": model.model_id,
        "key": names.get(model.owner, model.owner),
        "base_model": model.base_model,
        "rank": model.lora.rank,
        "state": view.state,
        "steps": view.num_steps,
        "loss": view.loss,
        "created_at": model.created_at,
        "used_at": used_at(model),
        "name": _name(model, session),
        "tags": list(session.tags) if session else [],
    }


def _name(model: ModelRecord, session: SessionRecord | None) -> str:
    """The run's own name before that of its session; "" where neither has one."""
    given = [model.user_metadata.get("name")]
    given += [session.display_name, session.user_metadata.get("name")] if session else []
    return next((name for name in given if isinstance(name, str) and name), "")


def used_at(model: ModelRecord) -> float:
    return model.last_request_at or model.created_at


def change(before: Picture, after: Picture) -> Picture:
    """The sections that have changed; of the runs only changed ones, None for a run that is gone."""
    changed = {name: content for name, content in after.items() if name != "runs" and before.get(name) != content}
    old, new = before["runs"], after["runs"]
    moved = {run_id: entry for run_id, entry in new.items() if old.get(run_id) != entry}
    moved |= dict.fromkeys(old.keys() - new.keys())
    return changed | ({"runs": moved} if moved else {})
