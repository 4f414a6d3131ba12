"""A session's requests on a timeline, for https://ui.perfetto.dev or chrome://tracing.

It uses the trace event format: a slice for each request, and in it one for each station that the request has passed.
Requests of one run, or of one sampling session, that were open at the same time lie on lanes below each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from tx_async.api.context import Call
from tx_async.api.downloads import link, permission_of
from tx_async.api.ownership import owned
from tx_async.errors import UnknownSession
from tx_async.scheduler.interface import STATIONS, Passage
from tx_async.wire import tinker

PROCESS = 1

TraceEvent = dict[str, Any]


async def export_session_trace(call: Call) -> tinker.TraceExportResponse:
    """The trace is made when it is fetched, and is as new as that."""
    session = owned(call.scheduler.sessions, call.path("session_id"), call.owner, UnknownSession)
    url, _ = link(call, "traces", session)
    return tinker.TraceExportResponse(status="ready", url=url)


async def session_trace(call: Call) -> Response:
    permission = permission_of(call)
    session = call.scheduler.sessions.get(permission.path)
    if session is None or not permission.is_for(session):
        raise UnknownSession()
    passages = call.scheduler.passages(session.session_id)
    content = await asyncio.to_thread(trace, session.session_id, passages, call.api.clock.now())
    headers = {"content-disposition": f'attachment; filename="{session.session_id}.pftrace"'}
    return Response(content, headers=headers, media_type="application/json")


def trace(session_id: str, passages: Sequence[Passage], now: float) -> bytes:
    """now: requests that are still open are drawn until then."""
    events = [_name("process_name", 0, session_id), *_events(passages, now)]
    return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events})


def _events(passages: Sequence[Passage], now: float) -> Iterator[TraceEvent]:
    #: subject -> (lane, when its last request ends), for each of its lanes
    lanes: dict[str, list[tuple[int, float]]] = {}
    num_lanes = 0
    for passage in sorted(passages, key=lambda passage: passage.accepted_at):
        own = lanes.setdefault(passage.subject, [])
        end = _end_of(passage, now)
        free = next((i for i, (_, until) in enumerate(own) if until <= passage.accepted_at), None)
        if free is None:
            num_lanes += 1
            own.append((num_lanes, end))
            yield _name("thread_name", num_lanes, f"{passage.subject} {len(own)}")
            free = len(own) - 1
        lane, _ = own[free]
        own[free] = lane, end
        yield from _slices(passage, lane, end)


def _slices(passage: Passage, lane: int, end: float) -> Iterator[TraceEvent]:
    arguments = {
        "request_id": passage.request_id,
        "seq_id": passage.seq_id,
        "worker": passage.worker_id,
        "outcome": "failed" if passage.failed else "finished" if passage.published_at else "open",
    }
    yield _slice("request", f"{passage.kind} {passage.seq_id}", lane, passage.accepted_at, end, arguments)
    for name, began, ended in passage.stations(end):
        if (name, began) != ("fetch", end):  # nobody has fetched it
            yield _slice("station", name, lane, began, ended, {"request_id": passage.request_id})
    if passage.first_token_at and passage.begun_at:  # in "run"
        middle, last = passage.first_token_at, passage.ended_at or end
        yield _slice("worker", "first token", lane, passage.begun_at, min(middle, last), {})
        yield _slice("worker", "decode", lane, min(middle, last), last, {})


def _end_of(passage: Passage, now: float) -> float:
    last = max(passage.fetched_at, *(getattr(passage, mark) for mark in STATIONS.values()))
    return last if passage.published_at else max(now, last)


def _slice(category: str, name: str, lane: int, began: float, ended: float, arguments: dict[str, Any]) -> TraceEvent:
    start = _microseconds(began)
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": PROCESS,
        "tid": lane,
        "ts": start,
        "dur": max(0, _microseconds(ended) - start),
        "args": arguments,
    }


def _name(what: str, lane: int, name: str) -> TraceEvent:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": lane, "args": {"name": name}}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
