"""forward and forward_backward: rows of several runs share a micro-batch and come back as each request's result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tx_async.errors import InvalidRequest, NonFiniteLoss
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.fairness import FairQueue, Flow
from tx_async.scheduler.core.worker_state import WorkerState, error_of
from tx_async.scheduler.training.history_recorder import HistoryRecorder
from tx_async.scheduler.training.lanes import Lane, Step
from tx_async.scheduler.training.packing import PackedRow, fill, fits, pack
from tx_async.scheduler.training.rollout_gap import rollout_gap
from tx_async.scheduler.training.runs import Runs
from tx_async.wire import results
from tx_async.wire.operations import ForwardBackward
from tx_async.wire.ranks import class_of
from tx_async.wire.results import ForwardBackwardResult
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import CommandFailed, EngineInfo, TrainMicroBatch


class RowSent(Struct, frozen=True):
    lane: Lane
    step: Step
    attempt: int
    row: PackedRow

    @property
    def is_current(self) -> bool:
        return self.attempt == self.step.attempt


class RowsSent(Struct, frozen=True):
    rows: tuple[RowSent, ...]
    """Rows of the micro-batch in order; unused ones follow."""


class MicroBatches:
    def __init__(self, runs: Runs, decisions: Decisions, fair: FairQueue, history: HistoryRecorder):
        self.runs = runs
        self.decisions = decisions
        self.fair = fair
        self.history = history
        #: tokens of sequences that came back, for an operator
        self.num_tokens = 0

    # ---- out

    def prepare(self, step: Step, info: EngineInfo) -> None:
        """Pack the request. Raises `InvalidRequest` when this engine has no row for it (a worker of another
        configuration accepted it)."""
        assert isinstance(step.operation, ForwardBackward)
        if step.packed is None:
            if not fits(step.operation, info):
                raise InvalidRequest(
                    f"A sequence of this request is longer than the {info.max_context_length} tokens that this server "
                    "can train now, or has more targets per token."
                )
            step.laid_out(pack(step.operation, info))

    def send(self, worker: WorkerState, lane: Lane, step: Step) -> None:
        """Send one micro-batch that begins with the lane's next rows. The step was prepared and its lane is
        resident."""
        operation, packed = step.operation, step.packed
        assert isinstance(operation, ForwardBackward) and packed is not None
        length = packed.rows[step.num_rows_sent].length
        capacity = next(rows for rows, row_length in worker.info.row_shapes if row_length == length)
        rows = self._take_rows(lane, step, length, capacity)
        if not step.runs_alone:
            rows += self._take_neighbours(worker, lane, step, length, capacity - len(rows))
        slots = [worker.training_slots.touch(row.lane.model_id) for row in rows]
        unused = capacity - len(rows)
        command = TrainMicroBatch(
            slots=(*slots, *[-1] * unused),
            row_length=length,
            targets_per_token=packed.targets_per_token,
            forward_only=operation.forward_only,
        )
        contents = [(row.step.operation, row.row) for row in rows]
        tensors = fill([*contents, *[None] * unused], length, packed.targets_per_token)  # type: ignore[list-item]
        requests = dict.fromkeys(row.step.request_id for row in rows if not row.step.finished)
        self.decisions.send(worker, command, RowsSent(tuple(rows)), tensors, requests)

    def _take_rows(self, lane: Lane, step: Step, length: int, room: int) -> list[RowSent]:
        """Take the next rows of a prepared request, while they have this length and there is room."""
        assert step.packed is not None
        rows: list[RowSent] = []
        while step.num_rows_sent < len(step.packed.rows) and len(rows) < room:
            row = step.packed.rows[step.num_rows_sent]
            if row.length != length:
                break
            rows.append(RowSent(lane, step, step.attempt, row))
            step.row_sent()
            self.fair.charge(lane.flow, row.length)
        if step.all_rows_sent:
            lane.advance()
        return rows

    def _take_neighbours(self, worker: WorkerState, lane: Lane, step: Step, length: int, room: int) -> list[RowSent]:
        """Fill up with rows of other runs that fit the same program. They are whole rows, so nobody's numbers
        change."""
        rows: list[RowSent] = []
        if not room:
            return rows
        candidates: dict[Flow, tuple[Lane, Step]] = {}
        for model_id in worker.training_slots.slots():
            other = self.runs.lanes[model_id]
            candidate = other.next_step() if other is not lane and model_id in self.runs.ready else None
            if candidate is not None and self._joins(other, candidate, lane, step, length, worker.info):
                candidates[other.flow] = other, candidate
        for flow in self.fair.ranked(candidates):
            if len(rows) == room:
                break
            other, candidate = candidates[flow]
            rows += self._take_rows(other, candidate, length, room - len(rows))
            self.runs.refresh(other)
        return rows

    def _rank_class(self, lane: Lane, info: EngineInfo) -> int:
        return class_of(lane.model.lora.rank, info.lora_rank_classes or (info.max_lora_rank,))

    def _joins(self, other: Lane, candidate: Step, lane: Lane, step: Step, length: int, info: EngineInfo) -> bool:
        """Whether the other lane's candidate fits into a micro-batch of this lane's step."""
        ours, theirs = step.operation, candidate.operation
        assert isinstance(ours, ForwardBackward) and step.packed is not None
        if not isinstance(theirs, ForwardBackward) or theirs.forward_only != ours.forward_only or candidate.runs_alone:
            return False
        if self._rank_class(other, info) != self._rank_class(lane, info):
            return False
        if candidate.packed is None and not fits(theirs, info):
            return False
        self.prepare(candidate, info)
        assert candidate.packed is not None
        same_k = candidate.packed.targets_per_token == step.packed.targets_per_token
        return same_k and candidate.packed.rows[candidate.num_rows_sent].length == length

    # ---- back

    def finished(self, answer: RowsSent, tensors: Sequence[np.ndarray]) -> None:
        logprobs, losses = tensors
        for r, sent in enumerate(answer.rows):
            self.num_tokens += sum(segment.length for segment in sent.row.segments)
            if sent.is_current:
                self._collect(sent, logprobs[r], losses[r])

    def _collect(self, sent: RowSent, logprobs: np.ndarray, losses: np.ndarray) -> None:
        """logprobs [L, K], losses [L]"""
        step = sent.step
        operation = step.operation
        assert isinstance(operation, ForwardBackward)
        step.row_answered()
        if not step.finished:
            for segment in sent.row.segments:
                place = slice(segment.offset, segment.offset + segment.length)
                shape = operation.data[segment.datum].loss_fn_inputs["target_tokens"].shape
                k = shape[1] if len(shape) == 2 else 1
                values = np.ascontiguousarray(logprobs[place, :k], np.float32).reshape(shape or (segment.length,))
                step.parts[segment.datum] = (Tensor.of(values), float(losses[place].sum(dtype=np.float64)))
        if step.is_answered:
            self._end(sent.lane, step, operation)

    def _end(self, lane: Lane, step: Step, operation: ForwardBackward) -> None:
        """All of its rows are back. A loss that is not finite has spoiled the gradients of other requests, too: the run
        starts again from its base, without this request."""
        datum = next((i for i, (_, loss) in sorted(step.parts.items()) if not math.isfinite(loss)), None)
        if datum is None or operation.forward_only:
            self._report(step, operation)
            return
        loss = step.parts[datum][1]
        self.runs.fail(step, NonFiniteLoss(f"datum {datum}: its loss is {loss}. {NonFiniteLoss.default_message()}"))
        self.runs.lose_state(lane)

    def _report(self, step: Step, operation: ForwardBackward) -> None:
        if step.finished:
            self.runs.finish(step, "forward_backward", b"")
            return
        result = _result_of(step, operation)
        changes = () if operation.forward_only else self.history.trained(step, operation, result.metrics)
        self.runs.finish(step, "forward_backward", results.encode(result), *changes)

    def failed(self, answer: RowsSent, failure: CommandFailed) -> None:
        """The rows may have left gradients behind, so every run among them starts again from its base; but only a
        request that fails alone is to blame."""
        error = error_of(failure)
        current = {id(sent.step): sent.step for sent in answer.rows if sent.is_current}
        in_company = len({id(sent.step) for sent in answer.rows}) > 1
        for step in current.values():
            lane = self.runs.lanes.get(step.model_id)
            if lane is None or lane.steps.get(step.seq_id) is not step:
                continue
            if in_company:
                step.failed_beside_others()
                self.runs.lose_state(lane)
            elif error.category == "user" and not step.finished:
                self.runs.fail(step, error)
                self.runs.lose_state(lane)
            else:
                self.runs.try_again(step, error)


def _result_of(step: Step, operation: ForwardBackward) -> ForwardBackwardResult:
    parts = [step.parts[i] for i in range(len(operation.data))]
    losses = [loss for _, loss in parts]
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)
    logprobs = tuple(tensor for tensor, _ in parts)
    metrics = {"loss:sum": total} | rollout_gap(operation, (tensor.numpy() for tensor in logprobs))
    return ForwardBackwardResult(logprobs=logprobs, metrics=metrics)
