"""The budget for bytes of request bodies being read, unpacked and decoded: bounded in total and for each key.

A body asks for its bytes before they are read, and waits while its key, or everybody together, has too many. One in
`READING_SHARE` of each bound is kept for what bodies unpack to, so that bodies never deadlock, each waiting for the
others to end; small bodies have a bound of their own, so that a heartbeat waits for nobody's upload. Decoding takes
turns: one at a time for each key, `DECODERS` in all, because threads that share one interpreter only hold up each other
and the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio.to_thread

from tx_async.api.turnstile import Turnstile
from tx_async.config import ServerConfig
from tx_async.errors import BodyTooLarge, Overloaded

T = TypeVar("T")

INLINE_BYTES_MAX = 64 * 1024
"""Bodies and results up to this size are handled on the event loop: a thread would cost more than it saves."""
SMALL_SHARE = 8
"""One byte in this many of the budget is for bodies of at most `INLINE_BYTES_MAX`."""
SMALL_BYTES_MIN = 16 * INLINE_BYTES_MAX
READING_SHARE = 4
"""One byte in this many of a bound is for what bodies unpack to, not for reading more of them."""
DECODERS = 2
PIECES_PER_ROUND = 2
"""Pieces (of 64 KiB, as a rule) of large bodies that one round of the event loop takes: half a millisecond of it."""
PATIENCE = 2
"""A body waits for its bytes this many times as long as a stalled body may hold them (`body_timeout_ms`)."""


class Ledger:
    """Which key holds how many bytes. The mutable state is the bytes held and the queue of those that wait."""

    def __init__(self, bytes_max: int, key_bytes_max: int):
        self.bytes_max = bytes_max
        self.key_bytes_max = key_bytes_max
        #: owner -> bytes; without zeros
        self.held: Counter[str] = Counter()
        self.num_bytes = 0
        #: owner -> its waiters: how many bytes each wants, and whether to unpack; oldest first, without empty queues
        self._waiting: dict[str, deque[tuple[int, bool, asyncio.Future[None]]]] = {}

    def __repr__(self) -> str:
        waiting = sum(map(len, self._waiting.values()))
        return f"<Ledger [{self.num_bytes} of {self.bytes_max} bytes | {len(self.held)} keys | {waiting} waiting]>"

    def fits(self, owner: str, num_bytes: int, unfolds: bool) -> bool:
        """Whether this many more bytes fit. A key that has some already leaves as much to the others as it takes."""
        mine, left = self.held[owner] + num_bytes, self.bytes_max - self.num_bytes - num_bytes
        if not unfolds:
            left -= self.bytes_max // READING_SHARE
        key_max = self.key_bytes_max if unfolds else self.key_bytes_max - self.key_bytes_max // READING_SHARE
        return left >= 0 and mine <= key_max and (mine == num_bytes or mine <= self.bytes_max - self.num_bytes)

    async def take(self, owner: str, num_bytes: int, unfolds: bool, timeout_s: float) -> None:
        """Wait until there is room. Raises `Overloaded` after `timeout_s`."""
        if (unfolds or owner not in self._waiting) and self.fits(owner, num_bytes, unfolds):
            self.charge(owner, num_bytes)
            return
        turn = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(owner, deque())
        entry = (num_bytes, unfolds, turn)
        queue.appendleft(entry) if unfolds else queue.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except TimeoutError:
            raise Overloaded(
                "Too many request bodies are under way (`bodies_bytes_max`, `tenant_bodies_bytes_max`). Try again in a "
                "moment."
            ) from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(owner, num_bytes)
            raise
        finally:
            if entry in queue:
                queue.remove(entry)
            if not queue and self._waiting.get(owner) is queue:
                del self._waiting[owner]

    def charge(self, owner: str, num_bytes: int) -> None:
        self.held[owner] += num_bytes
        self.num_bytes += num_bytes

    def give_back(self, owner: str, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self.held[owner] -= num_bytes
        if not self.held[owner]:
            del self.held[owner]
        self._wake()

    def _wake(self) -> None:
        """Wake waiters; keys take turns: a key that got something goes to the end of the line."""
        for owner in list(self._waiting):
            queue = self._waiting[owner]
            while queue and self.fits(owner, *queue[0][:2]):
                num_bytes, _, turn = queue.popleft()
                if not turn.done():
                    self.charge(owner, num_bytes)
                    turn.set_result(None)
                    self._waiting[owner] = self._waiting.pop(owner)


class Bodies:
    """The request bodies of the process."""

    def __init__(self, config: ServerConfig):
        small = max(config.bodies_bytes_max // SMALL_SHARE, SMALL_BYTES_MIN)
        large = max(config.bodies_bytes_max - small, small)
        self.key_bytes_max = min(config.tenant_bodies_bytes_max, large)
        self.timeout_s = config.body_timeout_ms / 1000
        self.large = Ledger(large, self.key_bytes_max)
        self.small = Ledger(small, small // 2)
        self.turnstile = Turnstile(PIECES_PER_ROUND)
        self._decoders = asyncio.Semaphore(DECODERS)
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))
        #: owner -> the holds that use its turn or wait for it
        self._users: Counter[str] = Counter()

    @property
    def body_bytes_max(self) -> int:
        """The largest body that a key can have at all, packed or unpacked."""
        return self.key_bytes_max - self.key_bytes_max // READING_SHARE

    @asynccontextmanager
    async def hold(self, owner: str) -> AsyncGenerator[Hold]:
        """A hold for one request; its bytes are given back when the request has been answered."""
        hold = Hold(self, owner)
        try:
            yield hold
        finally:
            hold.release()

    @asynccontextmanager
    async def decoding(self, owner: str) -> AsyncGenerator[None]:
        self._users[owner] += 1
        try:
            async with self._turns[owner], self._decoders:
                yield
        finally:
            self._users[owner] -= 1
            if not self._users[owner]:
                del self._users[owner], self._turns[owner]


class Hold:
    """The bytes of one request."""

    def __init__(self, bodies: Bodies, owner: str):
        self.bodies = bodies
        self.owner = owner
        self.num_bytes = 0
        self._ledger = bodies.large

    async def take(self, num_bytes: int, *, unfolds: bool = False) -> None:
        """Take this many more bytes, waiting for room. Raises `BodyTooLarge` when there can never be room, `Overloaded`
        when there was none for too long."""
        self.check(self.num_bytes + num_bytes)
        if not self.num_bytes:
            self._ledger = self.bodies.small if num_bytes <= INLINE_BYTES_MAX and not unfolds else self.bodies.large
        elif self._ledger is self.bodies.small:
            self._move_to_large()
        await self._ledger.take(self.owner, num_bytes, unfolds, PATIENCE * self.bodies.timeout_s)
        self.num_bytes += num_bytes

    def check(self, num_bytes: int) -> None:
        """Raises `BodyTooLarge`."""
        if num_bytes > self.bodies.body_bytes_max:
            raise BodyTooLarge(
                f"The request body takes {num_bytes} bytes when it is unpacked and decoded; for one key "
                f"{self.bodies.body_bytes_max} are allowed (three quarters of `tenant_bodies_bytes_max`): send smaller "
                "pieces."
            )

    def _move_to_large(self) -> None:
        self._ledger.give_back(self.owner, self.num_bytes)
        self._ledger = self.bodies.large
        self._ledger.charge(self.owner, self.num_bytes)

    def release(self) -> None:
        if self.num_bytes:
            self._ledger.give_back(self.owner, self.num_bytes)
            self.num_bytes = 0

    async def compute(self, function: Callable[..., T], num_bytes: int, *arguments: Any) -> T:
        """Run a function whose cost grows with `num_bytes`; if they are many, in a thread and in the key's turn."""
        if num_bytes <= INLINE_BYTES_MAX:
            return function(*arguments)
        async with self.bodies.decoding(self.owner):
            return await anyio.to_thread.run_sync(function, *arguments)
