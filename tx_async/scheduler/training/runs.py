"""All live training runs: which of them can go on, how their operations end, and how their device state is lost."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tx_async.errors import CorruptedModel, ServerError, TxError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.outages import Outage
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Ignored, WorkerState
from tx_async.scheduler.training.lanes import REPLAYED_KINDS, Lane, Step
from tx_async.wire import results
from tx_async.wire.operations import Operation
from tx_async.wire.records import Change, DropBody, ModelRecord, Put, RequestRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import ReleaseAdapter

REFUSED_S = 10.0
"""How long a run that cannot go on here waits before its new operations are refused, too."""


class Runs:
    def __init__(self, decisions: Decisions, policy: Policy, workers: dict[str, WorkerState]):
        self.decisions = decisions
        self.policy = policy
        #: all attached workers; a run that loses its state, or ends, leaves their slots
        self.workers = workers
        self.lanes: dict[str, Lane] = {}
        #: model_ids whose next operation has come; too many are harmless, a missing one would stall
        self.ready: dict[str, None] = {}
        #: model_ids that wait for missing predecessors
        self.gaps: set[str] = set()
        #: model_ids whose storage may hold snapshots that nobody waits for any more -> since when
        self.littered: dict[str, float] = {}
        #: counts micro-batches, in which waiting is measured
        self.turn = 0

    def create(self, model: ModelRecord) -> Lane:
        self.lanes[model.model_id] = lane = Lane(model, self.decisions.catalog.models, self.decisions.now)
        return lane

    def step(self, request: RequestRecord, operation: Operation | None = None, finished: bool = False) -> Step:
        return Step.of(self.decisions.catalog.requests, request, operation, finished)

    def is_resident(self, lane: Lane) -> bool:
        return any(worker.has_run(lane.model_id) for worker in self.workers.values())

    def changed(self, lane: Lane, **fields: Any) -> Put:
        """A run's record with new contents, for the caller to append with whatever belongs to it."""
        return Put(msgspec.structs.replace(lane.model, **fields))

    def touch(self, lane: Lane) -> None:
        """Note that the run was used: in memory at once, on disk with the record's next version."""
        now = self.decisions.now
        lane.used(now)
        lane.heard(now)
        self.decisions.know(self.changed(lane, last_request_at=now))

    def heard_of(self, model_id: str) -> None:
        """A submission arrived that was not accepted, for now: its client will try again."""
        if lane := self.lanes.get(model_id):
            lane.heard(self.decisions.now)

    def refresh(self, lane: Lane) -> None:
        """Check again whether the lane can go on."""
        if lane.next_step() is not None:
            if lane.model_id not in self.ready:
                lane.waits_from(self.turn)
            self.ready[lane.model_id] = None
            self.gaps.discard(lane.model_id)
            return
        self.ready.pop(lane.model_id, None)
        if lane.has_gap:
            self.gaps.add(lane.model_id)

    @property
    def num_replays(self) -> int:
        """Operations that have reported their results and run again for their effect."""
        return sum(
            step.finished and step.needs_replay and (step.seq_id >= lane.cursor or step.num_outstanding > 0)
            for lane in self.ready_lanes()
            for step in lane.steps.values()
        )

    def ready_lanes(self) -> list[Lane]:
        return [self.lanes[model_id] for model_id in self.ready]

    def burn_gaps(self) -> None:
        for model_id in sorted(self.gaps):
            lane = self.lanes[model_id]
            if lane.has_gap and self.decisions.now - lane.heard_at >= lane.gap_limit(self.policy):
                lane.burn_gap()
                self.refresh(lane)

    # ---- how operations end

    def succeed(self, step: Step, body: dict[str, Any], *changes: Change) -> None:
        self.finish(step, "json", results.encode_json(body), *changes)

    def fail(self, step: Step, error: TxError, *, had_effect: bool = False) -> None:
        """Fail an operation. `had_effect`: it has changed the run's state, so a replay must include it."""
        changes: tuple[Change, ...] = ()
        if step.kind in REPLAYED_KINDS and not step.finished and not had_effect:
            skipped = msgspec.structs.replace(step.request, skipped=True)
            changes = (Put(skipped), DropBody(step.request_id))
        self.finish(step, "error", results.encode_json(Failure.of(error)), *changes)

    def finish(
        self, step: Step, content: Literal["json", "forward_backward", "error"], payload: bytes, *changes: Change
    ) -> None:
        """Report the result, once: an operation that runs again for its effect has reported it before."""
        if not step.finished:
            step.reported()
            if not step.needs_replay:
                changes = (*changes, DropBody(step.request_id))
            self.decisions.finish(step.request, content, payload, *changes)
        step.settle()
        if lane := self.lanes.get(step.model_id):
            lane.used(self.decisions.now)

    def try_again(self, step: Step, error: TxError) -> None:
        """It failed, as far as one can tell, through no fault of its own: run it once more from the base, at most
        `attempts_max` times."""
        lane = self.lanes.get(step.model_id)
        if lane is None:
            return
        step.failed()
        if step.num_failures >= self.policy.attempts_max:
            if not step.finished:
                self.fail(step, error)
            elif step.num_failures >= 3 * self.policy.attempts_max:
                self.corrupt(lane, error)
                return
        self.lose_state(lane)

    def wait_for_storage(self, lane: Lane, outage: Outage) -> None:
        """Storage may only be out of reach for a while, which damages nothing."""
        outage.failed(self.decisions.now)
        lane.block_until(outage.until)
        self.lose_state(lane)

    def refuse(self, lane: Lane, error: TxError) -> None:
        """The run cannot go on with the server's present configuration: unfinished operations fail, but nothing is
        lost."""
        for step in sorted(lane.steps.values(), key=lambda step: step.seq_id):
            if not step.finished:
                self.fail(step, error)
        lane.block_until(self.decisions.now + REFUSED_S)

    # ---- how runs lose their place, and end

    def lose_state(self, lane: Lane) -> None:
        """The device state is gone or spoiled: the run starts again from its base."""
        for snapshot in lane.durable_snapshots:  # some of its results were not reported, so it cannot be a base
            self.decisions.delete_files(snapshot.key)
        if lane.pending_snapshots:
            self.littered[lane.model_id] = self.decisions.now
        lane.lose_device_state()
        for worker in self.workers.values():
            if lane.model_id in worker.training_slots:
                worker.training_slots.release(lane.model_id)
        self.refresh(lane)

    def worker_lost(self, trainer: WorkerState) -> None:
        """The trainer is gone, and every lane's device state with it."""
        for lane in list(self.lanes.values()):
            suspects = [step for step in lane.steps.values() if step.num_outstanding]
            if trainer.has_run(lane.model_id) or lane.num_bases_awaited or lane.pending_snapshots or suspects:
                for step in () if trainer.is_leaving else suspects:
                    self.try_again(
                        step, ServerError(f"The worker died {step.num_failures + 1} times while it ran this.")
                    )
                if lane.model_id in self.lanes:
                    self.lose_state(lane)

    def corrupt(self, lane: Lane, error: TxError) -> None:
        """The run ends: no undamaged state is left to start from."""
        change = self.changed(lane, status="corrupted")
        self.abandon(lane, CorruptedModel(f"{CorruptedModel.default_message()} ({error.message})"), change)

    def abandon(self, lane: Lane, error: TxError, *changes: Change) -> None:
        """The run ends here: unfinished operations fail, and its own files are deleted."""
        self._leave_device(lane)
        del self.lanes[lane.model_id]
        self.ready.pop(lane.model_id, None)
        self.gaps.discard(lane.model_id)
        drops = tuple(DropBody(step.request_id) for step in lane.steps.values())
        files = {step.request.storage_key for step in lane.steps.values()} | {lane.model.created_from}
        self.decisions.append(*changes, *drops)
        for step in sorted(lane.steps.values(), key=lambda step: step.seq_id):
            step.restart()
            self.fail(step, error)
        self.decisions.delete_files(snapshots_of(lane.model_id))
        for key in files:
            if key:
                self.decisions.delete_files(key)

    def _leave_device(self, lane: Lane) -> None:
        for worker in self.workers.values():
            slot = worker.training_slots.slot_of(lane.model_id)
            if slot is not None:
                self.decisions.send(worker, ReleaseAdapter(slot=slot), Ignored())
                worker.training_slots.release(lane.model_id)


def snapshots_of(model_id: str) -> str:
    """Storage prefix of all snapshots of a run."""
    return f"{model_id}/snapshots"
