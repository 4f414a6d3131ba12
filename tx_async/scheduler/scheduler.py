"""The scheduler actor: performs what `SchedulerState` decides, and answers the API.

Order of things on disk, and what a crash leaves:
- A request is accepted after its record and body are durable; only then is it given to the state and does the client
  learn its id. A crash before: the client retries. After: recovery finds it and runs it.
- A result is published after it is durable. A crash before: the request runs again, with the same outcome.
- A file is deleted after the record that named it is gone. A crash between: an orphan, never a dangling name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import msgspec
import numpy as np

from tx_async.clock import Clock, SystemClock
from tx_async.config import ServerConfig
from tx_async.dispatch import events as dispatch
from tx_async.errors import (
    Conflict,
    ContentLost,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    ResultGone,
    SessionGone,
    StorageError,
    UnknownCheckpoint,
    UnknownSampler,
    UnknownSession,
    UserError,
)
from tx_async.journal.journal import Journal
from tx_async.scheduler import submissions
from tx_async.scheduler.catalog import Catalog
from tx_async.scheduler.events import (
    Append,
    BodyLoaded,
    CommandFailed,
    CommandFinished,
    DeleteFiles,
    Fact,
    FetchBody,
    FilesListed,
    Finish,
    Instruction,
    ListFiles,
    RequestAccepted,
    RequestCancelled,
    Send,
    SessionEnded,
    Tick,
    WorkerLost,
    WorkerReady,
)
from tx_async.scheduler.interface import BaseModelInfo, StillPending
from tx_async.scheduler.outbox import Item, Outbox
from tx_async.scheduler.payload_cache import PayloadCache
from tx_async.scheduler.policy import Policy
from tx_async.scheduler.quota import Quota
from tx_async.scheduler.state import SchedulerState
from tx_async.scheduler.waiters import Waiters
from tx_async.wire import ids, operations, results
from tx_async.wire.operations import CreateModel, CreateModelFromCheckpoint, Operation
from tx_async.wire.records import (
    Change,
    CheckpointRecord,
    Delete,
    ModelRecord,
    Put,
    Record,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)
from tx_async.wire.results import Failure
from tx_async.wire.worker import AdapterConfig, Command

TICK_S = 1.0
DRAIN_INTERVAL_S = 0.02
READ_RETRY_S = 0.5
BODIES_READ_MAX = 16
"""Bodies that are read from the journal at the same time."""

_log = logging.getLogger(__name__)


class Accepting(msgspec.Struct, frozen=True):
    """A submission whose commit is on its way."""

    request: RequestRecord
    task: asyncio.Task[None]


class Scheduler:
    """Implements `interface.SchedulerApi`."""

    def __init__(
        self,
        config: ServerConfig,
        base_model: BaseModelInfo,
        journal: Journal,
        records: Iterable[Record],
        *,
        send: Callable[[str, Command, Sequence[np.ndarray]], int],
        delete_files: Callable[[str], Awaitable[Any]],
        list_files: Callable[[str], Awaitable[Sequence[str]]],
        worker_status: Callable[[], list[str]],
        clock: Clock | None = None,
    ):
        self.config = config
        self.base_model = base_model
        self.journal = journal
        self.clock = clock or SystemClock()
        self._send = send
        self._delete_files = delete_files
        self._list_files = list_files
        self._worker_status = worker_status
        self.catalog = Catalog(records)
        self.state = SchedulerState(self.catalog, base_model, policy_of(config), self.clock.now())
        self.waiters = Waiters()
        self.payloads = PayloadCache(config.result_cache_bytes)
        self.quota = Quota(config)
        self.outbox = Outbox(journal, self._show)
        #: (subject, seq_id) -> submissions whose commit is on its way
        self._accepting: dict[tuple[str, int], Accepting] = {}
        #: session_id -> when it was last heard of (monotonic)
        self._last_seen = {s.session_id: self.clock.monotonic() for s in self.catalog.sessions.values()}
        #: facts that arrived while one was being handled
        self._facts: deque[Fact] = deque()
        self._is_handling = False
        self._reading = asyncio.Semaphore(BODIES_READ_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        #: when replays were first seen (monotonic), and the most there were; None and 0 when there are none
        self._recovery_began: float | None = None
        self._num_replays = 0

    def __repr__(self) -> str:
        return repr(self.state)

    # ---- its own life

    async def run(self) -> None:
        """Recover, then serve until cancelled. A broken invariant ends it, and with it the process."""
        self._recover()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.outbox.run)
                group.start_soon(self._tick_for_ever)
        finally:
            for task in self._tasks:
                task.cancel()

    def _recover(self) -> None:
        for request in self.catalog.requests.values():
            if request.request_id not in self.catalog.results:
                self.quota.take(request)
        self._perform(self.state.restore())

    async def stop(self, timeout_s: float) -> None:
        """Refuse new work and snapshot what would otherwise have to be replayed, for at most `timeout_s`."""
        self._is_stopping = True
        with anyio.move_on_after(timeout_s):
            while True:
                instructions, is_busy = self.state.drain(self.clock.now())
                self._perform(instructions)
                if not is_busy and not len(self.outbox):
                    break
                await anyio.sleep(DRAIN_INTERVAL_S)

    async def _tick_for_ever(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            self._handle(Tick())
            self._expire_sessions()
            self._report_recovery()

    def _report_recovery(self) -> None:
        """One line a second while runs repeat what a crash has taken from the device."""
        left = self.state.training.runs.num_replays
        if left:
            if self._recovery_began is None:
                self._recovery_began = self.clock.monotonic()
            self._num_replays = max(self._num_replays, left)
            done = self._num_replays - left
            bar = "█" * (20 * done // self._num_replays)
            _log.info("Recovery: %-20s %d of %d operations have run again", bar, done, self._num_replays)
        elif self._recovery_began is not None:
            took = self.clock.monotonic() - self._recovery_began
            _log.info("Recovery: all %d operations have run again, in %.1f s", self._num_replays, took)
            self._recovery_began, self._num_replays = None, 0

    def on_event(self, event: dispatch.Event) -> None:
        """What the router says."""
        match event:
            case dispatch.BatchFinished():
                self._handle(
                    CommandFinished(event.worker_id, event.number, event.result, event.tensors, event.elapsed_ms)
                )
                event.release()
            case dispatch.BatchFailed(fatal=False):
                self._handle(CommandFailed(event.worker_id, event.number, event.category, event.message))
            case dispatch.WorkerReady():
                self._handle(WorkerReady(event.worker_id, event.info, event.capabilities))
            case dispatch.WorkerLost():
                _log.warning("Worker %s is lost: %s", event.worker_id, event.reason)
                self._handle(WorkerLost(event.worker_id, event.reason))
            case dispatch.BatchFailed() | dispatch.WorkerProgress():
                pass  # after a fatal failure the worker is lost, and what it had runs again

    # ---- facts and instructions

    def _handle(self, fact: Fact) -> None:
        """One fact at a time: what performing one brings about is handled after it."""
        self._facts.append(fact)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._facts:
                self._perform(self.state.handle(self._facts.popleft(), self.clock.now()))
        finally:
            self._is_handling = False

    def _perform(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._perform_send(instruction)
                case FetchBody():
                    self._spawn(self._fetch_body(instruction.request_id))
                case ListFiles():
                    self._spawn(self._list(instruction))
                case _:
                    self.outbox.post(instruction)

    def _perform_send(self, instruction: Send) -> None:
        try:
            number = self._send(instruction.worker_id, instruction.command, instruction.tensors)
        except NotReady:
            return  # it is gone; `WorkerLost` is on its way
        assert number == instruction.number, f"command {instruction.number} was sent as {number}"

    async def _fetch_body(self, request_id: str) -> None:
        operation, message = None, ""
        try:
            async with self._reading:
                operation = operations.decode(await self._read_body(request_id))
        except (ContentLost, msgspec.DecodeError) as error:
            message = str(error)
            _log.error("The body of request %s is lost: %s", request_id, error)
        self._handle(BodyLoaded(request_id, operation, message))

    async def _read_body(self, request_id: str) -> bytes:
        """Until it succeeds: a database that does not answer now has lost nothing. Raises `ContentLost`."""
        while True:
            try:
                return await self.journal.read_body(request_id)
            except ContentLost:
                raise
            except StorageError as error:
                _log.error("A replay waits for the journal: %s", error)
                await anyio.sleep(READ_RETRY_S)

    def _show(self, item: Item) -> None:
        """The item is durable: clients may see it, and files that nothing names any more may go."""
        match item:
            case Finish(result=result):
                self._publish(result)
            case DeleteFiles(storage_key=key):
                self._spawn(self._delete(key))

    def _publish(self, result: ResultRecord) -> None:
        self.catalog.apply([Put(result)])
        self.quota.give_back(result.request_id)
        self.payloads.put(result)
        self.waiters.wake(result.request_id)

    async def _delete(self, storage_key: str) -> None:
        try:
            await self._delete_files(storage_key)
        except StorageError as error:
            _log.warning("Files of %s were not deleted: %s", storage_key, error)

    async def _list(self, instruction: ListFiles) -> None:
        keys = None
        try:
            keys = tuple(await self._list_files(instruction.prefix))
        except StorageError as error:
            _log.warning("Files of %s were not listed: %s", instruction.prefix, error)
        self._handle(FilesListed(instruction.model_id, keys))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _decide(self, *changes: Change) -> Awaitable[None]:
        """Change known records now; the awaitable is done when that is durable. A full disk only delays it."""
        self.catalog.apply(changes)
        return self.outbox.commit(changes)

    # ---- views

    @property
    def sessions(self) -> dict[str, SessionRecord]:
        return self.catalog.sessions

    @property
    def models(self) -> dict[str, ModelRecord]:
        return self.catalog.models

    @property
    def samplers(self) -> dict[str, SamplerRecord]:
        return self.catalog.samplers

    @property
    def checkpoints(self) -> dict[str, CheckpointRecord]:
        return self.catalog.checkpoints

    def waiting_for(self) -> list[str]:
        capabilities = {c for worker in self.state.workers.values() for c in worker.capabilities}
        if capabilities >= {"train", "sample"}:
            return []
        return self._worker_status() or ["a worker: none is attached"]

    def statistics(self) -> dict[str, float]:
        return {
            "sessions": len(self.catalog.sessions),
            "models": len(self.catalog.models),
            "requests_unfinished": len(self.quota),
            "results_kept": len(self.catalog.results),
            "polls_waiting": len(self.waiters),
            "samples_open": len(self.state.rollouts.jobs),
            "workers_ready": len(self.state.workers),
            "operations_to_replay": self.state.training.runs.num_replays,
            "commands_in_flight": sum(len(worker.in_flight) for worker in self.state.workers.values()),
        }

    # ---- sessions

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        self._refuse_when_stopping()
        await self.journal.commit([Put(session)])
        self.catalog.apply([Put(session)])
        self._last_seen[session.session_id] = self.clock.monotonic()
        return session

    def heartbeat(self, owner: str, session_id: str) -> None:
        session = self._session(owner, session_id)
        if session.status not in ("active", "expired"):
            raise SessionGone()
        self._seen(session)

    def _session(self, owner: str, session_id: str) -> SessionRecord:
        session = self.catalog.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise UnknownSession()
        return session

    def _seen(self, session: SessionRecord) -> None:
        self._last_seen[session.session_id] = self.clock.monotonic()
        if session.status == "expired":  # it only slept
            self._replace_session(session, status="active")

    def _replace_session(self, session: SessionRecord, **fields: Any) -> None:
        change = Put(msgspec.structs.replace(session, **fields))
        self.catalog.apply([change])
        self._perform([Append((change,))])

    def _expire_sessions(self) -> None:
        now = self.clock.monotonic()
        for session_id, seen in list(self._last_seen.items()):
            session = self.catalog.sessions.get(session_id)
            if session is None:
                del self._last_seen[session_id]
            elif session.status == "active" and now - seen > self.config.session_timeout_s:
                self._replace_session(session, status="expired")
                self._handle(SessionEnded(session_id))

    async def finish_session(self, owner: str, session_id: str, status: str, detail: str | None) -> None:
        session = self._session(owner, session_id)
        if session.status in ("active", "expired"):
            durable = self._decide(Put(msgspec.structs.replace(session, status=status, detail=detail)))
            self._handle(SessionEnded(session_id))
            await durable

    async def update_session(self, owner: str, session: SessionRecord) -> None:
        known = self._session(owner, session.session_id)
        await self._decide(Put(msgspec.structs.replace(known, project_id=session.project_id)))

    # ---- samplers

    async def create_sampler(
        self, owner: str, session_id: str, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        self._refuse_when_stopping()
        session = self._session(owner, session_id)
        self._seen(session)
        if base_model is not None and base_model != self.base_model.name:
            raise InvalidRequest(
                f"base_model {base_model!r} is not served here; this server has {self.base_model.name!r}."
            )
        sampler_id = ids.sampler_id(session_id, sampling_session_seq_id)
        if existing := self.catalog.samplers.get(sampler_id):
            if existing.model_path != model_path:
                raise Conflict(f"{sampler_id} was created before, for other weights. Use the next sequence number.")
            return existing
        checkpoint = self.catalog.find_checkpoint(owner, model_path) if model_path else None
        sampler = SamplerRecord(
            sampler_id=sampler_id,
            session_id=session_id,
            owner=owner,
            base_model=self.base_model.name,
            created_at=self.clock.now(),
            model_path=model_path,
            storage_key=checkpoint.storage_key if checkpoint else None,
        )
        await self._decide(Put(sampler))
        return sampler

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        sampler = self.catalog.samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise UnknownSampler()
        joined = msgspec.structs.replace(sampler, num_clones=sampler.num_clones + 1)
        await self._decide(Put(joined))
        return joined.num_clones

    # ---- requests

    async def submit(self, owner: str, operation: Operation) -> RequestRecord:
        if session := submissions.session_of(self.catalog, owner, operation):
            self._seen(session)
        key = submissions.key_of(operation)
        body = operations.encode(operation)
        digest = operations.body_digest(body)
        if known := self.catalog.find_request(*key):
            return submissions.same(known, digest)
        try:
            accepting = self._accepting.get(key) or self._begin(key, owner, operation, body, digest)
            request = submissions.same(accepting.request, digest)
            # A client that gives up must not take back what may be durable already.
            await asyncio.shield(accepting.task)
        except (Overloaded, StorageError):
            self.state.training.runs.heard_of(key[0], self.clock.now())  # it will come again: its number is not burned
            raise
        return request

    def _begin(self, key: tuple[str, int], owner: str, operation: Operation, body: bytes, digest: str) -> Accepting:
        self._refuse_when_stopping()
        request = submissions.new_request(
            self.state.training.runs, ids.new_id("r"), owner, operation, digest, len(body), self.clock.now()
        )
        self.quota.check(request)
        self.quota.take(request)
        accepting = Accepting(request, self._spawn(self._accept(request, operation, body)))
        self._accepting[key] = accepting
        accepting.task.add_done_callback(lambda task: self._accepted(key, request, task))
        return accepting

    def _accepted(self, key: tuple[str, int], request: RequestRecord, task: asyncio.Task[None]) -> None:
        del self._accepting[key]
        if task.cancelled() or task.exception() is not None:
            self.quota.give_back(request.request_id)

    async def _accept(self, request: RequestRecord, operation: Operation, body: bytes) -> None:
        match operation:
            case CreateModel():
                await self._create_model(request, operation)
            case CreateModelFromCheckpoint():
                await self._create_model_from_checkpoint(request, operation, body)
            case _:
                await self._commit_new(Put(request, body))
                self._handle(RequestAccepted(request, operation))

    async def _commit_new(self, *changes: Change) -> None:
        """Records under new keys: they exist when they are durable. Raises `StorageError`, `Overloaded`."""
        await self.journal.commit(changes)
        self.catalog.apply(changes)

    async def _create_model(self, request: RequestRecord, operation: CreateModel) -> None:
        """Needs no device: the adapter is made from its seed when it is first used."""
        model = self._new_model(request, operation, operation.lora)
        body = results.encode_json({"type": "create_model", "model_id": model.model_id})
        result = ResultRecord(request_id=request.request_id, finished_at=self.clock.now(), content="json", payload=body)
        await self._commit_new(Put(model), Put(request), Put(result))
        self.state.create_model(model)
        self._publish(result)

    async def _create_model_from_checkpoint(
        self, request: RequestRecord, operation: CreateModelFromCheckpoint, body: bytes
    ) -> None:
        try:
            checkpoint = self.catalog.find_checkpoint(request.owner, operation.path, operation.optimizer)
        except UserError as error:
            payload = results.encode_json(Failure.of(error))
            result = ResultRecord(
                request_id=request.request_id, finished_at=self.clock.now(), content="error", payload=payload
            )
            await self._commit_new(Put(request), Put(result))
            self._publish(result)
            return
        model = msgspec.structs.replace(
            self._new_model(request, operation, checkpoint.lora),
            created_from=checkpoint.storage_key,
            created_from_path=checkpoint.path,
            created_with_optimizer=operation.optimizer,
        )
        await self._commit_new(Put(model), Put(request, body))
        self.state.create_model(model)
        self._handle(RequestAccepted(request, operation))

    def _new_model(
        self, request: RequestRecord, operation: CreateModel | CreateModelFromCheckpoint, lora: AdapterConfig
    ) -> ModelRecord:
        return ModelRecord(
            model_id=operation.model_id,
            session_id=operation.session_id,
            owner=request.owner,
            base_model=self.base_model.name,
            lora=lora,
            created_at=self.clock.now(),
            user_metadata=operation.user_metadata,
            last_request_at=self.clock.now(),
        )

    async def retrieve(self, owner: str, request_id: str, timeout_s: float) -> ResultRecord | StillPending:
        request = self.catalog.requests.get(request_id)
        if request is None or request.owner != owner:
            raise ResultGone()
        if request_id not in self.catalog.results and not await self.waiters.wait(request_id, timeout_s):
            return self._still_pending()
        if result := self.payloads.get(request_id):
            return result
        with suppress(NotFound):
            return await self.journal.read_result(request_id)
        raise ResultGone()

    def _still_pending(self) -> StillPending:
        waiting = self.waiting_for()
        return StillPending("paused_capacity", "Waiting for " + "; ".join(waiting)) if waiting else StillPending()

    async def cancel(self, owner: str, request_id: str) -> None:
        request = self.catalog.requests.get(request_id)
        if request is not None and request.owner == owner:
            self._handle(RequestCancelled(request_id))

    # ---- checkpoints

    def _checkpoint(self, owner: str, path: str) -> CheckpointRecord:
        checkpoint = self.catalog.checkpoints.get(path)
        if checkpoint is None or checkpoint.owner != owner:
            raise UnknownCheckpoint()
        return checkpoint

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        changed = msgspec.structs.replace(
            self._checkpoint(owner, checkpoint.path),
            public=checkpoint.public,
            expires_at=checkpoint.expires_at,
            user_metadata=checkpoint.user_metadata,
        )
        await self._decide(Put(changed))

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        checkpoint = self._checkpoint(owner, path)
        durable = self._decide(Delete("checkpoint", path))
        self.state.decisions.delete_files(checkpoint.storage_key)
        self._perform(self.state.decisions.take())
        await durable

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        """The copy names the same immutable files; they go when nothing names them any more."""
        source = self.catalog.find_checkpoint(owner, path)
        model_id = ids.model_id(session_id, model_seq_id)
        copied_path = f"tinker://{model_id}/{source.kind}/{source.name}"
        if existing := self.catalog.checkpoints.get(copied_path):
            return self._checkpoint(owner, existing.path)
        now = self.clock.now()
        model = ModelRecord(
            model_id=model_id,
            session_id=session_id,
            owner=owner,
            base_model=source.base_model,
            lora=source.lora,
            created_at=now,
            last_request_at=now,
            status="copy",
        )
        copied = msgspec.structs.replace(
            source, path=copied_path, model_id=model_id, owner=owner, created_at=now, public=False, expires_at=None
        )
        await self._decide(Put(model), Put(copied))
        return copied

    def _refuse_when_stopping(self) -> None:
        if self._is_stopping:
            raise NotReady("The server is shutting down. Try again when it is back.")


def policy_of(config: ServerConfig) -> Policy:
    return Policy(
        quanta_in_flight_max=config.commands_in_flight_max,
        train_share=config.train_share,
        sample_share=config.sample_share,
        seq_gap_s=config.seq_gap_ms / 1000,
        chunk_gap_s=config.chunk_gap_ms / 1000,
        snapshot_every_steps=config.snapshot_every_steps,
        snapshot_every_bytes=config.snapshot_every_bytes,
        snapshot_idle_s=config.snapshot_idle_s,
        result_retention_s=config.result_retention_s,
        results_kept_max=config.results_kept_max,
        session_retention_s=config.session_retention_s,
        retention_interval_s=config.retention_interval_s,
    )
