"""RestClient's reads of sessions."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import msgspec

from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.api.ownership import owned
from tx_async.api.rest import access_scope, paginate, text_metadata, timestamp
from tx_async.errors import UnknownSession
from tx_async.wire import tinker
from tx_async.wire.records import SessionRecord

FINISHED = ("success", "errored", "interrupted")


async def get_session(call: Call) -> tinker.SessionResponse:
    access_scope(call)
    session = _own_session(call)
    models, samplers = call.scheduler.models.values(), call.scheduler.samplers.values()
    return tinker.SessionResponse(
        training_run_ids=[model.model_id for model in models if model.session_id == session.session_id],
        sampler_ids=[sampler.sampler_id for sampler in samplers if sampler.session_id == session.session_id],
        user_metadata=text_metadata(session.user_metadata),
        display_name=session.display_name,
    )


async def list_sessions(call: Call) -> tinker.SessionsResponse:
    access_scope(call)
    page, _ = paginate(call, _newest_first(call), limit_default=20)
    return tinker.SessionsResponse(sessions=[session.session_id for session in page])


async def assign_session_project(call: Call, request: tinker.AssignProjectRequest) -> tinker.Accepted:
    session = _own_session(call)
    project_id = validation.text("project_id", request.project_id, call.api.config.text_bytes_max)
    await call.scheduler.update_session(call.owner, msgspec.structs.replace(session, project_id=project_id))
    return tinker.Accepted()


async def search_sessions(call: Call, request: tinker.SessionSearchRequest) -> tinker.SessionSearchResponse:
    """Newest first; a tenant finds its own sessions only, whatever owner it names."""
    if request.owner.type == "user" and call.owner not in request.owner.owner_urns:
        return tinker.SessionSearchResponse(sessions=[])
    found = [session for session in _newest_first(call) if _matches(session, request)]
    if request.cursor is not None:
        last = (request.cursor.last_created_at, request.cursor.last_session_id)
        found = [session for session in found if _age(session) < last]
    page = found[: request.limit]
    counts, sizes = _checkpoints_by_session(call)
    cursor = None
    if len(found) > len(page):
        cursor = tinker.SessionSearchCursor(timestamp(page[-1].created_at), page[-1].session_id)
    return tinker.SessionSearchResponse(
        sessions=[_summary(s, counts[s.session_id], sizes[s.session_id]) for s in page], next_cursor=cursor
    )


def _own_session(call: Call) -> SessionRecord:
    return owned(call.scheduler.sessions, call.path("session_id"), call.owner, UnknownSession)


def _newest_first(call: Call) -> list[SessionRecord]:
    mine = (session for session in call.scheduler.sessions.values() if session.owner == call.owner)
    return sorted(mine, key=_age, reverse=True)


def _age(session: SessionRecord) -> tuple[datetime, str]:
    """The order of sessions, in the microseconds that a cursor can hold."""
    return timestamp(session.created_at), session.session_id


def _matches(session: SessionRecord, request: tinker.SessionSearchRequest) -> bool:
    wanted = request.user_metadata or {}
    if any((text_metadata(session.user_metadata) or {}).get(key) != value for key, value in wanted.items()):
        return False
    if request.project_ids is not None and session.project_id not in request.project_ids:
        return False
    if request.statuses and not any(_has_status(session, query) for query in request.statuses):
        return False
    # An id and a display name together find what either finds.
    names = [session.session_id == request.session_id] if request.session_id is not None else []
    if request.display_name:
        name = (session.display_name or "").lower()
        names.append(all(word in name for word in request.display_name.lower().split()))
    return any(names) if names else True


def _has_status(session: SessionRecord, query: tinker.SessionStatusQuery) -> bool:
    if query.type == "client_finished":
        return session.status in (query.reasons or FINISHED)
    return query.type == "active" and session.status == "active"


def _checkpoints_by_session(call: Call) -> tuple[Counter[str], Counter[str]]:
    """(number, bytes) of the caller's own checkpoints, by session."""
    counts, sizes = Counter[str](), Counter[str]()
    for checkpoint in call.scheduler.checkpoints.values():
        model = call.scheduler.models.get(checkpoint.model_id)
        if model is not None and checkpoint.owner == call.owner:
            counts[model.session_id] += 1
            sizes[model.session_id] += checkpoint.size_bytes
    return counts, sizes


def _summary(session: SessionRecord, checkpoints_count: int, checkpoint_bytes: int) -> tinker.SessionSummary:
    return tinker.SessionSummary(
        session_id=session.session_id,
        created_at=timestamp(session.created_at),
        owner=session.owner,
        project_id=session.project_id or "",
        checkpoints_count=checkpoints_count,
        status=_status(session),
        display_name=session.display_name,
        user_metadata=text_metadata(session.user_metadata),
        checkpoint_storage_bytes=checkpoint_bytes,
    )


def _status(session: SessionRecord) -> tinker.SessionStatus | None:
    """None for a session that stopped sending heartbeats: it has not finished, and is not known to run."""
    if session.status == "active":
        return tinker.SessionStatus(type="active")
    if session.status in FINISHED:
        reason = tinker.SessionFinishedReason(type=session.status)
        return tinker.SessionStatus(type="client_finished", reason=reason, detail=session.detail)
    return None
