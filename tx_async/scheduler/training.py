"""Training requests: lanes in `seq_id` order, rows packed into micro-batches, adapters moved through slots, snapshots
taken.

Everything here is synchronous. Commands are issued as soon as their predecessors are in the device's stream (not:
finished), so that a pipelined client never leaves the device idle; answers are matched to the run of the step that
asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.errors import (
    CheckpointExists,
    CorruptedModel,
    InvalidRequest,
    ServerError,
    TxError,
    UnknownCheckpoint,
    UserError,
)
from tx_async.scheduler.catalog import Catalog
from tx_async.scheduler.events import (
    Append,
    CommandFailed,
    CommandFinished,
    DeleteFiles,
    FetchBody,
    Finish,
    Instruction,
)
from tx_async.scheduler.fairness import FairQueue
from tx_async.scheduler.lanes import Lane, Step
from tx_async.scheduler.packing import Row, fill, pack
from tx_async.scheduler.policy import Policy
from tx_async.scheduler.worker_state import WorkerState
from tx_async.wire import results
from tx_async.wire.ids import sampler_id
from tx_async.wire.operations import (
    CreateModelFromCheckpoint,
    ForwardBackward,
    LoadWeights,
    Operation,
    OptimStep,
    Rejected,
    SaveWeights,
)
from tx_async.wire.records import (
    Change,
    CheckpointRecord,
    Delete,
    DropBody,
    ModelRecord,
    Put,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    Snapshot,
)
from tx_async.wire.results import Failure, ForwardBackwardResult
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import (
    CreateAdapter,
    LoadAdapter,
    ReleaseAdapter,
    SaveAdapter,
    Saved,
    Stepped,
    TrainMicroBatch,
)
from tx_async.wire.worker import OptimStep as OptimStepCommand

SAVE_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


# ---- what to do with the answers of commands


class RowSent(Struct, frozen=True):
    lane: Lane
    step: Step
    run: int
    row: Row


class RowsSent(Struct, frozen=True):
    rows: tuple[RowSent | None, ...]
    is_quantum: bool = True


class StepSent(Struct, frozen=True):
    lane: Lane
    step: Step
    run: int
    storage_key: str = ""


class BaseSent(Struct, frozen=True):
    """The lane's base is being put into a slot."""

    lane: Lane
    key: str | None
    run: int


class SnapshotSent(Struct, frozen=True):
    lane: Lane
    snapshot: Snapshot


class Ignored(Struct, frozen=True):
    pass


class Clock(Protocol):
    @property
    def now(self) -> float: ...


class Training:
    def __init__(
        self,
        catalog: Catalog,
        policy: Policy,
        clock: Clock,
        out: list[Instruction],
        workers_of: Callable[[Lane], Sequence[WorkerState]],
    ):
        self.catalog = catalog
        self.policy = policy
        self.clock = clock
        #: instructions of the current decision, in order
        self.out = out
        self.workers_of = workers_of
        self.lanes: dict[str, Lane] = {}
        #: models whose next operation is there; a superset is harmless, a missing one would stall
        self.ready: dict[str, None] = {}
        self.fair: FairQueue[str] = FairQueue()
        #: tinker:// paths that are being saved
        self.saving: set[str] = set()
        #: lanes that wait for missing predecessors
        self.gaps: set[str] = set()

    # ---- accepting

    def restore(self) -> None:
        """Lanes from the catalog, at start: everything after each run's newest snapshot runs again."""
        for model in self.catalog.models.values():
            if model.status == "live":
                self.lanes[model.model_id] = Lane(model)
        for request in self.catalog.requests.values():
            lane = self.lanes.get(request.subject)
            result = self.catalog.results.get(request.request_id)
            if lane is None or request.seq_id < 0 or request.kind == "CreateModel":
                continue
            oldest = lane.model.snapshots[-1].seq_id if lane.model.snapshots else -1
            if request.seq_id > oldest or result is None:
                failed = bool(result and result.failed)
                lane.accept(Step(request, request.seq_id, None, finished=result is not None, failed=failed))
        for lane in self.lanes.values():
            lane.lose_device_state()
            if any(not step.finished for step in lane.steps.values()):
                self.refresh(lane)

    def create(self, model: ModelRecord) -> Lane:
        self.lanes[model.model_id] = lane = Lane(model)
        lane.last_active = self.clock.now
        return lane

    def accept(self, lane: Lane, request: RequestRecord, operation: Operation) -> None:
        lane.accept(Step(request, request.seq_id, operation))
        if request.seq_id == 0:
            lane.cursor = 0
        lane.last_active = self.clock.now
        self.refresh(lane)

    def refresh(self, lane: Lane) -> None:
        """Look again whether the lane can go on."""
        if lane.next_step() is not None:
            self.ready[lane.model.model_id] = None
            self.gaps.discard(lane.model.model_id)
            return
        self.ready.pop(lane.model.model_id, None)
        if lane.has_gap:
            lane.gap_since = lane.gap_since or self.clock.now
            self.gaps.add(lane.model.model_id)

    # ---- issuing

    @property
    def has_work(self) -> bool:
        return any(self._runnable(model_id) for model_id in self.ready)

    def _runnable(self, model_id: str) -> bool:
        step = self.lanes[model_id].next_step()
        return step is not None and not step.fetching

    def issue(self, worker: WorkerState) -> bool:
        """Send the commands up to and including the next micro-batch. False when there was none to send."""
        flows: dict[str, list[Lane]] = {}
        for model_id in self.ready:
            if self._runnable(model_id):
                flows.setdefault(self.lanes[model_id].flow, []).append(self.lanes[model_id])
        for flow in self.fair.order(flows):
            # Within a flow, who is on the device already goes first: moving adapters costs more than taking turns.
            for lane in sorted(flows[flow], key=lambda lane: not lane.resident):
                if self._issue_lane(worker, lane):
                    return True
        return False

    def _issue_lane(self, worker: WorkerState, lane: Lane) -> bool:
        """Everything that the lane has ready, up to its next micro-batch."""
        while (step := lane.next_step()) is not None and not step.fetching:
            operation = step.operation
            if operation is None:
                step.fetching = True
                self.out.append(FetchBody(step.request.request_id))
                break
            if isinstance(operation, Rejected):
                lane.advance()
                self._fail(step, InvalidRequest(operation.message))
                continue
            if not lane.resident and not self._bring(worker, lane):
                break
            worker.training_slots.touch(lane.model.model_id)
            if isinstance(operation, ForwardBackward):
                self._send_rows(worker, lane, step, operation)
                self.refresh(lane)
                return True
            self._send_step(worker, lane, step, operation)
        self.refresh(lane)
        return False

    def _send_rows(self, worker: WorkerState, lane: Lane, step: Step, operation: ForwardBackward) -> None:
        if step.packed is None:
            step.packed = pack(operation, worker.info)
        length = step.packed.rows[step.num_rows_sent].length
        capacity = next(rows for rows, row_length in worker.info.row_shapes if row_length == length)
        rows: list[RowSent] = []
        self._take_rows(lane, length, capacity, rows)
        if len(rows) < capacity:
            self._take_neighbours(worker, lane, step, length, capacity, rows)
        slots = [worker.training_slots.touch(row.lane.model.model_id) for row in rows]
        unused = capacity - len(rows)
        command = TrainMicroBatch(
            slots=(*slots, *[-1] * unused),
            row_length=length,
            targets_per_token=step.packed.targets_per_token,
            forward_only=operation.forward_only,
        )
        contents = [(row.step.operation, row.row) for row in rows]
        tensors = fill([*contents, *[None] * unused], length, step.packed.targets_per_token)  # type: ignore[list-item]
        self.out.append(worker.send(command, RowsSent((*rows, *[None] * unused)), tensors))

    def _take_rows(self, lane: Lane, length: int, capacity: int, rows: list[RowSent]) -> None:
        """The next rows of the lane's current request, while they have this length and there is room."""
        step = lane.next_step()
        assert step is not None and step.packed is not None
        while step.num_rows_sent < len(step.packed.rows) and len(rows) < capacity:
            row = step.packed.rows[step.num_rows_sent]
            if row.length != length:
                break
            rows.append(RowSent(lane, step, step.run, row))
            step.num_rows_sent += 1
            step.num_outstanding += 1
            self.fair.charge(lane.flow, row.length)
        if step.num_rows_sent == len(step.packed.rows):
            lane.advance()

    def _take_neighbours(
        self, worker: WorkerState, lane: Lane, step: Step, length: int, capacity: int, rows: list[RowSent]
    ) -> None:
        """Fill up with rows of other runs that fit the same program. They are whole rows: nobody's numbers change."""
        assert isinstance(step.operation, ForwardBackward) and step.packed is not None
        for model_id in list(self.ready):
            other = self.lanes[model_id]
            candidate = other.next_step()
            if len(rows) == capacity:
                return
            if other is lane or not other.resident or candidate is None:
                continue
            operation = candidate.operation
            if not isinstance(operation, ForwardBackward) or operation.forward_only != step.operation.forward_only:
                continue
            candidate.packed = candidate.packed or pack(operation, worker.info)
            same_k = candidate.packed.targets_per_token == step.packed.targets_per_token
            if same_k and candidate.packed.rows[candidate.num_rows_sent].length == length:
                self._take_rows(other, length, capacity, rows)
                self.refresh(other)

    def _send_step(self, worker: WorkerState, lane: Lane, step: Step, operation: Operation) -> None:
        """An operation of one command (or, from a checkpoint, of none but the base's)."""
        lane.advance()
        slot = worker.training_slots.touch(lane.model.model_id)
        try:
            match operation:
                case OptimStep():
                    lane.num_steps_since_snapshot += 1
                    self._send_one(worker, lane, step, OptimStepCommand(slot=slot, adam=operation.adam_params))
                case SaveWeights():
                    self._send_save(worker, lane, step, operation, slot)
                case LoadWeights():
                    command = self._load_command(lane, step, operation, slot)
                    self._send_one(worker, lane, step, command)
                    # The checkpoint may be deleted before a replay would need it again.
                    lane.snapshot_due = True
                case CreateModelFromCheckpoint():
                    step.num_outstanding = 1  # answered with the base: see `_bring`
                case _:
                    raise AssertionError(f"{type(operation).__name__} is no training operation")
        except TxError as error:
            self._fail(step, error)
            return
        self._count_since_snapshot(lane, step)
        if lane.snapshot_due:
            self._snapshot(worker, lane)

    def _send_one(self, worker: WorkerState, lane: Lane, step: Step, command, storage_key: str = "") -> None:
        step.num_outstanding = 1
        self.out.append(worker.send(command, StepSent(lane, step, step.run, storage_key)))

    def _send_save(self, worker: WorkerState, lane: Lane, step: Step, operation: SaveWeights, slot: int) -> None:
        if operation.name is not None:
            path = checkpoint_path(lane.model.model_id, operation.kind, operation.name)
            if (path in self.catalog.checkpoints or path in self.saving) and not operation.overwrite:
                raise CheckpointExists(f"{path} exists already: choose another name, or save with overwrite=True.")
            self.saving.add(path)
        name = operation.name or "ephemeral"
        key = f"{lane.model.model_id}/{operation.kind}/{name}~{step.seq_id}"
        metadata = {"base_model": lane.model.base_model, "model_id": lane.model.model_id, "name": name}
        command = SaveAdapter(
            slot=slot,
            config=lane.model.lora,
            key=key,
            kind=SAVE_KINDS[operation.kind],  # type: ignore[arg-type]
            metadata=metadata,
        )
        self._send_one(worker, lane, step, command, key)

    def _load_command(self, lane: Lane, step: Step, operation: LoadWeights, slot: int) -> LoadAdapter:
        checkpoint = self.find_checkpoint(step.request.owner, operation.path, operation.optimizer)
        if (ours := lane.model.lora) != (theirs := checkpoint.lora):
            differences = [
                f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
                for name in ("rank", "train_attn", "train_mlp", "train_unembed")
                if getattr(theirs, name) != getattr(ours, name)
            ]
            if differences:
                what = "; ".join(differences)
                message = f"{operation.path} does not fit this model: {what}. Create a model from it instead."
                raise InvalidRequest(message)
        return LoadAdapter(slot=slot, config=ours, key=checkpoint.storage_key, optimizer=operation.optimizer)

    def find_checkpoint(self, owner: str, path: str, optimizer: bool) -> CheckpointRecord:
        checkpoint = self.catalog.checkpoints.get(path)
        if checkpoint is None or (checkpoint.owner != owner and not checkpoint.public):
            raise UnknownCheckpoint(f"{path}: no such checkpoint. It was never saved, was deleted, or has expired.")
        if optimizer and checkpoint.kind != "weights":
            raise InvalidRequest(
                f"{path} holds no optimizer state: load it without, or load a checkpoint of save_state."
            )
        return checkpoint

    # ---- slots

    def _bring(self, worker: WorkerState, lane: Lane) -> bool:
        """Put the lane's base into a slot. False when every slot is busy."""
        model_id = lane.model.model_id
        slot = worker.training_slots.take(model_id)
        if slot is None:
            victim = worker.training_slots.victim(lambda other: self._may_leave(self.lanes[other]))
            if victim is None:
                return False
            self._evict(worker, self.lanes[victim])
            slot = worker.training_slots.take(model_id)
            assert slot is not None
        key, optimizer = lane.load_from()
        run = lane.num_losses
        if key is None:
            command = CreateAdapter(slot=slot, config=lane.model.lora)
        else:
            command = LoadAdapter(slot=slot, config=lane.model.lora, key=key, optimizer=optimizer)
        self.out.append(worker.send(command, BaseSent(lane, key, run)))
        lane.resident = True
        return True

    def _may_leave(self, lane: Lane) -> bool:
        """Not in the middle of a request: a snapshot holds whole operations."""
        step = lane.steps.get(lane.cursor)
        return step is None or step.num_rows_sent == 0

    def _evict(self, worker: WorkerState, lane: Lane) -> None:
        if lane.is_dirty:
            self._snapshot(worker, lane)
        worker.training_slots.release(lane.model.model_id)
        lane.resident = False

    # ---- snapshots

    def _count_since_snapshot(self, lane: Lane, step: Step) -> None:
        lane.num_bytes_since_snapshot += step.request.body_bytes
        if lane.num_steps_since_snapshot >= self.policy.snapshot_every_steps:
            lane.snapshot_due = True
        if lane.num_bytes_since_snapshot >= self.policy.snapshot_every_bytes:
            lane.snapshot_due = True

    def _snapshot(self, worker: WorkerState, lane: Lane) -> None:
        """Save the state after everything sent so far. It counts once its files are durable and all of that has
        finished."""
        slot = worker.training_slots.slot_of(lane.model.model_id)
        assert slot is not None
        snapshot = Snapshot(f"{lane.model.model_id}/snapshots/{lane.cursor - 1}", lane.cursor - 1)
        command = SaveAdapter(slot=slot, config=lane.model.lora, key=snapshot.key, kind="snapshot")
        self.out.append(worker.send(command, SnapshotSent(lane, snapshot)))
        lane.pending_snapshots.append(snapshot)
        lane.snapshot_due = False
        lane.num_steps_since_snapshot = 0
        lane.num_bytes_since_snapshot = 0

    def snapshot_all(self, worker: WorkerState, idle_since: float = math.inf) -> bool:
        """Snapshot every dirty resident run that has been idle since then. True when some are still on their way."""
        for lane in self.lanes.values():
            if lane.resident and lane.is_dirty and self._may_leave(lane) and lane.last_active <= idle_since:
                self._snapshot(worker, lane)
        return any(lane.pending_snapshots for lane in self.lanes.values())

    def _commit_snapshots(self, lane: Lane) -> None:
        """Make durable snapshots count, oldest first, once no operation that they contain is unfinished."""
        while lane.durable_snapshots:
            snapshot = lane.durable_snapshots[0]
            if any(not step.finished for step in lane.covered(snapshot.seq_id)):
                return
            lane.durable_snapshots.pop(0)
            if snapshot.seq_id > lane.base_seq_id:
                self._commit_snapshot(lane, snapshot)

    def _commit_snapshot(self, lane: Lane, snapshot: Snapshot) -> None:
        kept, dropped = (snapshot, *lane.model.snapshots[:1]), lane.model.snapshots[1:]
        lane.model = msgspec.structs.replace(lane.model, snapshots=kept)
        changes: list[Change] = [Put(lane.model)]
        if len(kept) > 1:
            for step in lane.covered(kept[-1].seq_id):
                changes.append(DropBody(step.request.request_id))
                del lane.steps[step.seq_id]
        self.out.append(Append(tuple(changes)))
        self.out.extend(DeleteFiles(old.key) for old in dropped)

    # ---- answers

    def finished(self, answer: RowsSent | StepSent | BaseSent | SnapshotSent, event: CommandFinished) -> None:
        match answer:
            case RowsSent():
                logprobs, losses = event.tensors
                for r, sent in enumerate(answer.rows):
                    if sent is not None and sent.run == sent.step.run:
                        self._collect(sent, logprobs[r], losses[r])
            case StepSent():
                if answer.run == answer.step.run:
                    self._complete_step(answer, event.result)
            case BaseSent():
                first = answer.lane.steps.get(0)
                if first is not None and not first.finished and answer.run == answer.lane.num_losses:
                    lane = answer.lane
                    first.num_outstanding = 0
                    self._succeed(
                        first,
                        {
                            "type": "load_weights",
                            "path": lane.model.created_from_path,
                            "model_id": first.request.subject,
                        },
                    )
            case SnapshotSent():
                lane = answer.lane
                if answer.snapshot in lane.pending_snapshots:
                    lane.pending_snapshots.remove(answer.snapshot)
                    lane.durable_snapshots.append(answer.snapshot)
                    self._commit_snapshots(lane)

    def failed(self, answer: RowsSent | StepSent | BaseSent | SnapshotSent, event: CommandFailed) -> None:
        error = error_of(event.category, event.message)
        match answer:
            case RowsSent():
                for sent in answer.rows:
                    if sent is not None and sent.run == sent.step.run:
                        self._fail(sent.step, error)
                        # Some of its rows may have left gradients behind.
                        self.lose_state(sent.lane)
            case StepSent():
                if answer.run == answer.step.run:
                    answer.step.num_outstanding = 0
                    self._forget_saving(answer)
                    self._fail(answer.step, error)
                    if answer.step.kind == LoadWeights.__name__:
                        self.lose_state(answer.lane)
            case BaseSent():
                if answer.run == answer.lane.num_losses:
                    self._base_failed(answer, error)
            case SnapshotSent():
                lane = answer.lane
                if answer.snapshot in lane.pending_snapshots:
                    lane.pending_snapshots.remove(answer.snapshot)
                    if not lane.resident:
                        self.lose_state(lane)

    def _collect(self, sent: RowSent, logprobs: np.ndarray, losses: np.ndarray) -> None:
        operation, step = sent.step.operation, sent.step
        assert isinstance(operation, ForwardBackward)
        for segment in sent.row.segments:
            place = slice(segment.offset, segment.offset + segment.length)
            shape = operation.data[segment.datum].loss_fn_inputs["target_tokens"].shape
            k = shape[1] if len(shape) == 2 else 1
            values = np.ascontiguousarray(logprobs[place, :k], np.float32).reshape(shape or (segment.length,))
            step.parts[segment.datum] = (Tensor.of(values), float(losses[place].sum(dtype=np.float64)))
        step.num_outstanding -= 1
        if step.num_outstanding == 0 and step.packed and step.num_rows_sent == len(step.packed.rows):
            parts = [step.parts[i] for i in range(len(operation.data))]
            metrics = {
                "loss:sum": math.fsum(loss for _, loss in parts)
                if _all_finite(parts)
                else sum(loss for _, loss in parts)
            }
            result = ForwardBackwardResult(logprobs=tuple(tensor for tensor, _ in parts), metrics=metrics)
            self._finish(step, "forward_backward", results.encode(result))

    def _complete_step(self, sent: StepSent, result) -> None:
        lane, step, operation = sent.lane, sent.step, sent.step.operation
        step.num_outstanding = 0
        match operation:
            case OptimStep():
                assert isinstance(result, Stepped)
                metrics = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
                self._succeed(step, {"metrics": metrics})
            case SaveWeights():
                assert isinstance(result, Saved)
                self._complete_save(sent, operation, result)
            case LoadWeights():
                self._succeed(step, {"type": "load_weights", "path": operation.path, "model_id": lane.model.model_id})

    def _complete_save(self, sent: StepSent, operation: SaveWeights, saved: Saved) -> None:
        lane, step, now = sent.lane, sent.step, self.clock.now
        self._forget_saving(sent)
        model = lane.model
        if operation.name is None:
            self._complete_ephemeral_save(sent, operation)
            return
        path = checkpoint_path(model.model_id, operation.kind, operation.name)
        record = CheckpointRecord(
            path=path,
            model_id=model.model_id,
            owner=model.owner,
            kind=operation.kind,
            name=operation.name,
            storage_key=sent.storage_key,
            base_model=model.base_model,
            lora=model.lora,
            created_at=now,
            size_bytes=saved.size_bytes,
            user_metadata=operation.user_metadata,
            expires_at=now + operation.ttl_seconds if operation.ttl_seconds else None,
        )
        body = {"path": path, "type": _SAVE_TYPES[operation.kind]}
        if operation.kind == "external_weights":
            body["size_bytes"] = saved.size_bytes  # type: ignore[assignment]
        replaced = self.catalog.checkpoints.get(path)
        self._succeed(step, body, (Put(record),))
        if replaced and replaced.storage_key != sent.storage_key:
            self.out.append(DeleteFiles(replaced.storage_key))

    def _complete_ephemeral_save(self, sent: StepSent, operation: SaveWeights) -> None:
        """A sampling session for weights that have no name; an inflight save also moves its earlier sessions on."""
        model = sent.lane.model
        assert operation.sampling_session_seq_id is not None
        record = SamplerRecord(
            sampler_id=sampler_id(model.session_id, operation.sampling_session_seq_id),
            session_id=model.session_id,
            owner=model.owner,
            base_model=model.base_model,
            created_at=self.clock.now,
            storage_key=sent.storage_key,
            inflight_model_id=model.model_id if operation.inflight else None,
        )
        changes: list[Change] = [Put(record)]
        if operation.inflight:
            changes += [
                Put(msgspec.structs.replace(sampler, storage_key=sent.storage_key))
                for sampler in self.catalog.samplers.values()
                if sampler.inflight_model_id == model.model_id and sampler.sampler_id != record.sampler_id
            ]
        body = {"sampling_session_id": record.sampler_id, "type": "save_weights_for_sampler"}
        self._succeed(sent.step, body, tuple(changes))

    def _forget_saving(self, sent: StepSent) -> None:
        operation = sent.step.operation
        if isinstance(operation, SaveWeights) and operation.name is not None:
            self.saving.discard(checkpoint_path(sent.lane.model.model_id, operation.kind, operation.name))

    # ---- losses

    def lose_state(self, lane: Lane) -> None:
        """The device state of a run is gone or spoiled: it starts again from its base."""
        lane.lose_device_state()
        for worker in self.workers_of(lane):
            worker.training_slots.release(lane.model.model_id)
        self.refresh(lane)

    def worker_lost(self) -> None:
        """Every lane's device state is gone."""
        for lane in self.lanes.values():
            for step in list(lane.steps.values()):
                if step.num_outstanding:
                    step.attempts += 1
                    if step.attempts >= self.policy.attempts_max and not step.finished:
                        self._fail(
                            step, ServerError(f"The worker died {step.attempts} times while it ran this request.")
                        )
            if lane.resident or lane.pending_snapshots or lane.num_outstanding:
                lane.lose_device_state()
                self.refresh(lane)

    def _base_failed(self, answer: BaseSent, error: TxError) -> None:
        """What the run starts from cannot be loaded: an older snapshot and a longer replay, or the end of the run."""
        lane = answer.lane
        first = lane.steps.get(0)
        if first is not None and not first.finished:
            self.abandon(lane, error, [Delete("model", lane.model.model_id)])
            return
        damaged = {s.key for s in lane.model.snapshots if s.key == answer.key}
        older = tuple(s for s in lane.model.snapshots if s.key not in damaged)
        replayable = older or all(seq_id in lane.steps for seq_id in range(1, lane.base_seq_id + 1))
        lane.model = msgspec.structs.replace(lane.model, snapshots=older)
        if damaged and replayable:
            self.out.append(Append((Put(lane.model),)))
            self.lose_state(lane)
        else:
            lane.model = msgspec.structs.replace(lane.model, status="corrupted")
            self.abandon(lane, CorruptedModel(f"{CorruptedModel.__doc__} ({error.message})"), [Put(lane.model)])

    def abandon(self, lane: Lane, error: TxError, changes: Sequence[Change]) -> None:
        self.lose_state(lane)
        self.remove(lane)
        for step in list(lane.steps.values()):
            if not step.finished:
                self._fail(step, error)
        self.out.append(Append(tuple(changes)))

    def remove(self, lane: Lane) -> None:
        """The run ends here: no further operation of it will run."""
        for worker in self.workers_of(lane):
            slot = worker.training_slots.slot_of(lane.model.model_id)
            assert slot is not None
            self.out.append(worker.send(ReleaseAdapter(slot=slot), Ignored()))
            worker.training_slots.release(lane.model.model_id)
        lane.resident = False
        self.lanes.pop(lane.model.model_id, None)
        self.ready.pop(lane.model.model_id, None)
        self.gaps.discard(lane.model.model_id)

    def body_loaded(self, request: RequestRecord, operation: Operation | None) -> None:
        lane = self.lanes.get(request.subject)
        step = lane.steps.get(request.seq_id) if lane else None
        if lane is None or step is None:
            return
        step.fetching = False
        step.operation = operation
        if operation is None:
            lane.model = msgspec.structs.replace(lane.model, status="corrupted")
            self.abandon(lane, CorruptedModel(), [Put(lane.model)])
            return
        self.refresh(lane)

    def burn_gaps(self) -> None:
        for model_id in list(self.gaps):
            lane = self.lanes[model_id]
            if lane.gap_since is not None and self.clock.now - lane.gap_since >= self.policy.seq_gap_s:
                lane.burn_gap()
                self.refresh(lane)

    # ---- results

    def _succeed(self, step: Step, body: dict, changes: tuple[Change, ...] = ()) -> None:
        self._finish(step, "json", results.encode_json(body), changes)

    def _fail(self, step: Step, error: TxError) -> None:
        if not step.finished:
            step.failed = True
        self._finish(step, "error", results.encode_json(Failure.of(error)))

    def _finish(self, step: Step, content, payload: bytes, changes: tuple[Change, ...] = ()) -> None:
        lane = self.lanes.get(step.request.subject)
        if not step.finished:
            step.finished = True
            if not step.needs_replay:
                changes = (*changes, DropBody(step.request.request_id))
            record = ResultRecord(
                request_id=step.request.request_id, finished_at=self.clock.now, content=content, payload=payload
            )
            self.out.append(Finish(record, changes))
        # What may have to run again is read from the journal then.
        step.operation = None
        step.parts = {}
        if lane is not None:
            lane.last_active = self.clock.now
            self._commit_snapshots(lane)


_SAVE_TYPES = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}


def checkpoint_path(model_id: str, kind: str, name: str) -> str:
    return f"tinker://{model_id}/{kind}/{name}"


def error_of(category: str, message: str) -> TxError:
    return {"user": UserError, "server": ServerError}.get(category, TxError)(message)


def _all_finite(parts: list[tuple[Tensor, float]]) -> bool:
    return all(math.isfinite(loss) for _, loss in parts)
