"""A lane is one training run: its operations in `seq_id` order, which of them the device has, and what must run again
after a loss.

The lane's device state is always "base + operations up to the cursor", where the base is the newest snapshot, or the
run's creation. Losing the device state therefore only means to move the cursor back to the base; operations that had
finished by then run again for their effect and their results are not reported twice.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from tx_async.scheduler.packing import PackedRequest
from tx_async.wire.operations import ForwardBackward, LoadWeights, Operation, OptimStep
from tx_async.wire.records import ModelRecord, RequestRecord, Snapshot


class Step(Struct, eq=False):
    """One operation of a lane, from its acceptance until a snapshot covers it."""

    request: RequestRecord
    seq_id: int
    operation: Operation | None
    """None when only the journal has the body."""
    finished: bool = False
    failed: bool = False
    fetching: bool = False
    attempts: int = 0
    """Times that a worker died while it ran this."""

    # ---- of the current run; cleared by `restart`
    run: int = 0
    """Counts runs: answers to commands of an earlier run are ignored."""
    packed: PackedRequest | None = None
    num_rows_sent: int = 0
    num_outstanding: int = 0
    parts: dict[int, Any] = {}
    """What has come back so far: datum index -> (logprobs, loss terms)."""

    @property
    def kind(self) -> str:
        """Name of the operation; "Forward" for a forward_backward that leaves no gradients."""
        return self.request.kind

    def restart(self) -> None:
        self.run += 1
        self.packed = None
        self.num_rows_sent = 0
        self.num_outstanding = 0
        self.parts = {}

    @property
    def needs_replay(self) -> bool:
        """Whether the run's state depends on this operation. A failed optim_step has cleared the gradients: it
        counts."""
        if self.kind == OptimStep.__name__:
            return True
        return self.kind in (ForwardBackward.__name__, LoadWeights.__name__) and not self.failed


class Lane:
    def __init__(self, model: ModelRecord):
        self.model = model
        #: seq_id -> accepted operations that no snapshot covers beyond doubt
        self.steps: dict[int, Step] = {}
        #: seq_id of the next operation to give to the device; everything before it is part of the device state
        self.cursor = self.base_seq_id + 1
        #: seq_ids that will never come
        self.burned: set[int] = set()
        #: when the cursor was first seen waiting for a missing predecessor
        self.gap_since: float | None = None
        #: True while the device holds base + operations up to the cursor
        self.resident = False
        #: how often the device state was lost: answers that belong to an earlier one are ignored
        self.num_losses = 0
        #: snapshots on their way: sent, their files not yet known to be durable; oldest first
        self.pending_snapshots: list[Snapshot] = []
        #: snapshots whose files are durable, while operations that they contain are unfinished; oldest first
        self.durable_snapshots: list[Snapshot] = []
        self.num_steps_since_snapshot = 0
        self.num_bytes_since_snapshot = 0
        self.snapshot_due = False
        self.last_active = 0.0

    def __repr__(self) -> str:
        waiting = sum(seq_id >= self.cursor for seq_id in self.steps)
        where = "resident" if self.resident else "away"
        return f"<Lane {self.model.model_id} [cursor {self.cursor} | {waiting} waiting | {where}]>"

    @property
    def base_seq_id(self) -> int:
        return self.model.snapshots[0].seq_id if self.model.snapshots else 0

    @property
    def _newest_snapshot(self) -> Snapshot | None:
        taken = [*self.model.snapshots[:1], *self.durable_snapshots, *self.pending_snapshots]
        return max(taken, key=lambda snapshot: snapshot.seq_id, default=None)

    def load_from(self) -> tuple[str | None, bool]:
        """(storage key or None for a fresh adapter, whether to restore the optimizer) of what a slot must be given now.

        A snapshot on its way will do: its content is in the worker's memory before its files are durable.
        """
        if newest := self._newest_snapshot:
            return newest.key, True
        return self.model.created_from, self.model.created_with_optimizer

    @property
    def flow(self) -> str:
        """What shares the device fairly: one client session."""
        return self.model.session_id

    @property
    def is_dirty(self) -> bool:
        """Whether the device holds effects that no snapshot, finished or on its way, contains."""
        newest = self._newest_snapshot.seq_id if self._newest_snapshot else 0
        return any(newest < seq_id < self.cursor and step.needs_replay for seq_id, step in self.steps.items())

    @property
    def num_outstanding(self) -> int:
        return sum(step.num_outstanding for step in self.steps.values())

    def accept(self, step: Step) -> None:
        assert step.seq_id not in self.steps
        self.steps[step.seq_id] = step

    def next_step(self) -> Step | None:
        """The operation at the cursor, past everything burned or without effect on a replay; None when it is not
        there yet."""
        while True:
            step = self.steps.get(self.cursor)
            if step is None:
                if self.cursor not in self.burned:
                    return None
                self.burned.discard(self.cursor)
            elif not step.finished or step.needs_replay:
                return step
            self.cursor += 1
            self.gap_since = None

    def advance(self) -> None:
        """The operation at the cursor is wholly in the device's stream."""
        self.cursor += 1
        self.gap_since = None

    @property
    def has_gap(self) -> bool:
        return self.cursor not in self.steps and any(seq_id > self.cursor for seq_id in self.steps)

    def burn_gap(self) -> None:
        """Nobody will send what is missing before the next accepted operation."""
        following = min(seq_id for seq_id in self.steps if seq_id > self.cursor)
        self.burned.update(range(self.cursor, following))
        self.gap_since = None

    def lose_device_state(self) -> None:
        """The slot's content is gone or not to be trusted: everything after the base runs again."""
        self.resident = False
        self.num_losses += 1
        self.pending_snapshots.clear()
        self.durable_snapshots.clear()
        first = self.steps.get(0)
        self.cursor = 0 if first is not None and not first.finished else self.base_seq_id + 1
        self.num_steps_since_snapshot = 0
        self.num_bytes_since_snapshot = 0
        finished = max((s.seq_id for s in self.steps.values() if s.finished), default=0)
        # What was skipped once stays skipped: a latecomer must not slip in before operations that ran without it.
        self.burned.update(seq_id for seq_id in range(self.base_seq_id + 1, finished) if seq_id not in self.steps)
        for step in self.steps.values():
            step.restart()

    def is_used_up(self, seq_id: int) -> bool:
        """True when this seq_id can no longer be accepted: its turn is over."""
        return seq_id not in self.steps and (seq_id < self.cursor or seq_id in self.burned)

    def covered(self, seq_id: int) -> list[Step]:
        return [step for step in self.steps.values() if step.seq_id <= seq_id]
