"""The trainer's side of the scheduler: which run's operation goes to the device next.

Commands are issued as soon as their predecessors are in the device's stream (not: finished), so that a pipelining
client never leaves the device idle; answers are matched to the run of the step that asked for them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from msgspec import Struct

from tx_async.errors import Conflict, InvalidRequest, TxError, UserError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.fairness import FairQueue, Flow
from tx_async.scheduler.core.marks import ReplayMarks
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Cause, WorkerState, cause_of, error_of
from tx_async.scheduler.training.history_recorder import HistoryRecorder
from tx_async.scheduler.training.lanes import Lane, Step
from tx_async.scheduler.training.micro_batches import MicroBatches, RowsSent
from tx_async.scheduler.training.runs import Runs
from tx_async.scheduler.training.saves import Saves
from tx_async.scheduler.training.snapshots import Snapshots, SnapshotSent
from tx_async.scheduler.training.training_slots import BaseSent, TrainingSlots
from tx_async.wire.operations import (
    CreateModelFromCheckpoint,
    ForwardBackward,
    LoadWeights,
    Operation,
    OptimStep,
    Rejected,
    SaveWeights,
    UnloadModel,
)
from tx_async.wire.records import RequestRecord
from tx_async.wire.worker import CommandFailed, CommandFinished, Saved, StepOptimizer, Stepped

_log = logging.getLogger(__name__)

SESSION_LEVEL = 2
"""The length of a flow's prefix that names the session."""
BODIES_AHEAD = 8
"""How many bodies a replay reads from the journal before their turn."""


class StepSent(Struct, frozen=True):
    """An operation that is one command."""

    lane: Lane
    step: Step
    attempt: int
    is_again: bool = False
    """Whether it repeats a save that storage did not take the first time."""

    @property
    def is_current(self) -> bool:
        return self.attempt == self.step.attempt


TrainingAnswer = RowsSent | StepSent | BaseSent | SnapshotSent


def _session_of(flow: Flow) -> Flow:
    return flow[:SESSION_LEVEL]


class Training:
    def __init__(
        self, decisions: Decisions, policy: Policy, workers: dict[str, WorkerState], marks: ReplayMarks | None = None
    ):
        self.decisions = decisions
        self.policy = policy
        self.marks = marks or ReplayMarks()
        self.fair = FairQueue()
        self.runs = Runs(decisions, policy, workers)
        self.snapshots = Snapshots(self.runs, decisions)
        self.slots = TrainingSlots(self.runs, self.snapshots, decisions)
        self.saves = Saves(self.runs, decisions)
        self.history = HistoryRecorder(decisions, policy)
        self.micro_batches = MicroBatches(self.runs, decisions, self.fair, self.history)
        #: saves that were answered before their base, or steps that they contain, were; with size or failure
        self._held_saves: list[tuple[StepSent, int | TxError]] = []
        #: saves that storage has not taken yet
        self._waiting_saves: list[StepSent] = []
        #: (save or snapshot, reason) -> how many failed, for an operator
        self.failures: Counter[tuple[str, Cause]] = Counter()
        #: no operation begins any more; those partly on the device still end
        self.is_draining = False

    # ---- accepting

    def accept(self, request: RequestRecord, operation: Operation) -> None:
        lane = self.runs.lanes.get(request.subject)
        if lane is None or isinstance(operation, UnloadModel):
            self.end_without_lane(request)
        elif lane.is_used_up(request.seq_id):
            self._refuse(request, Conflict(f"seq_id {request.seq_id} came too late: later operations went ahead."))
        else:
            step = self.runs.step(request, operation)
            lane.add(step)
            if isinstance(operation, Rejected):  # whatever comes before it, its answer is known
                self.runs.fail(step, UserError(operation.message))
            self.runs.touch(lane)
            self.runs.refresh(lane)

    def _refuse(self, request: RequestRecord, error: TxError) -> None:
        self.runs.fail(self.runs.step(request), error)

    def end_without_lane(self, request: RequestRecord) -> None:
        """End a request that needs no place in the order of operations: unload_model, whatever comes after it, and any
        request to a run that belongs to another base."""
        model = self.decisions.catalog.models.get(request.subject)
        try:
            if model is not None:
                self.decisions.catalog.check_base(model)
        except TxError as error:
            self._refuse(request, error)
            return
        if request.kind == UnloadModel.__name__:
            self._unload(request)
            return
        status = model.status if model else "gone"
        self._refuse(request, UserError(f"This training run is {status}: no operation can run on it any more."))

    def _unload(self, request: RequestRecord) -> None:
        if lane := self.runs.lanes.get(request.subject):
            change = self.runs.changed(lane, status="unloaded")
            self.runs.abandon(lane, UserError("This model was unloaded before the request could run."), change)
        self.runs.succeed(self.runs.step(request), {"type": "unload_model", "model_id": request.subject})

    # ---- issuing

    def has_work(self, worker: WorkerState) -> bool:
        return any(self._may_run(worker, self.runs.lanes[model_id]) for model_id in self.runs.ready)

    def _may_run(self, worker: WorkerState, lane: Lane) -> bool:
        if not lane.can_go_on(self.decisions.now):
            return False
        begins_nothing = self.is_draining or worker.outgrown_by > 0
        return not (begins_nothing and lane.is_between_operations)

    def issue(self, worker: WorkerState) -> bool:
        """Send the commands up to and including the next micro-batch. False when there was none to send."""
        if isinstance(worker.reserved_for, Step):
            lane = self.runs.lanes.get(worker.reserved_for.model_id)
            return lane is not None and self._issue_lane(worker, lane)
        if worker.reserved_for is not None:
            return False
        self._issue_due_steps(worker)
        flows = {lane.flow: lane for lane in self.runs.ready_lanes() if self._may_run(worker, lane)}
        for _session, runs in groupby(self.fair.order(flows), key=_session_of):  # a session's runs come together
            for lane in sorted([flows[flow] for flow in runs], key=lambda lane: self._rank(worker, lane)):
                if self._issue_lane(worker, lane):
                    return True
                if worker.reserved_for is not None or worker.is_full("train"):
                    return False
        return False

    def _issue_due_steps(self, worker: WorkerState) -> None:
        """An optimizer step belongs to the turn of the batch before it: if another run took the slot first, gradients
        would leave with this one and come back."""
        for lane in self.runs.ready_lanes():
            if worker.is_full("train"):
                return
            if lane.owes_step and worker.has_run(lane.model_id) and self._may_run(worker, lane):
                self._issue_step(worker, lane)
                self.runs.refresh(lane)

    def _rank(self, worker: WorkerState, lane: Lane) -> tuple[bool, bool, float, int]:
        """Within a session, runs on the device go first, because moving adapters costs more than taking turns; but only
        for a while."""
        is_patient = self.runs.turn - lane.waiting_since_turn < self.policy.patience_turns
        return is_patient, not worker.has_run(lane.model_id), self.fair.charged(lane.flow), lane.waiting_since_turn

    def _issue_lane(self, worker: WorkerState, lane: Lane) -> bool:
        """Send all that the lane has ready, up to its next micro-batch. True when a micro-batch was sent."""
        is_sent, goes_on = False, True
        while goes_on and not is_sent and not worker.is_full("train") and self._may_run(worker, lane):
            is_sent, goes_on = self._issue_step(worker, lane)
        self.runs.refresh(lane)
        return is_sent

    def _issue_step(self, worker: WorkerState, lane: Lane) -> tuple[bool, bool]:
        """Send the lane's next operation, or a micro-batch of it. -> (whether a micro-batch was sent, whether more may
        follow)"""
        step = lane.next_step()
        assert step is not None
        if step.operation is None:
            self._fetch_bodies(lane)
            return False, False
        try:
            if not self._is_admitted(worker, lane, step):
                return False, False
            return self._send_marked(worker, lane, step), True
        except TxError as error:
            if step.finished:
                self.runs.refuse(lane, error)
            else:
                self.runs.fail(step, error)
            return False, True

    def _fetch_bodies(self, lane: Lane) -> None:
        for seq_id in range(lane.cursor, lane.cursor + BODIES_AHEAD):
            step = lane.steps.get(seq_id)
            if step and step.operation is None and not step.fetching and (step.needs_replay or not step.finished):
                step.body_asked()
                self.decisions.fetch_body(step.request_id)

    def _is_admitted(self, worker: WorkerState, lane: Lane, step: Step) -> bool:
        """Whether the lane is on the device, or was just brought there, and a suspect has the device to itself."""
        if isinstance(step.operation, Rejected):
            return True
        if isinstance(step.operation, LoadWeights) and self.saves.must_wait(step, step.operation):
            return False
        if not worker.has_run(lane.model_id) and not self.slots.bring(worker, lane):
            return False
        worker.training_slots.touch(lane.model_id)
        if worker.reserved_for not in (None, step):
            return False
        if step.runs_alone:
            worker.reserve_for(step)
        return not step.runs_alone or step.num_outstanding > 0 or worker.num_quanta == 0

    def _send_marked(self, worker: WorkerState, lane: Lane, step: Step) -> bool:
        """`_send` with a mark, as an operation from the journal may be what ended the last process."""
        if not step.is_from_journal:
            return self._send(worker, lane, step)
        with self.marks.of("run", step.request_id):
            return self._send(worker, lane, step)

    def _send(self, worker: WorkerState, lane: Lane, step: Step) -> bool:
        """True when a micro-batch was sent. Raises `TxError` when the operation cannot run."""
        operation = step.operation
        if isinstance(operation, ForwardBackward):
            self.micro_batches.prepare(step, worker.info)
            self.runs.turn += 1
            lane.waits_from(self.runs.turn)
            self.micro_batches.send(worker, lane, step)
        else:
            self._send_command(worker, lane, step)
        if step.is_sent and worker.has_run(lane.model_id):
            self.snapshots.take_if_due(worker, lane)
        return isinstance(operation, ForwardBackward)

    def _send_command(self, worker: WorkerState, lane: Lane, step: Step) -> None:
        slot = worker.training_slots.slot_of(lane.model_id)
        match step.operation:
            case OptimStep(adam_params=adam):
                assert slot is not None
                command = StepOptimizer(slot=slot, adam=adam)
            case SaveWeights() as operation:
                assert slot is not None
                command = self.saves.command(lane, step, operation, slot)
            case LoadWeights() as operation:
                assert slot is not None
                command = self.saves.load_command(lane, step, operation, slot)
                lane.want_snapshot()  # what came before does not matter any more
            case CreateModelFromCheckpoint():
                lane.advance()  # it is only a new base: see `TrainingSlots.finished`
                return
            case Rejected(message=message):
                lane.advance()
                raise InvalidRequest(message)
            case _:
                raise AssertionError(f"{type(step.operation).__name__} is not a training operation")
        lane.advance()
        step.sent_alone()
        self.fair.charge(lane.flow, worker.info.micro_batch_overhead)  # the device has no smaller pieces of work
        requests = () if step.finished else (step.request_id,)
        self.decisions.send(worker, command, StepSent(lane, step, step.attempt), requests=requests)

    # ---- answers

    def finished(self, answer: TrainingAnswer, outcome: CommandFinished, tensors: Sequence[np.ndarray]) -> None:
        match answer:
            case RowsSent():
                self.micro_batches.finished(answer, tensors)
            case StepSent() if answer.is_current:
                self._step_finished(answer, outcome)
            case BaseSent():
                self.slots.finished(answer)
            case SnapshotSent():
                self.snapshots.finished(answer)
            case StepSent():
                pass  # of an attempt that was given up

    def failed(self, answer: TrainingAnswer, failure: CommandFailed) -> None:
        match answer:
            case RowsSent():
                self.micro_batches.failed(answer, failure)
            case StepSent() if answer.is_current:
                self._step_failed(answer, failure)
            case BaseSent():
                self.slots.failed(answer, failure)
            case SnapshotSent():
                self.failures["snapshot", cause_of(failure)] += 1
                _log.warning("A snapshot of %s failed and is tried again: %s", answer.lane.model_id, failure.message)
                self.snapshots.failed(answer)
            case StepSent():
                pass  # of an attempt that was given up

    def settle(self) -> None:
        """After every fact, let saves and snapshots count whose operations have all been answered."""
        if self._held_saves:
            held, self._held_saves = self._held_saves, []
            for sent, outcome in held:
                if sent.is_current:
                    self._end_save(sent, outcome)
        self.snapshots.settle()

    def _end_save(self, sent: StepSent, outcome: int | TxError) -> None:
        """outcome: the size in bytes, or why the save failed. It may come before the answers of the operations that the
        files contain, and one of those may still fail: then the files are not what they should be, or the failure is
        not the save's own."""
        lane, step = sent.lane, sent.step
        assert isinstance(step.operation, SaveWeights)
        if not lane.is_settled_before(step.seq_id):
            self._held_saves.append((sent, outcome))
        elif isinstance(outcome, int):
            self.saves.finished(lane, step, step.operation, outcome)
        else:
            self.saves.forget(lane, step, step.operation)
            self.runs.fail(step, outcome)

    def _step_finished(self, sent: StepSent, outcome: CommandFinished) -> None:
        step, result = sent.step, outcome.result
        match step.operation:
            case OptimStep():
                assert isinstance(result, Stepped)
                finite = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
                changes = () if step.finished else self.history.stepped(step, result)
                self.runs.succeed(step, {"metrics": finite}, *changes)
            case SaveWeights():
                assert isinstance(result, Saved)
                self._end_save(sent, result.size_bytes)
            case LoadWeights(path=path):
                body = {"type": "load_weights", "path": path, "model_id": sent.lane.model_id}
                changes = () if step.finished else self.history.dropped(sent.lane.model_id)
                self.runs.succeed(step, body, *changes)
            case _:
                pass  # its result is not a command's

    def _step_failed(self, sent: StepSent, failure: CommandFailed) -> None:
        lane, step, error = sent.lane, sent.step, error_of(failure)
        match step.operation:
            case SaveWeights():
                self.failures["save", cause_of(failure)] += 1
                self._save_failed(sent, error)
            case OptimStep() if error.category == "user":
                self.decisions.append(*(() if step.finished else self.history.dropped(lane.model_id)))
                self.runs.fail(step, error, had_effect=True)  # NaN gradients: cleared, weights as before
            case LoadWeights() if not step.finished and (error.category == "user" or self._is_given_up(step)):
                self.runs.fail(step, error)
                self.runs.lose_state(lane)
            case LoadWeights() if error.category == "server":
                self.runs.wait_for_storage(lane, step.out_of_reach())
            case _:
                self.runs.try_again(step, error)

    def _save_failed(self, sent: StepSent, error: TxError) -> None:
        """A save that storage does not take is written again from the worker's memory, while the run goes on."""
        lane, step, now = sent.lane, sent.step, self.decisions.now
        outage = step.out_of_reach()
        if error.category == "user" and sent.is_again:
            self.runs.wait_for_storage(lane, outage)  # the adapter is no longer in memory: a replay makes it again
            return
        outage.failed(now)
        if error.category == "user" or outage.has_lasted(now) >= self.policy.storage_patience_s:
            self._end_save(sent, error)
            return
        _log.warning("A save of %s waits for storage, %.0f s by now: %s", lane.model_id, outage.has_lasted(now), error)
        step.waits_for_storage()
        self._waiting_saves.append(sent)

    def save_again(self, worker: WorkerState) -> None:
        """Send the saves that storage has not taken once more, when their pause is over."""
        waiting, self._waiting_saves = self._waiting_saves, []
        for sent in waiting:
            lane, step = sent.lane, sent.step
            if not sent.is_current or lane.model_id not in self.runs.lanes:
                continue
            is_due = step.outage is None or step.outage.until <= self.decisions.now
            if not is_due or len(worker.in_flight) >= self.policy.commands_in_flight_max:
                self._waiting_saves.append(sent)
                continue
            step.sent_alone()
            command = self.saves.command_again(lane, step)
            self.decisions.send(worker, command, StepSent(lane, step, step.attempt, is_again=True))

    def _is_given_up(self, step: Step) -> bool:
        """Whether storage has failed for too long to deliver what the step must load."""
        now = self.decisions.now
        return step.outage is not None and step.outage.has_lasted(now) >= self.policy.storage_patience_s

    def body_loaded(self, request: RequestRecord, operation: Operation | None, error: TxError) -> None:
        lane = self.runs.lanes.get(request.subject)
        step = lane.steps.get(request.seq_id) if lane else None
        if lane is None or step is None or step.request_id != request.request_id:
            return
        step.body_loaded(operation)
        if operation is not None:
            self.runs.refresh(lane)
        elif step.finished:
            self.runs.corrupt(lane, error)
        else:
            self.runs.fail(step, error)
            self.runs.refresh(lane)
