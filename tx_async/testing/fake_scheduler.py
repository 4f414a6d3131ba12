"""An in-memory scheduler without workers: it keeps every promise of `SchedulerApi` that a client can see (ownership,
idempotency, `seq_id` order, long polls). Its results are those of `fake_results.py`, which a test can check by hand.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from tx_async.clock import Clock, SystemClock
from tx_async.errors import (
    CheckpointExists,
    Conflict,
    NotFound,
    NotReady,
    Overloaded,
    ResultGone,
    SessionGone,
    TxError,
    UnknownCheckpoint,
    UnknownModel,
    UnknownSampler,
    UnknownSession,
    UserError,
)
from tx_async.scheduler.interface import BaseModelInfo, LivePiece, Passage, StillPending
from tx_async.scheduler.polls.waiters import Waiters
from tx_async.storage.checkpoint_files import Manifest, encode_manifest, file_info
from tx_async.testing.fake_live import FakeLive
from tx_async.testing.fake_results import forward_backward, passage_of, sample
from tx_async.testing.fake_views import FakeViews
from tx_async.testing.memory_files import MemoryFiles
from tx_async.wire import ids, operations, results
from tx_async.wire.operations import Operation
from tx_async.wire.records import (
    AuditRecord,
    CheckpointRecord,
    ModelRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)
from tx_async.wire.worker import AdapterConfig

FAKE_BASE_MODEL = BaseModelInfo(
    name="fake/model",
    path="",
    architecture="FakeForCausalLM",
    vocab_size=1000,
    max_context_length=512,
    eos_token_ids=(0,),
    max_lora_rank=32,
    target_tokens_k_max=16,
)
FAKE_FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 64}
FAKE_FILES["metadata.json"] = encode_manifest(
    Manifest({}, {name: file_info(data) for name, data in FAKE_FILES.items()})
)
"""What every saved checkpoint holds."""

R = TypeVar("R")


@dataclass
class _FakeLane:
    """The sequence of one model."""

    #: every operation below this seq_id has run
    next_seq_id: int = 1
    #: accepted operations that wait for their turn, by seq_id
    waiting: dict[int, tuple[RequestRecord, operations.TrainingOperation]] = field(default_factory=dict)
    steps: int = 0


class FakeScheduler(FakeViews):
    def __init__(self, base_model: BaseModelInfo = FAKE_BASE_MODEL, clock: Clock | None = None):
        self.base_model = base_model
        self.files = MemoryFiles()
        self.sessions: dict[str, SessionRecord] = {}
        self.models: dict[str, ModelRecord] = {}
        self.samplers: dict[str, SamplerRecord] = {}
        self.checkpoints: dict[str, CheckpointRecord] = {}
        self.operations: list[Operation] = []
        """Everything accepted, in order of arrival: what a test looks at."""
        self.cancelled: list[str] = []
        self.missing: list[str] = []
        """What `waiting_for` answers."""
        self.details = ""
        """What it adds to each line for operators."""
        self.overloaded = False
        """Refuse every submit with 429."""
        self.held = False
        """Run nothing: every future stays pending until `release`."""
        self.live = FakeLive()
        """Live samples: what they say, and what was asked."""
        self._clock = clock or SystemClock()
        self._waiters = Waiters()
        self.audits: dict[str, AuditRecord] = {}
        self.histories = defaultdict(list)
        self._requests: dict[str, RequestRecord] = {}
        self._by_key: dict[tuple[str, int], RequestRecord] = {}
        self._results: dict[str, ResultRecord] = {}
        self._lanes: defaultdict[str, _FakeLane] = defaultdict(_FakeLane)
        self._held_operations: list[tuple[RequestRecord, Operation]] = []

    def __repr__(self) -> str:
        return f"<FakeScheduler {len(self._requests)} requests, {len(self._results)} results>"

    def passages(self, session_id: str) -> list[Passage]:
        subjects = [*self.models.values(), *self.samplers.values()]
        mine = {record.key for record in subjects if record.session_id == session_id}
        return [passage_of(request) for request in self._requests.values() if request.subject in mine]

    def note(self, event: str, subject: str, **details: Any) -> None:
        event_id = f"{len(self.audits):012d}"
        self.audits[event_id] = AuditRecord(
            event_id=event_id, at=self._clock.now(), event=event, subject=subject, details=details
        )

    def waiting_for(self, in_full: bool = False) -> list[str]:
        return [f"{line}{self.details if in_full else ''}" for line in self.missing]

    # ---- sessions

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        self.sessions[session.session_id] = session
        return session

    def heartbeat(self, owner: str, session_id: str) -> None:
        self._live_session(owner, session_id)

    async def finish_session(self, owner: str, session_id: str, status: Any, detail: str | None) -> None:
        session = _owned(self.sessions, session_id, owner, UnknownSession)
        if session.status == "active":
            self.sessions[session_id] = msgspec.structs.replace(session, status=status, detail=detail)

    async def update_session(self, owner: str, session: SessionRecord) -> None:
        _owned(self.sessions, session.session_id, owner, UnknownSession)
        self.sessions[session.session_id] = session

    def _live_session(self, owner: str, session_id: str) -> SessionRecord:
        session = _owned(self.sessions, session_id, owner, UnknownSession)
        if session.status != "active":
            raise SessionGone()
        return session

    # ---- samplers

    async def create_sampler(
        self, owner: str, session_id: str, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        self._live_session(owner, session_id)
        if model_path is not None:
            self._readable(owner, model_path)
        sampler_id = ids.sampler_id(session_id, sampling_session_seq_id)
        earlier = self.samplers.get(sampler_id)
        if earlier is not None and earlier.model_path != model_path:
            raise Conflict()
        return earlier or self._put_sampler(owner, session_id, sampler_id, model_path)

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        sampler = _owned(self.samplers, sampler_id, owner, UnknownSampler)
        self.samplers[sampler_id] = msgspec.structs.replace(sampler, num_clones=sampler.num_clones + 1)
        return sampler.num_clones + 1

    def _put_sampler(self, owner: str, session_id: str, sampler_id: str, model_path: str | None) -> SamplerRecord:
        sampler = SamplerRecord(
            sampler_id=sampler_id,
            session_id=session_id,
            owner=owner,
            base_model=self.base_model.name,
            created_at=self._clock.now(),
            model_path=model_path,
        )
        self.samplers[sampler_id] = sampler
        return sampler

    # ---- requests

    async def submit(
        self, owner: str, operation: Operation, encoded: operations.Encoded | None = None
    ) -> RequestRecord:
        if self.missing:
            raise NotReady()
        if self.overloaded:
            raise Overloaded()
        self._check(owner, operation)
        subject, seq_id = _key(operation)
        digest = operations.body_digest(operations.encode(operation))
        if (earlier := self._by_key.get((subject, seq_id))) is not None:
            if earlier.body_digest != digest:
                raise Conflict()
            return earlier
        record = self._record(owner, operation, subject, seq_id, digest)
        self._by_key[subject, seq_id] = self._requests[record.request_id] = record
        self.operations.append(operation)
        self._accept(record, operation)
        return record

    def _check(self, owner: str, operation: Operation) -> None:
        match operation:
            case operations.CreateModel() | operations.CreateModelFromCheckpoint():
                self._live_session(owner, operation.session_id)
            case operations.Sample():
                _owned(self.samplers, operation.sampling_session_id, owner, UnknownSampler)
            case _:
                _owned(self.models, operation.model_id, owner, UnknownModel)

    def _record(self, owner: str, operation: Operation, subject: str, seq_id: int, digest: str) -> RequestRecord:
        samples = operation.num_samples if isinstance(operation, operations.Sample) else 0
        return RequestRecord(
            request_id=ids.new_id("r"),
            owner=owner,
            kind=type(operation).__name__,
            subject=subject,
            seq_id=seq_id,
            body_digest=digest,
            body_bytes=0,
            created_at=self._clock.now(),
            sample_sequence_ids=tuple(f"{subject}:{seq_id}:{i}" for i in range(samples)),
        )

    def _accept(self, record: RequestRecord, operation: Operation) -> None:
        if self.held:
            self._held_operations.append((record, operation))
        elif isinstance(operation, operations.TrainingOperation):
            lane = self._lanes[operation.model_id]
            lane.waiting[operation.seq_id] = (record, operation)
            while lane.next_seq_id in lane.waiting:
                self._finish(*lane.waiting.pop(lane.next_seq_id))
                lane.next_seq_id += 1
        else:
            self._finish(record, operation)

    def release(self) -> None:
        """Run what was held."""
        self.held = False
        held, self._held_operations = self._held_operations, []
        for record, operation in held:
            self._accept(record, operation)

    async def retrieve(self, owner: str, request_id: str, timeout_s: float) -> ResultRecord | StillPending:
        request = self._requests.get(request_id)
        if request is None or request.owner != owner:
            raise ResultGone()
        if request_id not in self._results:
            await self._waiters.wait(request_id, timeout_s)
        return self._results.get(request_id) or StillPending()

    async def cancel(self, owner: str, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def sample_live(
        self, owner: str, operation: operations.Sample, model_path: str | None = None
    ) -> AsyncGenerator[LivePiece, None]:
        if self.missing:
            raise NotReady()
        if self.overloaded:
            raise Overloaded()
        if model_path is not None:
            self._readable(owner, model_path)
        async with contextlib.aclosing(self.live.stream(operation, model_path, self.base_model.vocab_size)) as pieces:
            async for piece in pieces:
                yield piece

    # ---- checkpoints

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        _owned(self.checkpoints, checkpoint.path, owner, UnknownCheckpoint)
        self.checkpoints[checkpoint.path] = checkpoint

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        _owned(self.checkpoints, path, owner, UnknownCheckpoint)
        del self.checkpoints[path]

    async def add_checkpoint(self, model: ModelRecord, checkpoint: CheckpointRecord) -> None:
        self.models[model.model_id], self.checkpoints[checkpoint.path] = model, checkpoint

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        source = self._readable(owner, path)
        model_id = ids.model_id(session_id, model_seq_id)
        if model_id in self.models and self.models[model_id].created_from != source.storage_key:
            raise Conflict()
        self._put_model(owner, model_id, session_id, source.lora, {}, created_from=source.storage_key, status="copy")
        return self._put_checkpoint(owner, model_id, source.kind, source.name, source.lora, {}, None)

    def _readable(self, owner: str, path: str) -> CheckpointRecord:
        checkpoint = self.checkpoints.get(path)
        if checkpoint is None or (checkpoint.owner != owner and not checkpoint.public):
            raise UnknownCheckpoint()
        return checkpoint

    def _put_checkpoint(
        self,
        owner: str,
        model_id: str,
        kind: Any,
        name: str,
        lora: AdapterConfig,
        user_metadata: dict,
        ttl_seconds: int | None,
    ) -> CheckpointRecord:
        now, storage_key = self._clock.now(), f"{model_id}/{kind}/{name}"
        checkpoint = CheckpointRecord(
            path=f"tinker://{model_id}/{kind}/{name}",
            model_id=model_id,
            owner=owner,
            kind=kind,
            name=name,
            storage_key=storage_key,
            base_model=self.base_model.name,
            lora=lora,
            created_at=now,
            size_bytes=sum(map(len, FAKE_FILES.values())),
            user_metadata=user_metadata,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        self.files.content |= {f"{storage_key}/{file}": content for file, content in FAKE_FILES.items()}
        self.checkpoints[checkpoint.path] = checkpoint
        return checkpoint

    def _put_model(
        self, owner: str, model_id: str, session_id: str, lora: AdapterConfig, user_metadata: dict, **more: Any
    ) -> None:
        self.models[model_id] = ModelRecord(
            model_id=model_id,
            session_id=session_id,
            owner=owner,
            base_model=self.base_model.name,
            lora=lora,
            created_at=self._clock.now(),
            user_metadata=user_metadata,
            **more,
        )

    # ---- what a worker would do

    def _finish(self, record: RequestRecord, operation: Operation) -> None:
        try:
            content, payload = self._run(record.owner, operation)
        except TxError as error:
            content, payload = "error", results.encode_json(results.Failure.of(error))
        self._results[record.request_id] = ResultRecord(
            request_id=record.request_id,
            finished_at=self._clock.now(),
            content=content,  # type: ignore[arg-type]
            payload=payload,
        )
        self._waiters.wake(record.request_id)

    def _run(self, owner: str, operation: Operation) -> tuple[str, bytes]:
        match operation:
            case operations.ForwardBackward():
                return "forward_backward", results.encode(forward_backward(operation))
            case operations.Sample():
                return "sample", results.encode(sample(operation, self.base_model.vocab_size))
            case _:
                return "json", results.encode_json(self._run_json(owner, operation))

    def _run_json(self, owner: str, operation: Operation) -> dict[str, Any]:
        match operation:
            case operations.Rejected():
                raise UserError(operation.message)
            case operations.CreateModel():
                self._put_model(
                    owner, operation.model_id, operation.session_id, operation.lora, operation.user_metadata
                )
                return {"type": "create_model", "model_id": operation.model_id}
            case operations.CreateModelFromCheckpoint():
                lora = self._readable(owner, operation.path).lora
                self._put_model(owner, operation.model_id, operation.session_id, lora, operation.user_metadata)
                return {"type": "load_weights", "path": operation.path, "model_id": operation.model_id}
            case operations.LoadWeights():
                path = self._readable(owner, operation.path).path
                return {"type": "load_weights", "path": path, "model_id": operation.model_id}
            case operations.OptimStep():
                lane = self._lanes[operation.model_id]
                lane.steps += 1
                history = self.histories[operation.model_id]
                history.append({"index": float(len(history)), "step": float(lane.steps)})
                return {"metrics": {"step": float(lane.steps)}}
            case operations.SaveWeights():
                return self._save(owner, operation)
            case operations.UnloadModel():
                self.models[operation.model_id] = msgspec.structs.replace(
                    self.models[operation.model_id], status="unloaded"
                )
                return {"type": "unload_model", "model_id": operation.model_id}
        raise AssertionError(operation)

    def _save(self, owner: str, operation: operations.SaveWeights) -> dict[str, Any]:
        model = self.models[operation.model_id]
        if operation.name is None:
            assert operation.sampling_session_seq_id is not None
            sampler_id = ids.sampler_id(model.session_id, operation.sampling_session_seq_id)
            self._put_sampler(owner, model.session_id, sampler_id, None)
            return {"type": "save_weights_for_sampler", "sampling_session_id": sampler_id}
        path = f"tinker://{operation.model_id}/{operation.kind}/{operation.name}"
        if path in self.checkpoints and not operation.overwrite:
            raise CheckpointExists()
        checkpoint = self._put_checkpoint(
            owner,
            operation.model_id,
            operation.kind,
            operation.name,
            model.lora,
            operation.user_metadata,
            operation.ttl_seconds,
        )
        return {"path": checkpoint.path, "size_bytes": checkpoint.size_bytes}


def _owned(records: Mapping[str, R], key: str, owner: str, missing: type[NotFound]) -> R:
    record = records.get(key)
    if record is None or record.owner != owner:  # type: ignore[attr-defined]
        raise missing()
    return record


def _key(operation: Operation) -> tuple[str, int]:
    """What makes a repeated submission the same request. Unloading stands outside a model's sequence."""
    match operation:
        case operations.CreateModel() | operations.CreateModelFromCheckpoint():
            return operation.model_id, 0
        case operations.UnloadModel():
            return operation.model_id, -1
        case operations.Sample():
            return operation.sampling_session_id, operation.seq_id
        case _:
            return operation.model_id, operation.seq_id
