"""The page's requests, and the changes that it may make. A viewer sees only what is theirs: for others, a run does not
exist."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tx_async import __version__
from tx_async.api import validation
from tx_async.api.compatible.chat_completions import chat_completions
from tx_async.api.compatible.completions import completions
from tx_async.api.context import Call
from tx_async.api.downloads import link
from tx_async.api.endpoint import Row
from tx_async.api.errors import json_response
from tx_async.api.history import columns_of
from tx_async.api.rest import query_number
from tx_async.dashboard import operator, picture
from tx_async.dashboard.viewer import Viewer
from tx_async.errors import Forbidden, InvalidRequest, UnknownCheckpoint, UnknownTrainingRun
from tx_async.wire import openai, tinker
from tx_async.wire.dashboard import CheckpointAction, DashboardViewer, Link
from tx_async.wire.records import CheckpointRecord, ModelRecord

REQUESTS_MAX = 100
CHECKPOINTS_MAX = 500
EVENT_STREAM = "text/event-stream"


async def dashboard_viewer(call: Call) -> DashboardViewer:
    """The viewer, what they may see, and the token that the page sends with every change."""
    viewer = Viewer.of(call)
    return DashboardViewer(
        name=viewer.name,
        role="admin" if viewer.sees_all else "user",
        has_key=viewer.has_key,
        token=call.api.tokens.token(viewer),
        version=__version__,
    )


async def dashboard_events(call: Call) -> Response:
    """Server-sent events: `state` at once, then a `change` whenever something has changed."""
    viewer, news = Viewer.of(call), call.api.news
    # Joined here, and not when its stream is first read: pages that are opened at once would all find room.
    news.join(viewer)
    return OpenPage(news.stream(viewer, lambda: _is_same(call, viewer)), lambda: news.leave(viewer))


class OpenPage(StreamingResponse):
    """A page's stream. However it ends, also before it was read, the page leaves."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type=EVENT_STREAM)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


def _is_same(call: Call, viewer: Viewer) -> bool:
    """Whether the key is still valid, with the same role."""
    return not viewer.has_key or Viewer.of(call) == viewer


async def dashboard_runs(call: Call) -> Response:
    """Runs beyond those of the events: `?find=` words that each must have, `?offset=` how many of them to leave out,
    `?limit=` how many to tell of."""
    words = call.query("find").lower().split()
    offset = query_number(call, "offset", 0, 2**53)
    names, limit = call.api.owners.names(), _limit(call)
    found, total = picture.find_runs(call.scheduler, Viewer.of(call), names, words, offset, limit)
    return json_response({"runs": found, "total": total})


def _limit(call: Call) -> int:
    text = call.query("limit", str(picture.RUNS_MAX))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else 0
    if not 1 <= limit <= picture.RUNS_MAX:
        raise InvalidRequest(f"limit is {text[:50]!r}; it must be a whole number from 1 to {picture.RUNS_MAX}.")
    return limit


async def dashboard_run(call: Call) -> Response:
    """One run: its description, its checkpoints, its newest requests, and its history from `?since=` on."""
    viewer = Viewer.of(call)
    model = _run(call, viewer)
    rows = call.scheduler.history(model.model_id, query_number(call, "since", 0, 2**53))
    checkpoints = [c for c in call.scheduler.checkpoints.values() if c.model_id == model.model_id]
    checkpoints.sort(key=lambda checkpoint: checkpoint.created_at, reverse=True)
    return json_response(
        {
            "run": picture.run(call.scheduler, model, call.api.owners.names()) | _more(model),
            "checkpoints": [_checkpoint(checkpoint) for checkpoint in checkpoints],
            "requests": call.scheduler.requests_of(model.model_id, REQUESTS_MAX),
            "columns": columns_of(rows),
            "steps": rows,
        }
    )


def _more(model: ModelRecord) -> dict[str, Any]:
    return {
        "session": model.session_id,
        "created_from": model.created_from_path,
        "seed": model.lora.seed,
        "trains": [name for name in ("attn", "mlp", "unembed") if getattr(model.lora, f"train_{name}")],
        "metadata": model.user_metadata,
    }


def _checkpoint(checkpoint: CheckpointRecord) -> dict[str, Any]:
    fields = ("path", "kind", "name", "size_bytes", "created_at", "expires_at", "public", "user_metadata")
    return {field: getattr(checkpoint, field) for field in fields}


def _run(call: Call, viewer: Viewer) -> ModelRecord:
    model = call.scheduler.models.get(call.path("run"))
    if model is None or not viewer.sees(model.owner):
        raise UnknownTrainingRun()
    return model


async def dashboard_checkpoints(call: Call) -> Response:
    """The checkpoints that can be sampled: the newest that the viewer sees, and published ones."""
    viewer = Viewer.of(call)
    seen = (c for c in call.scheduler.checkpoints.values() if c.public or viewer.sees(c.owner))
    newest = heapq.nlargest(CHECKPOINTS_MAX, seen, key=lambda checkpoint: checkpoint.created_at)
    entries = [_checkpoint(c) | {"is_own": c.public or c.owner == call.owner} for c in newest]
    return json_response({"base_model": call.scheduler.base_model.name, "checkpoints": entries})


async def dashboard_operator(call: Call) -> Response:
    """Keys, audit, sessions, health, settings, versions, for viewers who see everything."""
    if not Viewer.of(call).sees_all:
        raise Forbidden("This is for keys of role admin (`tx-async keys add NAME --role admin`).")
    return json_response(await operator.report(call))


async def dashboard_checkpoint(call: Call, request: CheckpointAction) -> tinker.Accepted:
    """Publish, unpublish, delete, or give a time to live."""
    checkpoint = _changeable(call, request.path)
    if request.action == "delete":
        await call.scheduler.delete_checkpoint(checkpoint.owner, checkpoint.path)
        return tinker.Accepted()
    changes: dict[str, Any] = {"public": request.action == "publish"}
    if request.action == "ttl":
        seconds = validation.ttl_seconds(request.ttl_seconds)
        changes = {"expires_at": None if seconds is None else call.api.clock.now() + seconds}
    changed = msgspec.structs.replace(checkpoint, **changes)
    if changed != checkpoint:
        await call.scheduler.update_checkpoint(checkpoint.owner, changed)
    return tinker.Accepted()


async def dashboard_download(call: Call, request: CheckpointAction) -> Link:
    """A link to a checkpoint's tar."""
    return Link(url=link(call, "archives", _changeable(call, request.path))[0])


async def dashboard_completions(call: Call) -> Response:
    """Sample as the checkpoint's owner would, for a viewer who sees everything but has no key of the owner's."""
    return await completions(replace(call, owner=_changeable(call, call.query("checkpoint")).owner))


async def dashboard_chat_completions(call: Call) -> Response:
    return await chat_completions(replace(call, owner=_changeable(call, call.query("checkpoint")).owner))


def _changeable(call: Call, path: str) -> CheckpointRecord:
    viewer = Viewer.of(call)
    call.api.tokens.check(call, viewer)
    checkpoint = call.scheduler.checkpoints.get(path)
    if checkpoint is None or not viewer.sees(checkpoint.owner):
        raise UnknownCheckpoint()
    return checkpoint


ROWS = (
    Row(
        "GET",
        "/dashboard/events",
        dashboard_events,
        "What the page shows, as server-sent events: the present state, then changes",
        media_types=(EVENT_STREAM,),
    ),
    Row("GET", "/dashboard/viewer", dashboard_viewer, "Who looks at the page"),
    Row("GET", "/dashboard/runs", dashboard_runs, "Runs that the events leave out, and a search, for the page"),
    Row("GET", "/dashboard/runs/{run}", dashboard_run, "A run, its checkpoints, requests and history, for the page"),
    Row("GET", "/dashboard/checkpoints", dashboard_checkpoints, "Checkpoints that can be sampled, for the page"),
    Row("GET", "/dashboard/operator", dashboard_operator, "Keys, audit, sessions, health, settings, for the page"),
    Row("POST", "/dashboard/checkpoints", dashboard_checkpoint, "Change a checkpoint (from the page only)"),
    Row("POST", "/dashboard/downloads", dashboard_download, "A link to a checkpoint (from the page only)"),
    Row(
        "POST",
        "/dashboard/playground/completions",
        dashboard_completions,
        "`completions` of another key's checkpoint, which `?checkpoint=` names (from the page only)",
        request=openai.CompletionRequest,
        media_types=(EVENT_STREAM,),
    ),
    Row(
        "POST",
        "/dashboard/playground/chat/completions",
        dashboard_chat_completions,
        "`chat/completions` of another key's checkpoint, which `?checkpoint=` names (from the page only)",
        request=openai.ChatRequest,
        media_types=(EVENT_STREAM,),
    ),
)
