"""Carries out instructions: commands go to workers, bodies are read, changes become durable and then visible, files are
listed and deleted. The outcome returns to the state as the next fact.

A result is published after it is durable, and a file is deleted after the record that named it is gone, because both
wait for their turn in the outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from typing import Any

import anyio
import msgspec
import numpy as np

from tx_async.clock import Clock
from tx_async.errors import ContentLost, NotReady, StorageError
from tx_async.journal.journal import Journal
from tx_async.metrics import Metrics
from tx_async.scheduler.core.facts import (
    BodyLoaded,
    Fact,
    FilesListed,
    LiveRequested,
    RequestAccepted,
    ResultDurable,
)
from tx_async.scheduler.core.instructions import (
    Append,
    DeleteFiles,
    Deliver,
    Dismiss,
    FetchBody,
    Finish,
    Instruction,
    ListFiles,
    Publish,
    Send,
    SequenceEnded,
    Widen,
)
from tx_async.scheduler.core.marks import ReplayMarks
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.outbox import Item, Outbox
from tx_async.scheduler.stations.watch import Watch
from tx_async.tracing import Tracing
from tx_async.wire import operations
from tx_async.wire.records import ResultRecord
from tx_async.wire.worker import Command

READ_RETRY_S = 0.5
BODIES_READ_MAX = 16
"""How many bodies are read from the journal at the same time."""

_log = logging.getLogger(__name__)

SendCommand = Callable[[str, Command, Sequence[np.ndarray]], int]
"""Worker, command, tensors -> the command's number. Raises `NotReady` when the worker is gone."""
DismissWorker = Callable[[str, str], None]
"""Worker, reason."""
WidenWorker = Callable[[str, int], None]
"""Worker, rank."""
DeleteBelow = Callable[[str], Awaitable[Any]]
ListBelow = Callable[[str], Awaitable[Sequence[str]]]


class Performer:
    """Everything that the state does to the world, and everything that it hears, goes through here."""

    name = "performer"

    def __init__(
        self,
        state: SchedulerState,
        journal: Journal,
        clock: Clock,
        publish: Callable[[ResultRecord], None],
        *,
        send: SendCommand,
        delete_files: DeleteBelow,
        list_files: ListBelow,
        dismiss: DismissWorker = lambda worker_id, reason: None,
        widen: WidenWorker = lambda worker_id, lora_rank: None,
        marks: ReplayMarks,
        deliver: Callable[[Deliver], None] = lambda instruction: None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ):
        """`publish` is called with each result when it is durable, `deliver` with what live requests say."""
        self.state = state
        self.journal = journal
        self.clock = clock
        self.publish = publish
        self.outbox = Outbox(journal, self._show)
        self.watch = Watch(state.catalog, clock, metrics or Metrics(), tracing)
        self._send = send
        self._delete_files = delete_files
        self._list_files = list_files
        self._dismiss = dismiss
        self._widen = widen
        self._marks = marks
        self._deliver = deliver
        #: facts that arrived while one was being handled
        self._facts: deque[Fact] = deque()
        self._is_handling = False
        self._reading = asyncio.Semaphore(BODIES_READ_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        #: the error of which one of its tasks has died
        self._broken: BaseException | None = None
        self._is_broken = asyncio.Event()

    async def run(self) -> None:
        """Run until cancelled; then nothing that was begun goes on. A broken invariant in any task ends it, too."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.outbox.run)
                await self._is_broken.wait()
                assert self._broken is not None
                raise self._broken
        finally:
            for task in self._tasks:
                task.cancel()

    def spawn(self, coroutine: Coroutine[Any, Any, None], context: Context | None = None) -> asyncio.Task[None]:
        """context: None = the caller's, so that its lines are about the caller's request."""
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Begin a task whose fact somebody waits for: if its error were lost, the fact would never come."""
        self.spawn(coroutine, Context()).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._broken = error
            self._is_broken.set()

    # ---- facts in

    def handle(self, fact: Fact) -> None:
        """Handle one fact at a time: facts that result from it are handled afterwards."""
        self._facts.append(fact)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._facts:
                self._handle(self._facts.popleft())
        finally:
            self._is_handling = False

    def _handle(self, fact: Fact) -> None:
        if isinstance(fact, RequestAccepted | LiveRequested):
            self.watch.accepted(fact.request)
        instructions = self.state.handle(fact, self.clock.now())
        if instructions and _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", fact.cause, ", ".join(type(instruction).__name__ for instruction in instructions))
        self.perform(instructions)

    async def handle_durably(self, fact: Fact) -> None:
        """Handle a fact, and wait until what was decided about it is durable. A full disk only delays that."""
        self.handle(fact)
        await self.outbox.flush()

    # ---- instructions out

    def perform(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._perform_send(instruction)
                case Publish(result=result):
                    self.watch.published(result.request_id)
                    self.publish(result)
                case Deliver():
                    self.watch.delivered(instruction)
                    self._deliver(instruction)
                case SequenceEnded():
                    self.watch.sequence_ended(instruction)
                case Finish(result=result):
                    self.watch.finished(result)
                    self.outbox.post(instruction)
                case Dismiss():
                    self._dismiss(instruction.worker_id, instruction.reason)
                case Widen():
                    self._widen(instruction.worker_id, instruction.lora_rank)
                case FetchBody():
                    self._begin(self._fetch_body(instruction))
                case ListFiles():
                    self._begin(self._list(instruction))
                case _:
                    self.outbox.post(instruction)

    def _perform_send(self, instruction: Send) -> None:
        try:
            number = self._send(instruction.worker_id, instruction.command, instruction.tensors)
        except NotReady:
            _log.debug("%s: %s is gone, and `WorkerLost` is on its way", instruction.cause, instruction.worker_id)
            return
        self.watch.sent(instruction)
        assert number == instruction.number, f"command {instruction.number} was sent as {number}"

    async def _fetch_body(self, instruction: FetchBody) -> None:
        request_id, operation, message = instruction.request_id, None, ""
        try:
            async with self._reading:
                body = await self._read_body(request_id)
            with self._marks.of("read", request_id):
                operation = operations.decode(body)
        except (ContentLost, msgspec.DecodeError) as error:
            message = str(error)
            _log.error("%s: the body of request %s is lost: %s", instruction.cause, request_id, error)
        self.handle(BodyLoaded(request_id, operation, message))

    async def _read_body(self, request_id: str) -> bytes:
        """Read until it succeeds: a database that does not answer now has lost nothing. Raises `ContentLost`."""
        while True:
            try:
                return await self.journal.read_body(request_id)
            except ContentLost:
                raise
            except StorageError as error:
                _log.error("A replay waits for the journal: %s", error)
                await asyncio.sleep(READ_RETRY_S)

    async def _list(self, instruction: ListFiles) -> None:
        keys = None
        try:
            keys = tuple(await self._list_files(instruction.prefix))
        except StorageError as error:
            _log.warning("%s: files of %s were not listed: %s", instruction.cause, instruction.prefix, error)
        self.handle(FilesListed(instruction.model_id, keys))

    # ---- durable: visible

    def _show(self, item: Item) -> None:
        match item:
            case Finish(result=result):
                self.handle(ResultDurable(result))
            case DeleteFiles():
                self._begin(self._delete(item))
            case Append():
                pass  # its records are in the catalog already

    async def _delete(self, instruction: DeleteFiles) -> None:
        try:
            await self._delete_files(instruction.storage_key)
        except StorageError as error:
            _log.warning("%s: files of %s were not deleted: %s", instruction.cause, instruction.storage_key, error)
