"""Training adapters on the device: a slot holds a run's base plus its operations so far, until another run needs it."""

from __future__ import annotations

from msgspec import Struct

from tx_async.errors import InvalidRequest, TxError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.worker_state import WorkerState, error_of
from tx_async.scheduler.training.lanes import Lane
from tx_async.scheduler.training.runs import Runs
from tx_async.scheduler.training.snapshots import Snapshots
from tx_async.wire.records import Delete
from tx_async.wire.worker import CommandFailed, CreateAdapter, LoadAdapter


class BaseSent(Struct, frozen=True):
    """The lane's base is being put into a slot."""

    lane: Lane
    key: str | None
    num_losses: int

    @property
    def is_current(self) -> bool:
        return self.num_losses == self.lane.num_losses


class TrainingSlots:
    def __init__(self, runs: Runs, snapshots: Snapshots, decisions: Decisions):
        self.runs = runs
        self.snapshots = snapshots
        self.decisions = decisions

    def bring(self, worker: WorkerState, lane: Lane) -> bool:
        """Put the lane's base into a slot. False when every slot is busy, or too narrow until the worker has started
        again. Raises `InvalidRequest` when no slot can ever hold it."""
        rank = lane.model.lora.rank
        if not worker.could_hold(rank):
            limit = max(worker.info.max_lora_rank, worker.info.lora_rank_limit)
            raise InvalidRequest(
                f"This run has rank {rank}; this server's slots hold at most {limit} (`max_lora_rank` in "
                "backend_config, or less where memory does not hold wider slots: then fewer max_lora_adapters help)."
            )
        if rank > worker.info.max_lora_rank:
            worker.outgrow(rank, self.decisions.now)
            return False
        slot = self._take_slot(worker, lane)
        if slot is None:
            return False
        key, optimizer = lane.load_from()
        if key is None:
            command = CreateAdapter(slot=slot, config=lane.model.lora)
        else:
            command = LoadAdapter(slot=slot, config=lane.model.lora, key=key, optimizer=optimizer)
        self.decisions.send(worker, command, BaseSent(lane, key, lane.num_losses))
        lane.base_sent()
        return True

    def _take_slot(self, worker: WorkerState, lane: Lane) -> int | None:
        slots = worker.training_slots
        slot = slots.take(lane.model_id)
        if slot is None:
            victim = slots.victim(lambda model_id: self._may_leave(self.runs.lanes[model_id]))
            if victim is None:
                return None
            self._evict(worker, self.runs.lanes[victim])
            slot = slots.take(lane.model_id)
        return slot

    def _may_leave(self, lane: Lane) -> bool:
        """Whether the lane may leave: not in the middle of a request, and not while storage refuses what the slot
        holds."""
        is_refused = lane.snapshot_outage.until > self.decisions.now and lane.is_dirty
        return lane.is_between_operations and not is_refused

    def _evict(self, worker: WorkerState, lane: Lane) -> None:
        """Evict a lane, only between two operations: a snapshot holds whole ones."""
        if lane.is_dirty:
            self.snapshots.take(worker, lane)
        worker.training_slots.release(lane.model_id)

    # ---- answers

    def finished(self, answer: BaseSent) -> None:
        lane = answer.lane
        if not answer.is_current:
            return
        lane.base_arrived()
        first = lane.steps.get(0)
        if first is not None and not first.finished:
            path, model_id = lane.model.created_from_path, lane.model_id
            self.runs.succeed(first, {"type": "load_weights", "path": path, "model_id": model_id})

    def failed(self, answer: BaseSent, failure: CommandFailed) -> None:
        lane = answer.lane
        if not answer.is_current or lane.model_id not in self.runs.lanes:
            return
        error = error_of(failure)
        first = lane.steps.get(0)
        is_creation = first is not None and not first.finished
        waited = lane.base_outage.has_lasted(self.decisions.now)
        gives_up = is_creation and waited >= self.runs.policy.storage_patience_s
        if error.category != "user" and not gives_up:
            self.runs.wait_for_storage(lane, lane.base_outage)
        elif is_creation:
            self.runs.abandon(lane, error, Delete("model", lane.model_id))
        else:
            self._without(lane, answer.key, error)

    def _without(self, lane: Lane, key: str | None, error: TxError) -> None:
        """The run's base is damaged: it goes on from an older snapshot with a longer replay, or ends."""
        snapshots = lane.model.snapshots
        if key not in {snapshot.key for snapshot in snapshots}:
            if key is None or key == lane.model.created_from:
                self.runs.corrupt(lane, error)
            else:
                self.runs.lose_state(lane)  # it was still being written: the base before it is good
            return
        older = tuple(snapshot for snapshot in snapshots if snapshot.key != key)
        if not older and lane.model.dropped_seq_id > 0:
            self.runs.corrupt(lane, error)
            return
        self.decisions.append(self.runs.changed(lane, snapshots=older))
        self.decisions.delete_files(key)
        self.runs.lose_state(lane)
