"""The stream of events behind the page: first the present state, then its changes, once a second.

All pages share one look at the scheduler a second, and pages of one viewer share its bytes; nobody looks when no page
is open. A page that reads slowly misses intermediate states and never the newest one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from tx_async.clock import Clock
from tx_async.dashboard import picture
from tx_async.dashboard.picture import Picture
from tx_async.dashboard.rates import Rates, Reading
from tx_async.dashboard.viewer import Viewer
from tx_async.errors import Overloaded
from tx_async.scheduler.interface import SchedulerApi
from tx_async.wire.dashboard import Overview

TICK_S = 1.0
SILENCE_S = 15
"""After this many ticks without news, a line says that the stream is alive: proxies cut silent ones."""
RETRY_MS = 2000
PAGES_MAX = 512
PAGES_FOR_ADMINS = 64
"""So many of them are never given to users: an admin can always look at a server that is crowded."""
PAGES_PER_KEY_MAX = 64
READ_S = 2.5
READS_PER_S_MAX = 4
"""Pages of a run that trains read its newest steps every `READ_S` seconds; many pages less often, so that all together
read no more than this."""


class News:
    def __init__(
        self,
        scheduler: SchedulerApi,
        clock: Clock,
        names: Callable[[], dict[str, str]] = dict,
        redact: Callable[[str], str] = str,
        rates: Rates | None = None,
    ):
        """names: names of keys, by owner. redact: makes a line for operators fit for a tenant."""
        self.scheduler = scheduler
        self.clock = clock
        self.rates = rates or Rates()
        self.num_looks = 0
        """How often pages have had the scheduler looked at."""
        #: the open pages, by viewer: each has joined, and has not left yet
        self._pages: Counter[Viewer] = Counter()
        self._names = names
        self._redact = redact
        #: the pictures of the present tick, by viewer
        self._pictures: dict[Viewer, Picture] = {}
        self._overview = Overview()
        self._server: dict[str, Any] = {}
        #: encoded changes of the present tick, by viewer and the picture before
        self._changes: dict[tuple[Viewer, int], bytes] = {}
        self._tick = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<News [{self.num_pages} pages]>"

    @property
    def num_pages(self) -> int:
        return self._pages.total()

    # ---- a page's stay: it joins, reads its stream, and leaves

    def join(self, viewer: Viewer) -> None:
        """Whoever joins must leave, also when its stream is never read. Raises `Overloaded`."""
        if problem := no_room(self._pages, viewer):
            raise Overloaded(problem)
        self._pages[viewer] += 1
        if self._ticking is None:
            self._forget()
            self._ticking = asyncio.get_running_loop().create_task(self._tick_while_watched())

    def leave(self, viewer: Viewer) -> None:
        self._pages[viewer] -= 1
        if not self._pages[viewer]:
            del self._pages[viewer]
        if not self._pages and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    async def stream(self, viewer: Viewer, is_valid: Callable[[], bool]) -> AsyncIterator[bytes]:
        """For a viewer that has joined. is_valid: whether the viewer's key still counts."""
        shown, silence = self._picture(viewer), 0
        yield b"retry: %d\n" % RETRY_MS + _event("state", msgspec.json.encode(shown))
        while is_valid():
            await self._tick.wait()
            newest = self._picture(viewer)
            news = self._change(viewer, shown, newest)
            shown, silence = newest, 0 if news else silence + 1
            if news or silence % SILENCE_S == 0:
                yield news or b": still here\n\n"

    # ---- the clock of all pages

    async def _tick_while_watched(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._forget()
            tick, self._tick = self._tick, asyncio.Event()
            tick.set()

    def _forget(self) -> None:
        self._pictures, self._changes, self._server = {}, {}, {}

    # ---- what it shows

    def _picture(self, viewer: Viewer) -> Picture:
        if viewer not in self._pictures:
            if not self._server:
                self._look()
            self._pictures[viewer] = picture.take(
                self.scheduler, self._overview, viewer, self._names(), self._server
            ) | {"ready": self._ready(viewer), "read_every_s": max(READ_S, self.num_pages / READS_PER_S_MAX)}
        return self._pictures[viewer]

    def _look(self) -> None:
        self.num_looks += 1
        self._overview = overview = self.scheduler.overview()
        reading = Reading.of(overview, self.clock.now())
        self.rates.note(reading)
        self._server = {
            "workers": msgspec.to_builtins(overview.workers),
            "hour": self.rates.hour(),
            "shares": self.rates.shares(reading),
        }

    def _ready(self, viewer: Viewer) -> dict[str, Any]:
        waiting = self.scheduler.waiting_for(in_full=viewer.sees_all)
        return {
            "is_ready": not waiting,
            "waiting_for": waiting if viewer.sees_all else [self._redact(line) for line in waiting],
            "operations_to_replay": self._overview.operations_to_replay,
            "operations_lost": self._overview.operations_lost,
        }

    def _change(self, viewer: Viewer, before: Picture, after: Picture) -> bytes:
        """An event with the changes, or nothing."""
        key = (viewer, id(before))
        if key not in self._changes:
            changed = picture.change(before, after)
            self._changes[key] = _event("change", msgspec.json.encode(changed)) if changed else b""
        return self._changes[key]


def no_room(pages: Mapping[Viewer, int], viewer: Viewer) -> str:
    """Why this viewer cannot have another page beside the open ones; "" where it can.

    A key has a share, so that none can shut out the others. Without keys everybody is at this machine, and one."""
    num_pages = sum(pages.values())
    if viewer.has_key:
        of_key = sum(number for other, number in pages.items() if other.owner == viewer.owner)
        if of_key >= PAGES_PER_KEY_MAX:
            return f"This key has {PAGES_PER_KEY_MAX} pages open already: close one, then load this one again."
    of_users = sum(number for other, number in pages.items() if not other.sees_all)
    if num_pages >= PAGES_MAX or (not viewer.sees_all and of_users >= PAGES_MAX - PAGES_FOR_ADMINS):
        return f"The server shows {num_pages} pages already, and no more at once: load this one again later."
    return ""


def _event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)
