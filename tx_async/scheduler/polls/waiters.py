"""Long polls: each waits for one request and is woken only by its result. A restart ends them, and clients poll
again."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Waiters:
    def __init__(self):
        #: request_id -> futures of the polls that wait for it; no entry without a waiting poll
        self._futures: dict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def __len__(self) -> int:
        return sum(map(len, self._futures.values()))

    async def wait(self, request_id: str, timeout_s: float) -> bool:
        """True when `wake` was called for the request in time."""
        future = asyncio.get_running_loop().create_future()
        self._futures[request_id].add(future)
        timer = future.get_loop().call_later(timeout_s, future.cancel)
        try:
            await future
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            return False
        finally:
            timer.cancel()
            waiting = self._futures[request_id]
            waiting.discard(future)
            if not waiting:
                del self._futures[request_id]
        return True

    def wake(self, request_id: str) -> None:
        for future in self._futures.get(request_id, ()):
            if not future.done():
                future.set_result(None)
