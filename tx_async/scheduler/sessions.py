"""Client sessions: which are alive, which have ended, and when a silent one counts as ended."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from tx_async.clock import Clock
from tx_async.errors import SessionGone, UnknownSession
from tx_async.journal.journal import Journal
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import SessionChanged, SessionCreated, SessionEnded
from tx_async.scheduler.performer import Performer
from tx_async.wire.records import Put, SessionRecord

PAUSE_S = 10.0
"""Looks at all sessions that lie further apart than this, though one comes each second, show that this process could
not hear anybody meanwhile: it was stopped, or starved of its processor."""

TimeoutOf = Callable[[], Callable[[str], float]]
"""Called once for each look at all sessions."""


class Sessions:
    def __init__(self, catalog: Catalog, journal: Journal, performer: Performer, clock: Clock, timeout_of: TimeoutOf):
        """timeout_of: seconds of silence after which a session has ended."""
        self.catalog = catalog
        self.journal = journal
        self.performer = performer
        self.clock = clock
        self._timeout_of = timeout_of
        #: session_id -> when it was last heard of (monotonic)
        self._last_seen = {s.session_id: clock.monotonic() for s in catalog.sessions.values()}
        self._last_look = clock.monotonic()

    async def create(self, session: SessionRecord) -> SessionRecord:
        await self.journal.commit([Put(session)])
        self.performer.handle(SessionCreated(session))
        self._last_seen[session.session_id] = self.clock.monotonic()
        return session

    def find(self, owner: str, session_id: str) -> SessionRecord:
        """Raises `UnknownSession`."""
        session = self.catalog.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise UnknownSession()
        return session

    def heartbeat(self, owner: str, session_id: str) -> None:
        session = self.find(owner, session_id)
        if session.status not in ("active", "expired"):
            raise SessionGone()
        self.seen(session)

    def seen(self, session: SessionRecord) -> None:
        self._last_seen[session.session_id] = self.clock.monotonic()
        if session.status == "expired":  # the client was only asleep
            self.performer.handle(SessionChanged(replace(session, status="active")))

    def expire(self) -> None:
        """End silent sessions, until they are heard from again. A pause of our own is not their silence."""
        now, timeout_of = self.clock.monotonic(), self._timeout_of()
        pause, self._last_look = now - self._last_look, now
        if pause > PAUSE_S:
            self._last_seen = {session_id: min(now, seen + pause) for session_id, seen in self._last_seen.items()}
        for session_id, seen in list(self._last_seen.items()):
            session = self.catalog.sessions.get(session_id)
            if session is None:
                del self._last_seen[session_id]
            elif session.status == "active" and now - seen > timeout_of(session_id):
                self.performer.handle(SessionEnded(session_id, "expired", session.detail))

    async def finish(self, owner: str, session_id: str, status: str, detail: str | None) -> None:
        session = self.find(owner, session_id)
        if session.status in ("active", "expired"):
            await self.performer.handle_durably(SessionEnded(session_id, status, detail))

    async def update(self, owner: str, session: SessionRecord) -> None:
        known = self.find(owner, session.session_id)
        await self.performer.handle_durably(SessionChanged(replace(known, project_id=session.project_id)))
