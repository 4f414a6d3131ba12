"""How large bodies share the event loop with everybody else: a limited number of pieces in each round of it.

The loop takes whatever has come on every connection before it looks again, so with a hundred uploads one round takes a
hundred pieces, and a heartbeat that needs a few rounds waits for all of them each time. With a turnstile a round is
short however many uploads there are; what does not pass stays in the sockets. No time is lost by that: the next round
begins at once.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """The mutable state is how many may still pass in this round, and who waits for a later one, oldest first."""

    def __init__(self, round_max: int):
        self.round_max = round_max
        self._left = round_max
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<Turnstile [{self._left} of {self.round_max} left | {len(self._waiting)} waiting]>"

    async def passed(self) -> None:
        """Returns in this round, or in the first one that has room."""
        if self._left == self.round_max:
            asyncio.get_running_loop().call_soon(self._next_round)
        if self._left:
            self._left -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _next_round(self) -> None:
        self._left = self.round_max
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # whoever was cancelled takes no room
                turn.set_result(None)
                self._left -= 1
        if self._left < self.round_max:
            asyncio.get_running_loop().call_soon(self._next_round)
