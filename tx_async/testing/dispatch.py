"""A router and its worker processes, for tests and measurements of whatever lies behind `Router.send`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import numpy as np

from tx_async.config import ServerConfig
from tx_async.dispatch.router import Router
from tx_async.wire.facts import CommandEnded, WorkerFact, WorkerProgress, WorkerReady
from tx_async.wire.worker import Command
from tx_async.worker.supervisor import Supervisor

FAKE_ENGINE = "tx_async.testing.fake_engine:create"
STOP_S = 5.0

E = TypeVar("E")


class RunningDispatch:
    """What a test holds in its hand: the parts, and every fact in order."""

    def __init__(self, router: Router, supervisor: Supervisor, events: asyncio.Queue[WorkerFact]):
        self.router = router
        self.supervisor = supervisor
        self.events = events

    async def next(self, kind: type[E], timeout_s: float = 20.0) -> E:
        """The next event of a kind; progress in between is passed over, anything else is an error."""
        async with asyncio.timeout(timeout_s):
            while not isinstance(event := await self.events.get(), kind):
                if not isinstance(event, WorkerProgress):
                    raise AssertionError(f"waiting for {kind.__name__}, got {event}")
        return event

    async def ready(self) -> WorkerReady:
        return await self.next(WorkerReady)

    async def finished(self, timeout_s: float = 20.0) -> CommandEnded:
        """The end of the next command, which must not have failed."""
        ended = await self.next(CommandEnded, timeout_s)
        assert ended.failure is None, ended
        return ended

    async def call(self, command: Command, tensors: Sequence[np.ndarray] = (), worker_id: str = "w0") -> CommandEnded:
        """Send one command and wait for how it ended."""
        number = self.router.send(worker_id, command, tensors)
        ended = await self.next(CommandEnded)
        assert ended.number == number
        return ended


@contextlib.asynccontextmanager
async def running_dispatch(config: ServerConfig, *, engine: str = FAKE_ENGINE) -> AsyncIterator[RunningDispatch]:
    """Start `config.local_workers` real processes, and leave none behind."""
    events: asyncio.Queue[WorkerFact] = asyncio.Queue()
    router = Router(config, events.put_nowait)
    await router.start()
    supervisor = Supervisor(config, router, engine=engine)
    tasks = [asyncio.create_task(router.run()), asyncio.create_task(supervisor.run())]
    try:
        yield RunningDispatch(router, supervisor, events)
    finally:
        await supervisor.stop(STOP_S)
        await router.stop()
        tasks[0].cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition that no event announces. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it may be in another process, or on another thread
            await asyncio.sleep(0.02)
