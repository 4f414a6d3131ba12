"""The live samples of one request's prompts, as one stream of pieces that ends with the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from tx_async.api.context import Call
from tx_async.scheduler.interface import LivePiece
from tx_async.wire.operations import Sample

T = TypeVar("T")

PromptPiece = tuple[int, LivePiece]
"""The prompt's number, and the piece that came."""
PATIENCE_S = 10.0
"""A client that asked for a stream hears something at least this often."""


class Samples:
    """Runs operations side by side. `close` ends those that still run; it must be called."""

    def __init__(self, call: Call, operations: Sequence[Sample], model_path: str | None):
        self._arrived: asyncio.Queue[PromptPiece | BaseException | None] = asyncio.Queue()
        self._num_running = len(operations)
        self._early: list[PromptPiece | None] = []
        # One task each: a generator is used by one task from its beginning to its end.
        self._tasks = [
            asyncio.create_task(self._pump(call, prompt, operation, model_path))
            for prompt, operation in enumerate(operations)
        ]

    def __repr__(self) -> str:
        return f"<Samples [{self._num_running} of {len(self._tasks)} prompts running]>"

    async def _pump(self, call: Call, prompt: int, operation: Sample, model_path: str | None) -> None:
        try:
            async with aclosing(call.scheduler.sample_live(call.owner, operation, model_path)) as pieces:
                async for piece in pieces:
                    self._arrived.put_nowait((prompt, piece))
            self._arrived.put_nowait(None)
        except Exception as error:
            self._arrived.put_nowait(error)

    async def begin(self) -> None:
        """Wait for the first piece, or a while: a refused request gets its error before a stream begins."""
        self._early.append(await self._next(PATIENCE_S))

    async def pieces(self, timeout_s: float | None = None) -> AsyncIterator[PromptPiece | None]:
        """All pieces until all samples have ended; None when nothing came for `timeout_s`."""
        while self._early:
            if (piece := self._early.pop(0)) is not None:
                yield piece
        while self._num_running:
            if (piece := await self._next(timeout_s)) is not None or self._num_running:
                yield piece
            # A queue that has something hands it out without a pause: hundreds of pieces would hold up all others.
            await asyncio.sleep(0)

    async def _next(self, timeout_s: float | None) -> PromptPiece | None:
        """The next piece. Raises the error with which a sample failed."""
        while self._num_running:
            try:
                async with asyncio.timeout(timeout_s):
                    arrived = await self._arrived.get()
            except TimeoutError:
                return None
            if isinstance(arrived, BaseException):
                raise arrived
            if arrived is not None:
                return arrived
            self._num_running -= 1
        return None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result. Raises `ClientDisconnect`, and ends the work, as soon as nobody waits for it."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
