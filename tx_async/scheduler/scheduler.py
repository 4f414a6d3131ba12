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
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

import anyio
import msgspec
import numpy as np

from tx_async.actor import Mailbox
from tx_async.clock import Clock, SystemClock
from tx_async.config import ServerConfig
from tx_async.dispatch import events as dispatch
from tx_async.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    ResultGone,
    SessionGone,
    StorageError,
    UnknownCheckpoint,
    UnknownModel,
    UnknownSampler,
    UnknownSession,
    UserError,
)
from tx_async.journal.journal import Journal
from tx_async.scheduler.catalog import Catalog
from tx_async.scheduler.events import (
    Append,
    BodyLoaded,
    CommandFailed,
    CommandFinished,
    DeleteFiles,
    Fact,
    FetchBody,
    Finish,
    Instruction,
    RequestAccepted,
    RequestCancelled,
    Send,
    Tick,
    WorkerLost,
    WorkerReady,
)
from tx_async.scheduler.interface import BaseModelInfo, StillPending
from tx_async.scheduler.payload_cache import PayloadCache
from tx_async.scheduler.policy import Policy
from tx_async.scheduler.retention import Limits, expired
from tx_async.scheduler.state import SchedulerState
from tx_async.scheduler.waiters import Waiters
from tx_async.wire import ids, operations, results
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    ForwardBackward,
    Operation,
    Sample,
    UnloadModel,
)
from tx_async.wire.records import (
    Change,
    CheckpointRecord,
    Delete,
    DropBody,
    ModelRecord,
    Put,
    Record,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)
from tx_async.wire.results import Failure
from tx_async.wire.worker import Command

TICK_S = 1.0
RETENTION_INTERVAL_S = 60.0
COMMIT_RETRY_S = 0.5
UNLOAD_SEQ_ID = -1
"""unload_model carries no seq_id; a second one is the first one's retry."""

_log = logging.getLogger(__name__)


class Unfinished(msgspec.Struct, frozen=True):
    """What an accepted request counts against the limits until it ends."""

    owner: str
    num_bytes: int
    num_samples: int


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
        delete_files: Callable[[str], Awaitable[None]],
        worker_status: Callable[[], list[str]],
        clock: Clock | None = None,
    ):
        self.config = config
        self.base_model = base_model
        self.journal = journal
        self.clock = clock or SystemClock()
        self._send = send
        self._delete_files = delete_files
        self._worker_status = worker_status
        self.catalog = Catalog(records)
        self.state = SchedulerState(self.catalog, base_model, _policy(config), self.clock.now())
        self.waiters = Waiters()
        self.payloads = PayloadCache(config.result_cache_bytes)
        #: (subject, seq_id) -> (body digest, outcome) of submissions whose commit is on its way
        self._accepting: dict[tuple[str, int], tuple[str, asyncio.Future[RequestRecord]]] = {}
        #: accepted and not finished, by request_id
        self._unfinished: dict[str, Unfinished] = {}
        #: session_id -> when it was last heard of (monotonic)
        self._last_seen = {s.session_id: self.clock.monotonic() for s in self.catalog.sessions.values()}
        #: facts that arrived while one was being handled
        self._facts: deque[Fact] = deque()
        self._handling = False
        #: instructions that wait for the journal, in order
        self._outbox: Mailbox[Append | Finish | DeleteFiles] = Mailbox(messages_max=1_000_000)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._last_retention = self.clock.monotonic()

    def __repr__(self) -> str:
        return repr(self.state)

    # ---- its own life

    async def run(self) -> None:
        """Recover, then serve until cancelled. A broken invariant ends it, and with it the process."""
        self._recover()
        async with anyio.create_task_group() as group:
            group.start_soon(self._write_for_ever)
            group.start_soon(self._tick_for_ever)

    def _recover(self) -> None:
        for request in self.catalog.requests.values():
            if request.request_id not in self.catalog.results:
                self._unfinished[request.request_id] = _unfinished(request)
        self._perform(self.state.restore())

    async def stop(self, timeout_s: float) -> None:
        """Refuse new work and snapshot what would otherwise have to be replayed, for at most `timeout_s`."""
        self._stopping = True
        with anyio.move_on_after(timeout_s):
            while True:
                instructions, pending = self.state.request_shutdown(self.clock.now())
                self._perform(instructions)
                if not pending and not len(self._outbox):
                    break
                await anyio.sleep(0.02)

    def on_event(self, event: dispatch.Event) -> None:
        """What the router says."""
        match event:
            case dispatch.BatchFinished():
                self._handle(
                    CommandFinished(event.worker_id, event.number, event.result, event.tensors, event.elapsed_ms)
                )
                event.release()
            case dispatch.BatchFailed():
                self._handle(CommandFailed(event.worker_id, event.number, event.category, event.message))
            case dispatch.WorkerReady():
                self._handle(WorkerReady(event.worker_id, event.info, event.capabilities))
            case dispatch.WorkerLost():
                _log.warning("Worker %s is lost: %s", event.worker_id, event.reason)
                self._handle(WorkerLost(event.worker_id, event.reason))
            case dispatch.WorkerProgress():
                pass

    def _handle(self, fact: Fact) -> None:
        """One fact at a time: what performing one brings about is handled after it."""
        self._facts.append(fact)
        if self._handling:
            return
        self._handling = True
        try:
            while self._facts:
                self._perform(self.state.handle(self._facts.popleft(), self.clock.now()))
        finally:
            self._handling = False

    def _perform(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._perform_send(instruction)
                case FetchBody():
                    self._spawn(self._fetch_body(instruction.request_id))
                case _:
                    self._outbox.post(instruction)

    def _perform_send(self, instruction: Send) -> None:
        try:
            number = self._send(instruction.worker_id, instruction.command, instruction.tensors)
        except NotReady:
            return  # it is gone; `WorkerLost` is on its way
        assert number == instruction.number, f"command {instruction.number} was sent as {number}"

    def _spawn(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch_body(self, request_id: str) -> None:
        try:
            operation = operations.decode(await self.journal.read_body(request_id))
        except (StorageError, msgspec.DecodeError) as error:
            _log.error("The body of request %s cannot be read: %s", request_id, error)
            operation = None
        self._handle(BodyLoaded(request_id, operation))

    # ---- what follows from accepted work: made durable in order, then visible

    async def _write_for_ever(self) -> None:
        while True:
            batch = await self._outbox.take()
            await self._commit_surely([change for item in batch for change in _changes_of(item)])
            for item in batch:
                self.catalog.apply(_changes_of(item))
                if isinstance(item, Finish):
                    self._publish(item.result)
            for item in batch:
                if isinstance(item, DeleteFiles) and not self.catalog.files_in_use(item.storage_key):
                    self._spawn(self._delete(item.storage_key))

    async def _commit_surely(self, changes: list[Change]) -> None:
        """Until it succeeds: a full disk delays results and loses none."""
        while True:
            try:
                await self.journal.commit(changes, may_refuse=False)
                return
            except StorageError as error:
                _log.error("Results wait for the journal: %s", error)
                await anyio.sleep(COMMIT_RETRY_S)

    def _publish(self, result: ResultRecord) -> None:
        self._unfinished.pop(result.request_id, None)
        self.payloads.put(result)
        self.waiters.wake(result.request_id)

    async def _delete(self, storage_key: str) -> None:
        try:
            await self._delete_files(storage_key)
        except StorageError as error:
            _log.warning("Files of %s were not deleted: %s", storage_key, error)

    async def _tick_for_ever(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            self._handle(Tick())
            self._expire_sessions()
            if self.clock.monotonic() - self._last_retention > RETENTION_INTERVAL_S:
                self._last_retention = self.clock.monotonic()
                self._forget_expired()

    def _expire_sessions(self) -> None:
        now = self.clock.monotonic()
        for session in list(self.catalog.sessions.values()):
            silent = now - self._last_seen.get(session.session_id, now)
            if session.status == "active" and silent > self.config.session_timeout_s:
                self._outbox.post(Append((Put(msgspec.structs.replace(session, status="expired")),)))
                self._cancel_session(session.session_id)

    def _cancel_session(self, session_id: str) -> None:
        """Nobody will fetch what this session's samples would give."""
        for job in list(self.state.rollouts.jobs.values()):
            if job.flow == session_id:
                self._handle(RequestCancelled(job.request.request_id))

    def _forget_expired(self) -> None:
        needed = {s.request.request_id for lane in self.state.training.lanes.values() for s in lane.steps.values()}
        limits = Limits(
            result_retention_s=self.config.result_retention_s, session_retention_s=self.config.session_retention_s
        )
        forgotten = expired(self.catalog, needed, limits, self.clock.now())
        if forgotten.changes:
            self._outbox.post(Append(forgotten.changes))
        for key in forgotten.storage_keys:
            self._outbox.post(DeleteFiles(key))
        for change in forgotten.changes:
            if isinstance(change, Delete) and change.table == "result":
                self.payloads.forget(change.key)

    async def _commit(self, changes: list[Change]) -> None:
        await self.journal.commit(changes)
        self.catalog.apply(changes)

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
            "requests_unfinished": len(self._unfinished),
            "results_kept": len(self.catalog.results),
            "polls_waiting": len(self.waiters),
            "samples_open": len(self.state.rollouts.jobs),
            "workers_ready": len(self.state.workers),
            "commands_in_flight": sum(len(worker.in_flight) for worker in self.state.workers.values()),
        }

    # ---- sessions

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        self._refuse_when_stopping()
        await self._commit([Put(session)])
        self._last_seen[session.session_id] = self.clock.monotonic()
        return session

    def heartbeat(self, owner: str, session_id: str) -> None:
        session = self._session(owner, session_id)
        if session.status not in ("active", "expired"):
            raise SessionGone()
        self._seen(session)

    def _seen(self, session: SessionRecord) -> None:
        self._last_seen[session.session_id] = self.clock.monotonic()
        if session.status == "expired":  # it only slept
            self._outbox.post(Append((Put(msgspec.structs.replace(session, status="active")),)))

    def _session(self, owner: str, session_id: str) -> SessionRecord:
        session = self.catalog.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise UnknownSession()
        return session

    async def finish_session(self, owner: str, session_id: str, status: str, detail: str | None) -> None:
        session = self._session(owner, session_id)
        if session.status in ("active", "expired"):
            finished = msgspec.structs.replace(session, status=status, detail=detail)
            await self._commit([Put(finished)])
            self._cancel_session(session_id)

    async def update_session(self, owner: str, session: SessionRecord) -> None:
        self._session(owner, session.session_id)
        await self._commit([Put(session)])

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
        checkpoint = self.state.training.find_checkpoint(owner, model_path, False) if model_path else None
        sampler = SamplerRecord(
            sampler_id=sampler_id,
            session_id=session_id,
            owner=owner,
            base_model=self.base_model.name,
            created_at=self.clock.now(),
            model_path=model_path,
            storage_key=checkpoint.storage_key if checkpoint else None,
        )
        await self._commit([Put(sampler)])
        return sampler

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        sampler = self.catalog.samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise UnknownSampler()
        joined = msgspec.structs.replace(sampler, num_clones=sampler.num_clones + 1)
        self.catalog.apply([Put(joined)])  # at once: two joins must not get one number
        await self._commit([Put(joined)])
        return joined.num_clones

    # ---- requests

    async def submit(self, owner: str, operation: Operation) -> RequestRecord:
        subject, seq_id = _key_of(operation)
        self._check_owner(owner, operation)
        body = operations.encode(operation)
        digest = operations.body_digest(body)
        if accepting := self._accepting.get((subject, seq_id)):
            return _same(await asyncio.shield(accepting[1]), digest)
        if known := self.catalog.find_request(subject, seq_id):
            return _same(known, digest)
        self._refuse_when_stopping()
        request = self._new_request(owner, operation, subject, seq_id, digest, len(body))
        self._check_room(request)
        outcome: asyncio.Future[RequestRecord] = asyncio.get_running_loop().create_future()
        self._accepting[subject, seq_id] = (digest, outcome)
        try:
            await self._accept(request, operation, body)
        except BaseException as error:
            if not outcome.done():
                outcome.set_exception(error if isinstance(error, Exception) else Overloaded())
                outcome.exception()  # nobody else may be waiting for it
            raise
        finally:
            del self._accepting[subject, seq_id]
        outcome.set_result(request)
        return request

    def _check_owner(self, owner: str, operation: Operation) -> None:
        """What belongs to somebody else does not exist."""
        match operation:
            case CreateModel() | CreateModelFromCheckpoint():
                session = self._session(owner, operation.session_id)
                if session.status not in ("active", "expired"):
                    raise SessionGone()
                self._seen(session)
            case Sample():
                sampler = self.catalog.samplers.get(operation.sampling_session_id)
                if sampler is None or sampler.owner != owner:
                    raise UnknownSampler()
            case _:
                model = self.catalog.models.get(operation.model_id)
                if model is None or model.owner != owner or model.status == "copy":
                    raise UnknownModel()

    def _new_request(
        self, owner: str, operation: Operation, subject: str, seq_id: int, digest: str, num_bytes: int
    ) -> RequestRecord:
        lane = self.state.training.lanes.get(subject)
        if lane is not None and seq_id > 0 and lane.is_used_up(seq_id):
            raise Conflict(f"seq_id {seq_id} of {subject} is used up: its turn has passed. Use the next seq_id.")
        kind = type(operation).__name__
        if isinstance(operation, ForwardBackward) and operation.forward_only:
            kind = "Forward"
        num_samples = operation.num_samples if isinstance(operation, Sample) else 0
        return RequestRecord(
            request_id=ids.new_id("r"),
            owner=owner,
            kind=kind,
            subject=subject,
            seq_id=seq_id,
            body_digest=digest,
            body_bytes=num_bytes,
            created_at=self.clock.now(),
            sample_sequence_ids=tuple(f"{subject}:{seq_id}:{i}" for i in range(num_samples)),
        )

    def _check_room(self, request: RequestRecord) -> None:
        open_requests = self._unfinished.values()
        if len(open_requests) + len(self._accepting) >= self.config.queued_requests_max:
            raise Overloaded()
        if request.body_bytes + sum(r.num_bytes for r in open_requests) > self.config.queued_bytes_max:
            raise Overloaded(
                "Too many bytes are queued (`queued_bytes_max`). Try again when some requests have finished."
            )
        if request.sample_sequence_ids:
            mine = sum(r.num_samples for r in open_requests if r.owner == request.owner)
            if mine + len(request.sample_sequence_ids) > self.config.tenant_queued_samples_max:
                raise Overloaded(
                    "This key has too many samples queued (`tenant_queued_samples_max`). Try again in a moment."
                )

    async def _accept(self, request: RequestRecord, operation: Operation, body: bytes) -> None:
        match operation:
            case CreateModel():
                await self._create_model(request, operation)
            case CreateModelFromCheckpoint():
                await self._create_model_from_checkpoint(request, operation, body)
            case UnloadModel():
                await self._unload_model(request, operation)
            case _:
                await self._commit([Put(request, body)])
                self._start(request, operation)

    def _start(self, request: RequestRecord, operation: Operation) -> None:
        if isinstance(operation, Sample) or request.subject in self.state.training.lanes:
            self._unfinished[request.request_id] = _unfinished(request)
            self._handle(RequestAccepted(request, operation))
        else:
            status = self.catalog.models[request.subject].status
            error = UserError(f"This training run is {status}: no operation can run on it any more.")
            self._outbox.post(Finish(_failure(request, error, self.clock.now()), (DropBody(request.request_id),)))

    async def _create_model(self, request: RequestRecord, operation: CreateModel) -> None:
        """Needs no device: the adapter is made from its seed when it is first used."""
        model = self._new_model(request, operation, operation.lora)
        body = results.encode_json({"type": "create_model", "model_id": model.model_id})
        result = ResultRecord(request_id=request.request_id, finished_at=self.clock.now(), content="json", payload=body)
        await self._commit([Put(model), Put(request), Put(result)])
        self.payloads.put(result)
        self.state.training.create(model)

    async def _create_model_from_checkpoint(
        self, request: RequestRecord, operation: CreateModelFromCheckpoint, body: bytes
    ) -> None:
        try:
            checkpoint = self.state.training.find_checkpoint(request.owner, operation.path, operation.optimizer)
        except UserError as error:
            result = _failure(request, error, self.clock.now())
            await self._commit([Put(request), Put(result)])
            self.payloads.put(result)
            return
        model = self._new_model(request, operation, checkpoint.lora)
        model = msgspec.structs.replace(
            model,
            created_from=checkpoint.storage_key,
            created_from_path=checkpoint.path,
            created_with_optimizer=operation.optimizer,
        )
        await self._commit([Put(model), Put(request, body)])
        self.state.training.create(model)
        self._start(request, operation)

    def _new_model(
        self, request: RequestRecord, operation: CreateModel | CreateModelFromCheckpoint, lora
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

    async def _unload_model(self, request: RequestRecord, operation: UnloadModel) -> None:
        model = msgspec.structs.replace(self.catalog.models[operation.model_id], status="unloaded")
        body = results.encode_json({"type": "unload_model", "model_id": model.model_id})
        result = ResultRecord(request_id=request.request_id, finished_at=self.clock.now(), content="json", payload=body)
        await self._commit([Put(model), Put(request), Put(result)])
        self.payloads.put(result)
        error = UserError("This model was unloaded before the request could run.")
        self._perform(self.state.unload(model.model_id, error, self.clock.now()))

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
        self._checkpoint(owner, checkpoint.path)
        await self._commit([Put(checkpoint)])

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        checkpoint = self._checkpoint(owner, path)
        await self._commit([Delete("checkpoint", path)])
        if not self.catalog.files_in_use(checkpoint.storage_key):
            self._spawn(self._delete(checkpoint.storage_key))

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        """The copy names the same immutable files; they go when nothing names them any more."""
        source = self.state.training.find_checkpoint(owner, path, False)
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
        await self._commit([Put(model), Put(copied)])
        return copied

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise NotReady("The server is shutting down. Try again when it is back.")


def _key_of(operation: Operation) -> tuple[str, int]:
    """What makes two submissions the same: sections 0.5 and 3.7 of the wire contract."""
    match operation:
        case CreateModel() | CreateModelFromCheckpoint():
            return operation.model_id, 0
        case UnloadModel():
            return operation.model_id, UNLOAD_SEQ_ID
        case Sample():
            return operation.sampling_session_id, operation.seq_id
        case _:
            return operation.model_id, operation.seq_id


def _same(request: RequestRecord, digest: str) -> RequestRecord:
    if request.body_digest != digest:
        raise Conflict(
            f"seq_id {request.seq_id} was used before with another body. Use the next seq_id for a new request."
        )
    return request


def _changes_of(item: Append | Finish | DeleteFiles) -> tuple[Change, ...]:
    match item:
        case Append():
            return item.changes
        case Finish():
            return (Put(item.result), *item.changes)
        case DeleteFiles():
            return ()


def _unfinished(request: RequestRecord) -> Unfinished:
    return Unfinished(request.owner, request.body_bytes, len(request.sample_sequence_ids))


def _failure(request: RequestRecord, error: UserError, now: float) -> ResultRecord:
    payload = results.encode_json(Failure.of(error))
    return ResultRecord(request_id=request.request_id, finished_at=now, content="error", payload=payload)


def _policy(config: ServerConfig) -> Policy:
    return Policy(
        quanta_in_flight_max=config.commands_in_flight_max,
        train_share=config.train_share,
        sample_share=config.sample_share,
        seq_gap_s=config.seq_gap_ms / 1000,
        snapshot_every_steps=config.snapshot_every_steps,
        snapshot_every_bytes=config.snapshot_every_bytes,
        snapshot_idle_s=config.snapshot_idle_s,
    )
