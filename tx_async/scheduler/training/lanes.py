"""A lane is one training run: its operations in `seq_id` order, which of them the device has, and which must run again
after a loss.

The lane's device state is always "base + operations up to the cursor", where the base is the newest snapshot, or the
run's creation. Losing the device state therefore only means moving the cursor back to the base; operations that had
finished by then run again for their effect, and their results are not reported twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from tx_async.errors import Conflict, InvalidRequest
from tx_async.scheduler.core.fairness import Flow
from tx_async.scheduler.core.outages import Outage
from tx_async.scheduler.core.policy import ALONE_FROM_FAILURES, Policy
from tx_async.scheduler.training.packing import PackedRequest
from tx_async.scheduler.training.ranges import Ranges
from tx_async.wire.operations import ForwardBackward, LoadWeights, Operation, OptimStep, Rejected
from tx_async.wire.records import ModelRecord, RequestRecord, Snapshot
from tx_async.wire.tensors import Tensor

FORWARD = "Forward"
"""The kind of a forward_backward that leaves no gradients."""
REPLAYED_KINDS = (ForwardBackward.__name__, OptimStep.__name__, LoadWeights.__name__)
"""The operations that a run's state depends on; saves, forward passes and refusals leave it as it is."""
CHUNK_KINDS = (ForwardBackward.__name__, FORWARD, Rejected.__name__)
"""The operations that may be a piece of a batch."""


class Step(Struct, eq=False):
    """One operation of a lane, from its acceptance until a snapshot covers it. Others read its fields, and change them
    only through its verbs."""

    request_id: str
    model_id: str
    seq_id: int
    kind: str
    """The operation's name; "Forward" for a forward_backward that leaves no gradients."""
    requests: Mapping[str, RequestRecord]
    """The catalog's: changes of a request's record are made there."""
    operation: Operation | None = None
    """None when only the journal has the body."""
    finished: bool = False
    """Its result was reported."""
    fetching: bool = False
    is_from_journal: bool = False
    """`operation` was read from the journal: it runs again, or the server restarted before its first run."""
    num_failures: int = 0
    """How many times in a row it was running when a worker died or the engine failed."""
    failed_in_company: bool = False
    """A micro-batch that it shared with others failed: it runs alone, so that only the culprit fails."""
    outage: Outage | None = None
    """The outage of the storage that it must load from, or save to."""

    # ---- of the current attempt; cleared by `restart`
    attempt: int = 0
    """Counts how often it was begun: answers to commands of an earlier attempt are ignored."""
    packed: PackedRequest | None = None
    num_rows_sent: int = 0
    is_sent: bool = False
    """Whether all of its commands are in the device's stream."""
    num_outstanding: int = 0
    """How many rows or commands have answers outstanding."""
    parts: dict[int, tuple[Tensor, float]] = {}
    """The results so far: datum index -> (log-probabilities, its sum of loss terms)."""

    @classmethod
    def of(
        cls,
        requests: Mapping[str, RequestRecord],
        request: RequestRecord,
        operation: Operation | None = None,
        finished: bool = False,
    ) -> Step:
        return cls(
            request.request_id, request.subject, request.seq_id, request.kind, requests, operation, finished=finished
        )

    @property
    def request(self) -> RequestRecord:
        return self.requests[self.request_id]

    def laid_out(self, packed: PackedRequest) -> None:
        """Its rows are known; they stay the same until it is restarted."""
        self.packed = packed

    def row_sent(self) -> None:
        self.num_rows_sent += 1
        self.num_outstanding += 1

    def row_answered(self) -> None:
        self.num_outstanding -= 1

    @property
    def all_rows_sent(self) -> bool:
        return self.packed is not None and self.num_rows_sent == len(self.packed.rows)

    @property
    def is_answered(self) -> bool:
        return self.is_sent and self.num_outstanding == 0

    def settle(self) -> None:
        """All of the operation was answered: it is no longer suspected, and only the journal keeps its body."""
        self.num_outstanding = 0
        self.num_failures = 0
        self.outage = None
        self.operation = None
        self.packed = None
        self.parts = {}

    def reported(self) -> None:
        """Its result is on its way to the disk: later attempts report none."""
        self.finished = True

    def failed(self) -> None:
        """It was running when a worker died or the engine failed."""
        self.num_failures += 1

    def failed_beside_others(self) -> None:
        self.failed_in_company = True

    def sent_alone(self) -> None:
        """The operation was sent, as one command."""
        self.num_outstanding = 1

    def waits_for_storage(self) -> None:
        """The step waits, and nothing of it is on the worker meanwhile."""
        self.num_outstanding = 0

    def body_asked(self) -> None:
        self.fetching = True

    def body_loaded(self, operation: Operation | None) -> None:
        self.fetching = False
        self.is_from_journal = True
        self.operation = operation

    def out_of_reach(self) -> Outage:
        """Storage does not deliver what the step must load, or does not take what it saves."""
        self.outage = self.outage or Outage()
        return self.outage

    def restart(self) -> None:
        self.attempt += 1
        self.packed = None
        self.num_rows_sent = 0
        self.is_sent = False
        self.num_outstanding = 0
        self.parts = {}

    @property
    def needs_replay(self) -> bool:
        """Whether the run's state depends on it. An optim_step that met NaN gradients has cleared them: it counts."""
        return self.kind in REPLAYED_KINDS and not self.request.skipped

    @property
    def runs_alone(self) -> bool:
        return self.failed_in_company or self.num_failures >= ALONE_FROM_FAILURES


class Lane:
    """A training run. Others read its fields, and change them only through its verbs."""

    def __init__(self, model: ModelRecord, models: Mapping[str, ModelRecord], now: float = 0.0):
        """models: the catalog's, which owns the record."""
        self.model_id = model.model_id
        #: its flow: keys, each key's sessions and each session's runs share the device fairly
        self.flow: Flow = (model.owner, model.session_id, model.model_id)
        self._models = models
        #: seq_id -> accepted operations that no snapshot covers beyond doubt
        self.steps: dict[int, Step] = {}
        #: the seq_id of the next operation for the device; all before it are part of the device state
        self.cursor = self.base_seq_id + 1
        #: seq_ids that will never come: later ones have gone ahead
        self.burned = Ranges()
        #: the largest seq_id that was accepted
        self.newest_seq_id = max(self.base_seq_id, model.newest_seq_id)
        #: when the newest submission of the run arrived, accepted or refused for the moment: its client is alive
        self.heard_at = now
        #: bases on their way to a slot: until the answer nobody knows whether the slot holds what it should
        self.num_bases_awaited = 0
        #: how often the device state was lost: answers that belong to an earlier one are ignored
        self.num_losses = 0
        #: snapshots on their way: sent, their files not yet known to be durable; oldest first
        self.pending_snapshots: list[Snapshot] = []
        #: snapshots whose files are durable, while operations that they contain are unfinished
        self.durable_snapshots: list[Snapshot] = []
        self.num_steps_since_snapshot = 0
        self.num_bytes_since_snapshot = 0
        self.snapshot_due = False
        #: storage refuses snapshots: none is taken meanwhile, and the run keeps its slot if leaving needed one
        self.snapshot_outage = Outage()
        #: when it was last used
        self.last_active = now
        #: the trainer's turn since which the lane has waited to be served
        self.waiting_since_turn = 0
        #: it cannot go on before this time
        self.blocked_until = 0.0
        #: storage does not deliver its base
        self.base_outage = Outage()

    def __repr__(self) -> str:
        waiting = sum(seq_id >= self.cursor for seq_id in self.steps)
        return f"<Lane {self.model_id} [cursor {self.cursor} | {waiting} waiting]>"

    @property
    def model(self) -> ModelRecord:
        """The run's record, until the run is forgotten."""
        return self._models[self.model_id]

    # ---- its client

    def add(self, step: Step) -> None:
        """An operation was accepted, now or before a restart."""
        self.steps[step.seq_id] = step
        self.newest_seq_id = max(self.newest_seq_id, step.seq_id)
        if step.seq_id == 0:
            self.cursor = 0

    def heard(self, now: float) -> None:
        """Its client is alive."""
        self.heard_at = max(self.heard_at, now)

    def used(self, now: float) -> None:
        self.last_active = now

    # ---- its turn

    def waits_from(self, turn: int) -> None:
        self.waiting_since_turn = turn

    def block_until(self, time: float) -> None:
        self.blocked_until = time

    @property
    def base_seq_id(self) -> int:
        return self.model.snapshots[0].seq_id if self.model.snapshots else 0

    @property
    def newest_snapshot(self) -> Snapshot | None:
        """The newest snapshot, durable or on its way."""
        taken = [*self.model.snapshots[:1], *self.durable_snapshots, *self.pending_snapshots]
        return max(taken, key=lambda snapshot: snapshot.seq_id, default=None)

    def load_from(self) -> tuple[str | None, bool]:
        """(storage key or None for a fresh adapter, whether to restore the optimizer) that a slot must be given now.

        A snapshot on its way is enough: its content is in the worker's memory before its files are durable.
        """
        if newest := self.newest_snapshot:
            return newest.key, True
        return self.model.created_from, self.model.created_with_optimizer

    @property
    def is_dirty(self) -> bool:
        """Whether the device holds effects that no snapshot, finished or on its way, contains."""
        newest = self.newest_snapshot
        start = newest.seq_id if newest else 0
        return any(start < seq_id < self.cursor and step.needs_replay for seq_id, step in self.steps.items())

    @property
    def num_outstanding(self) -> int:
        return sum(step.num_outstanding for step in self.steps.values())

    @property
    def is_between_operations(self) -> bool:
        """Whether no operation is half in the device's stream: only then may a snapshot be taken, or a slot left."""
        step = self.steps.get(self.cursor)
        return step is None or step.num_rows_sent == 0

    def next_step(self) -> Step | None:
        """The operation at the cursor, past everything burned or without effect on a replay; None when that has not
        come yet."""
        while True:
            step = self.steps.get(self.cursor)
            if step is not None:
                if not step.finished or step.needs_replay:
                    return step
                self.cursor += 1
            elif self.cursor in self.burned:
                self.cursor = self.burned.end_of(self.cursor)
            else:
                return None

    @property
    def owes_step(self) -> bool:
        """Whether the next operation is the optimizer step of gradients that the device has."""
        step, previous = self.steps.get(self.cursor), self.steps.get(self.cursor - 1)
        is_step = step is not None and step.kind == OptimStep.__name__
        return is_step and previous is not None and previous.kind == ForwardBackward.__name__

    def can_go_on(self, now: float) -> bool:
        step = self.steps.get(self.cursor)
        if step is None or step.finished:
            step = self.next_step()
        return step is not None and not step.fetching and self.blocked_until <= now

    def forget(self, seq_id: int) -> None:
        """Forget an operation without effect on the run's state, whose result nobody can ask for any more."""
        if self.steps.pop(seq_id, None) is not None:
            self.burned.add(seq_id, seq_id + 1)

    def advance(self) -> None:
        """Move on: the operation at the cursor is wholly in the device's stream."""
        step = self.steps[self.cursor]
        step.is_sent = True
        self.cursor += 1
        self.num_bytes_since_snapshot += step.request.body_bytes
        self.num_steps_since_snapshot += step.kind == OptimStep.__name__

    # ---- its base and its snapshots

    def base_sent(self) -> None:
        self.num_bases_awaited += 1

    def base_arrived(self) -> None:
        self.num_bases_awaited -= 1
        self.base_outage.over()

    def want_snapshot(self) -> None:
        self.snapshot_due = True

    def snapshot_sent(self, snapshot: Snapshot) -> None:
        self.pending_snapshots.append(snapshot)
        self.snapshot_due = False
        self.num_steps_since_snapshot = 0
        self.num_bytes_since_snapshot = 0

    def snapshot_written(self, snapshot: Snapshot) -> None:
        """The snapshot's files are durable."""
        self.pending_snapshots.remove(snapshot)
        self.durable_snapshots.append(snapshot)
        self.durable_snapshots.sort(key=lambda durable: durable.seq_id)

    def snapshot_failed(self, snapshot: Snapshot, now: float) -> None:
        self.pending_snapshots.remove(snapshot)
        self.snapshot_outage.failed(now)
        self.snapshot_due = True

    def take_settled_snapshot(self) -> Snapshot | None:
        """The oldest durable snapshot, when everything that it contains was answered and reported: its files may be
        durable before those answers, which may report failures."""
        oldest = self.durable_snapshots[0]
        if any(not step.finished or step.num_outstanding for step in self.covered(oldest.seq_id)):
            return None
        return self.durable_snapshots.pop(0)

    def known_snapshots(self) -> list[Snapshot]:
        return [*self.model.snapshots, *self.durable_snapshots, *self.pending_snapshots]

    def covered(self, seq_id: int) -> list[Step]:
        return [step for step in self.steps.values() if step.seq_id <= seq_id]

    def cover(self, seq_id: int) -> list[Step]:
        """Nothing up to this operation will ever run again. -> the steps that are now covered."""
        covered = self.covered(seq_id)
        for step in covered:
            del self.steps[step.seq_id]
        self.burned.drop_below(seq_id + 1)
        return covered

    @property
    def has_gap(self) -> bool:
        """Whether an operation waits for a missing one; refused ones have their answers."""
        return self.cursor not in self.steps and any(
            step.seq_id > self.cursor and (not step.finished or step.needs_replay) for step in self.steps.values()
        )

    def gap_limit(self, policy: Policy) -> float:
        """Seconds of the client's silence after which missing seq_ids count as burned: they will never come.

        The SDK sends an operation once the previous one has been answered, accepted or not. Its one exception is a
        batch in pieces: pieces 2..N come first, at once, and piece 1 when they have been accepted. So
        - when anything but a piece follows the gap, the missing one was refused on its way, or by the SDK itself after
          it had taken its number; the wait is only for clients that send in any order, and for networks that reorder;
        - while nothing but pieces follow, piece 1 may be on its way: five megabytes or one huge datum over a thin
          line, or between two attempts of the SDK, which are up to 30 s apart.
        The time counts from the newest submission, so a long upload of many pieces is never cut. A client that
        is blocked by the gap falls silent, so the gap always ends.
        """
        is_batch = all(step.kind in CHUNK_KINDS for seq_id, step in self.steps.items() if seq_id > self.cursor)
        return policy.chunk_gap_s if is_batch else policy.seq_gap_s

    def burn_gap(self) -> None:
        """Nobody will send the operations missing before the next accepted one."""
        following = min(seq_id for seq_id in self.steps if seq_id > self.cursor)
        self.burned.add(self.cursor, following)

    def lose_device_state(self) -> None:
        """The slot's content is gone or cannot be trusted: everything after the base runs again."""
        self.num_bases_awaited = 0
        self.num_losses += 1
        self.pending_snapshots.clear()
        self.durable_snapshots.clear()
        first = self.steps.get(0)
        self.cursor = 0 if first is not None and not first.finished else self.base_seq_id + 1
        self.num_steps_since_snapshot = 0
        self.num_bytes_since_snapshot = 0
        # A seq_id that was skipped stays skipped: a latecomer must not slip in before operations that ran without it.
        ran = (step.seq_id for step in self.steps.values() if step.finished and step.kind != Rejected.__name__)
        self._burn_what_is_missing(max(max(ran, default=0), self.model.newest_seq_id))
        for step in self.steps.values():
            step.restart()

    def _burn_what_is_missing(self, last: int) -> None:
        """Burn all missing seq_ids up to this one."""
        previous = self.base_seq_id
        for seq_id in sorted(seq_id for seq_id in self.steps if previous < seq_id <= last):
            self.burned.add(previous + 1, seq_id)
            previous = seq_id
        self.burned.add(previous + 1, last + 1)

    def check_turn(self, seq_id: int, policy: Policy) -> None:
        """Raises `Conflict` when its turn has passed, `InvalidRequest` when it cannot be the next."""
        if self.is_used_up(seq_id):
            raise Conflict(f"seq_id {seq_id} of {self.model_id} is used up: its turn has passed. Use the next seq_id.")
        if seq_id - self.newest_seq_id > policy.seq_ahead_max:
            raise InvalidRequest(
                f"seq_id {seq_id} is too far ahead: {self.model_id} has accepted up to {self.newest_seq_id}, and at "
                f"most {policy.seq_ahead_max} beyond that are allowed (`seq_ahead_max`). Use the next seq_id."
            )

    def is_used_up(self, seq_id: int) -> bool:
        """True when this seq_id can no longer be accepted: its turn is over."""
        return seq_id not in self.steps and seq_id > 0 and (seq_id < self.cursor or seq_id in self.burned)

    def is_settled_before(self, seq_id: int) -> bool:
        """Whether all that makes up the state at this operation has been answered and reported."""
        return not self.num_bases_awaited and not any(
            step.seq_id < seq_id and step.needs_replay and (not step.finished or step.num_outstanding)
            for step in self.steps.values()
        )
