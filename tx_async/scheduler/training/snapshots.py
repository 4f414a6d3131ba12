"""Snapshots of training runs: when one is taken, when it counts, and what it replaces.

A snapshot is taken in the command stream, between two operations, and written in the background. It counts once its
files are durable and every operation that it contains has reported its result. The two newest are kept, and the bodies
of all operations since the older one, so that a damaged snapshot costs a longer replay.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import Struct

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.scheduler.training.lanes import Lane
from tx_async.scheduler.training.runs import Runs, snapshots_of
from tx_async.wire.records import Change, DropBody, Put, Snapshot
from tx_async.wire.worker import SaveAdapter

PENDING_MAX = 2
"""How many snapshots of one run may be on their way; a further one that is merely due waits until storage has caught
up."""


class SnapshotSent(Struct, frozen=True):
    lane: Lane
    snapshot: Snapshot


class Snapshots:
    def __init__(self, runs: Runs, decisions: Decisions):
        self.runs = runs
        self.decisions = decisions
        #: model_ids with snapshots that are durable and do not count yet
        self._unsettled: dict[str, None] = {}
        #: tells this life of the server from earlier ones
        self._life = f"{round(decisions.now * 1e6):x}"

    def take_if_due(self, worker: WorkerState, lane: Lane) -> None:
        policy = self.runs.policy
        many_steps = lane.num_steps_since_snapshot >= policy.snapshot_every_steps
        if many_steps or lane.num_bytes_since_snapshot >= policy.snapshot_every_bytes:
            lane.want_snapshot()
        may_take = len(lane.pending_snapshots) < PENDING_MAX and lane.snapshot_outage.until <= self.decisions.now
        if lane.snapshot_due and may_take and lane.is_dirty:
            self.take(worker, lane)

    def take(self, worker: WorkerState, lane: Lane) -> None:
        """Save the state after everything sent so far."""
        slot = worker.training_slots.slot_of(lane.model_id)
        assert slot is not None and lane.is_between_operations
        seq_id = lane.cursor - 1
        # A name is used once: a write that was given up, or whose server died, may still be going on.
        snapshot = Snapshot(f"{snapshots_of(lane.model_id)}/{seq_id}~{self._life}-{lane.num_losses}", seq_id)
        command = SaveAdapter(slot=slot, config=lane.model.lora, key=snapshot.key, kind="snapshot")
        self.decisions.send(worker, command, SnapshotSent(lane, snapshot))
        lane.snapshot_sent(snapshot)

    def take_all(self, worker: WorkerState, idle_since: float = math.inf) -> None:
        """Snapshot every dirty resident run that has been idle since then."""
        for lane in self.runs.lanes.values():
            is_resident = worker.has_run(lane.model_id)
            is_idle = is_resident and lane.last_active <= idle_since and lane.is_between_operations
            may_take = not lane.pending_snapshots and lane.snapshot_outage.until <= self.decisions.now
            if is_idle and may_take and lane.is_dirty:
                self.take(worker, lane)

    @property
    def are_pending(self) -> bool:
        """Whether some snapshots are on their way or do not count yet."""
        return bool(self._unsettled) or any(lane.pending_snapshots for lane in self.runs.lanes.values())

    # ---- answers

    def finished(self, answer: SnapshotSent) -> None:
        lane = answer.lane
        lane.snapshot_outage.over()
        if answer.snapshot not in lane.pending_snapshots or lane.model_id not in self.runs.lanes:
            self.decisions.delete_files(answer.snapshot.key)  # nobody waits for it any more
        else:
            lane.snapshot_written(answer.snapshot)
            self._unsettled[lane.model_id] = None

    def failed(self, answer: SnapshotSent) -> None:
        lane = answer.lane
        if answer.snapshot not in lane.pending_snapshots:
            return
        lane.snapshot_failed(answer.snapshot, self.decisions.now)
        if lane.model_id in self.runs.lanes and not self.runs.is_resident(lane):
            self.runs.lose_state(lane)

    def settle(self) -> None:
        """Let durable snapshots count once all their operations have reported their results."""
        for model_id in list(self._unsettled):
            lane = self.runs.lanes.get(model_id)
            if lane is None or self._settle(lane):
                del self._unsettled[model_id]

    def _settle(self, lane: Lane) -> bool:
        """True when nothing is left to wait for."""
        while lane.durable_snapshots:
            snapshot = lane.take_settled_snapshot()
            if snapshot is None:
                return False
            if snapshot.seq_id > lane.base_seq_id:
                self._commit(lane, snapshot)
            else:
                self.decisions.delete_files(snapshot.key)
        return True

    def _commit(self, lane: Lane, snapshot: Snapshot) -> None:
        model = lane.model
        kept = (snapshot, *model.snapshots[:1])
        files = [old.key for old in model.snapshots[1:]]
        dropped = kept[-1].seq_id if len(kept) > 1 else model.dropped_seq_id
        changes: list[Change] = [self.runs.changed(lane, snapshots=kept, dropped_seq_id=dropped)]
        if len(kept) > 1:
            for step in lane.cover(dropped):
                changes.append(DropBody(step.request_id))
                if step.request.storage_key:
                    files.append(step.request.storage_key)
                    changes.append(Put(msgspec.structs.replace(step.request, storage_key="")))
            if model.dropped_seq_id == 0 and model.created_from:
                files.append(model.created_from)
        self.decisions.append(*changes)
        for key in files:
            self.decisions.delete_files(key)
