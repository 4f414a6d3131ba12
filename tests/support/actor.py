"""A scheduler in this process: the real actor and the real journal on a disk in memory, and a worker that answers in
the next turn of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np

from tests.support.chain_engine import ChainEngine, Storage
from tests.support.simulated_clients import BASE
from tests.support.simulation import INFO
from tx_async.config import ServerConfig
from tx_async.errors import NotReady, TxError
from tx_async.journal.journal import Journal
from tx_async.scheduler.scheduler import Scheduler
from tx_async.testing.memory_journal import MemoryDisk, MemoryJournal
from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerReady
from tx_async.wire.worker import Command, CommandFailed, CommandFinished, SaveAdapter


class InProcessServer:
    """A scheduler, its journal, and a worker that answers in the next turn of the loop."""

    def __init__(self, disk: MemoryDisk, storage: Storage, config: ServerConfig):
        self.disk, self.storage, self.config = disk, storage, config
        self.driver = MemoryJournal(disk)
        self.journal = Journal(self.driver)
        self.engine = ChainEngine(INFO, storage)
        self.numbers = 0
        self.commands: list[Command] = []
        self.deleted: list[str] = []
        self.is_worker_stuck = False
        self.worker_status: Callable[[bool], list[str]] = lambda in_full: []

    async def open(self) -> None:
        records = await self.journal.open()
        self.scheduler = Scheduler(
            self.config,
            BASE,
            self.journal,
            records,
            send=self.send,
            delete_files=self.delete,
            list_files=self.list,
            worker_status=lambda in_full: self.worker_status(in_full),
        )

    def lose_worker(self) -> None:
        """It dies with everything it had; another one attaches."""
        self.scheduler.tell(WorkerLost("w0", "crash"))
        self.engine = ChainEngine(INFO, self.storage)
        self.attach()

    def attach(self) -> None:
        self.numbers = 0
        self.scheduler.tell(WorkerReady("w0", INFO, frozenset({"train", "sample"})))

    def send(self, worker_id: str, command: Command, tensors: Sequence[np.ndarray]) -> int:
        if worker_id != "w0":
            raise NotReady()
        self.numbers += 1
        self.commands.append(command)
        if not self.is_worker_stuck:
            copies = [np.array(tensor) for tensor in tensors]
            asyncio.get_running_loop().call_soon(self.answer, self.engine, self.numbers, command, copies)
        return self.numbers

    def answer(self, engine: ChainEngine, number: int, command: Command, tensors: list[np.ndarray]) -> None:
        if engine is not self.engine:
            return  # the worker that had the command is dead
        try:
            result, arrays = engine.execute(command, tensors)
            if isinstance(command, SaveAdapter):
                engine.finish_save(command.key)
        except TxError as error:
            failed = CommandFailed(number=number, category=error.category, message=error.message)
            self.scheduler.tell(CommandEnded("w0", failed))
            return
        finished = CommandFinished(number=number, result=result, elapsed_ms=1.0)
        self.scheduler.tell(CommandEnded("w0", finished, arrays))

    async def list(self, prefix: str) -> list[str]:
        return self.storage.list(prefix)

    async def delete(self, key: str) -> None:
        self.deleted.append(key)
        self.storage.delete(key)


@asynccontextmanager
async def running(
    disk: MemoryDisk | None = None, storage: Storage | None = None, worker: bool = True, **settings: Any
) -> AsyncIterator[InProcessServer]:
    server = InProcessServer(disk or MemoryDisk(), storage or Storage(), ServerConfig(**settings))
    await server.open()
    async with anyio.create_task_group() as group:
        group.start_soon(server.scheduler.run)
        await anyio.lowlevel.checkpoint()
        if worker:
            server.attach()
        yield server
        group.cancel_scope.cancel()
    server.driver.crash()
    await server.journal.close()
