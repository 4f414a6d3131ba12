"""How a restart picks up where the journal ends. All operations after each run's newest snapshot run again; those that
had reported their results run for their effect only."""

from __future__ import annotations

import logging

from tx_async.errors import Conflict, ServerError
from tx_async.scheduler.core.marks import DEATHS_MAX, ReplayMarks
from tx_async.scheduler.training.lanes import FORWARD, REPLAYED_KINDS, Lane
from tx_async.scheduler.training.training import Training
from tx_async.wire.operations import CreateModel, Sample, UnloadModel
from tx_async.wire.records import Delete, DropBody, RequestRecord

_log = logging.getLogger(__name__)


class RecoveryProgress:
    """Logs one line a second while runs repeat the operations that a crash has taken from the device."""

    def __init__(self):
        #: when replays were first seen (monotonic), and the largest number of them; None and 0 when there are none
        self._began: float | None = None
        self._most = 0

    def total(self, left: int) -> int:
        """How many operations a crash has taken, of which `left` have yet to run again."""
        return max(self._most, left)

    def report(self, left: int, now: float) -> None:
        """`left`: operations that have yet to run again. `now`: monotonic seconds."""
        if left:
            self._began = now if self._began is None else self._began
            self._most = max(self._most, left)
            done = self._most - left
            bar = "█" * (20 * done // self._most)
            _log.info("Recovery: %-20s %d of %d operations have run again", bar, done, self._most)
        elif self._began is not None:
            _log.info("Recovery: all %d operations have run again, in %.1f s", self._most, now - self._began)
            self._began, self._most = None, 0


def restore(training: Training, marks: ReplayMarks) -> list[RequestRecord]:
    """Build lanes from the catalog. Returns the unfinished samples."""
    catalog = training.decisions.catalog
    for model in catalog.models.values():
        if model.status == "live" and not catalog.is_of_other_base(model):
            training.runs.create(model)
    samples: list[RequestRecord] = []
    for request in list(catalog.requests.values()):
        is_finished = request.request_id in catalog.results
        if catalog.request_ids[request.subject, request.seq_id] != request.request_id:
            # Its commit was reported as failed, and the client tried again: the second one counts.
            training.decisions.append(Delete("request", request.request_id))
        elif request.kind == Sample.__name__:
            samples += [] if is_finished or _is_set_aside(training, request, marks) else [request]
        elif request.kind != CreateModel.__name__ and not _is_set_aside(training, request, marks, is_finished):
            with marks.of("restore", request.request_id):
                _restore_operation(training, request, is_finished)
    for lane in list(training.runs.lanes.values()):
        _refuse_latecomers(training, lane)
        training.runs.lose_state(lane)
        training.runs.littered[lane.model_id] = training.decisions.now
    return samples


def _is_set_aside(training: Training, request: RequestRecord, marks: ReplayMarks, is_finished: bool = False) -> bool:
    """Whether the request has ended the server too often to run again: it fails alone, and its run goes on without it.
    A request whose effect was reported takes its run with it, because nothing else has that effect."""
    if request.request_id != marks.poisoned or request.skipped:
        return False
    lane = training.runs.lanes.get(request.subject)
    _log.error(
        "Request %s (%s, seq_id %d of %s) has ended the server %d times while it was replayed: it is set aside.",
        *(request.request_id, request.kind, request.seq_id, request.subject, DEATHS_MAX),
    )
    error = ServerError(
        f"seq_id {request.seq_id} of {request.subject} ended the server {DEATHS_MAX} times while it was replayed after "
        "a restart, and was set aside."
    )
    step = training.runs.step(request, finished=is_finished)
    if not is_finished:
        if lane is not None and marks.may_take_its_place and request.kind != UnloadModel.__name__:
            lane.add(step)  # later operations need not wait for it
        training.runs.fail(step, error)
        training.decisions.append(DropBody(request.request_id))
    elif lane is not None and request.seq_id > lane.base_seq_id and step.needs_replay:
        training.runs.corrupt(lane, error)
    return True


def _restore_operation(training: Training, request: RequestRecord, is_finished: bool) -> None:
    lane = training.runs.lanes.get(request.subject)
    if lane is None or request.kind == UnloadModel.__name__:
        if not is_finished:
            training.end_without_lane(request)
    elif not is_finished or request.seq_id > lane.model.dropped_seq_id:
        lane.add(training.runs.step(request, finished=is_finished))


def _refuse_latecomers(training: Training, lane: Lane) -> None:
    """Refuse operations that came at the moment of the crash, after their seq_id was taken for burned: later ones ran
    without them, as their results show (results come in order, except those of saves and refusals)."""
    results = training.decisions.catalog.results
    ran = [
        step.seq_id
        for step in lane.steps.values()
        if step.finished and (step.needs_replay or (step.kind == FORWARD and not results[step.request_id].failed))
    ]
    passed = max(ran, default=lane.base_seq_id)
    for step in lane.steps.values():
        if not step.finished and step.kind in REPLAYED_KINDS and step.seq_id < passed:
            training.runs.fail(step, Conflict(f"seq_id {step.seq_id} came too late: later operations went ahead."))
