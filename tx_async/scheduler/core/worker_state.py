"""What the scheduler knows about one attached worker: its slots, and the commands that it has not answered yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from msgspec import Struct

from tx_async.errors import ServerError, TxError, UserError
from tx_async.scheduler.core.adapters import SlotCache
from tx_async.scheduler.core.fairness import Shares
from tx_async.scheduler.core.instructions import Send
from tx_async.scheduler.core.outages import Outage
from tx_async.scheduler.core.policy import Policy
from tx_async.wire.worker import Capability, Command, CommandFailed, EngineInfo, SampleQuantum, TrainMicroBatch

if TYPE_CHECKING:
    from tx_async.scheduler.sampling.jobs import SampleJob
    from tx_async.scheduler.sampling.sampling import SamplingAnswer
    from tx_async.scheduler.training.lanes import Step
    from tx_async.scheduler.training.training import TrainingAnswer

Kind = Literal["train", "sample"]


Cause = Literal["no_space", "storage", "user", "engine", "other"]
"""Why a command failed, as an operator's counters tell it."""
CAUSES: tuple[Cause, ...] = get_args(Cause)
NO_SPACE = ("os error 28)", "os error 122)", "No space left", "Disk quota exceeded")
"""The errors by which storage says that it is full."""


LIVE_STEPS_MIN = 2
"""Decode steps of a quantum, however long they take: between two quanta the device waits for the server."""


class Ignored(Struct, frozen=True):
    """The answer to this command needs no action."""


if TYPE_CHECKING:
    Answer = TrainingAnswer | SamplingAnswer | Ignored
    """What a command was sent for, so that its answer finds the owner that handles it."""


class Awaited(Struct, frozen=True):
    """What to do with the answer to a command."""

    answer: Answer
    kind: Kind | None
    """The kind of quantum that the command is, if it is one."""


class RunningSample(Struct, frozen=True):
    """One sample of a request, admitted to a worker as a sequence."""

    job: SampleJob
    index: int


class WorkerState:
    """One attached worker. Others read its fields, and change them only through its verbs and those of its slots."""

    def __init__(self, worker_id: str, info: EngineInfo, capabilities: frozenset[Capability], policy: Policy):
        self.worker_id = worker_id
        self.info = info
        self.capabilities = capabilities
        self.policy = policy
        self.shares: Shares[Kind] = Shares({"train": policy.train_share, "sample": policy.sample_share})
        #: model_id -> training slot
        self.training_slots: SlotCache[str] = SlotCache(info.num_training_slots)
        #: adapter version (storage key) -> sampler slot
        self.sampler_slots: SlotCache[str] = SlotCache(info.num_sampler_slots)
        #: versions in `sampler_slots` whose files are being read: nothing is sampled from a slot until that has
        #: succeeded
        self.loading_samplers: set[str] = set()
        #: versions that storage does not deliver; disjoint from `sampler_slots` except while they are tried again
        self.sampler_outages: dict[str, Outage] = {}
        #: command number -> what its answer is awaited for
        self.in_flight: dict[int, Awaited] = {}
        #: train micro-batches and sample quanta among them: what `quanta_in_flight_max` bounds
        self.quanta: dict[Kind, int] = {"train": 0, "sample": 0}
        #: sequence_id -> sample, admitted and not ended
        self.sequences: dict[int, RunningSample] = {}
        #: the training step or sample job that has the device for itself, or waits until it is empty
        self.reserved_for: Step | SampleJob | None = None
        #: its engine is still being compared with ours: nothing is sampled on it meanwhile
        self.is_on_trial = info.trial is not None
        #: versions that its engine cannot take -> why; only those that open samples need
        self.refused_versions: dict[str, str] = {}
        #: tokens of its KV cache that sequences hold, as the newest quantum reported
        self.num_kv_tokens = 0
        #: whether its newest sample quantum was for first tokens alone
        self.was_for_first_tokens = False
        #: how long one decode step took, as the newest sample quantum without prefill showed; 0 = not known
        self.step_ms = 0.0
        #: a rank that its slots do not hold and somebody needs: it begins nothing more, and starts again with wider
        #: ones; 0 = none
        self.outgrown_by = 0
        #: when that was noticed
        self.outgrown_at = 0.0
        #: whether it was told to start again
        self.is_leaving = False
        self._last_number = 0
        #: whether `_quanta_max` is of one kind, and not of both together
        self._kinds_are_apart = info.continuous or info.overlaps
        self._quanta_max = _quanta_max(info, policy)

    def __repr__(self) -> str:
        return (
            f"<Worker {self.worker_id} [{len(self.in_flight)} commands in flight, {self.num_quanta} quanta | "
            f"{len(self.training_slots)} training, {len(self.sampler_slots)} sampling adapters | "
            f"{len(self.sequences)} sequences]>"
        )

    @property
    def scores(self) -> bool:
        return "score" in self.capabilities or "train" in self.capabilities

    @property
    def is_external(self) -> bool:
        """Whether it only samples."""
        return "sample" in self.capabilities and not self.scores

    @property
    def has_room(self) -> bool:
        return len(self.sequences) < self.info.num_sequences_max

    @property
    def num_quanta(self) -> int:
        return self.quanta["train"] + self.quanta["sample"]

    def has_run(self, model_id: str) -> bool:
        """Whether a training slot holds this run's base and its operations up to the lane's cursor."""
        return model_id in self.training_slots

    def could_hold(self, rank: int) -> bool:
        """Whether it could hold an adapter of this rank, at least after another start."""
        return rank <= max(self.info.max_lora_rank, self.info.lora_rank_limit)

    def outgrow(self, rank: int, now: float) -> None:
        """An adapter of this rank, which its slots do not hold, is needed."""
        assert self.info.max_lora_rank < rank <= self.info.lora_rank_limit
        self.outgrown_at = self.outgrown_at or now
        self.outgrown_by = max(self.outgrown_by, rank)

    def reserve_for(self, suspect: Step | SampleJob) -> None:
        """Nothing else begins here until the suspect has had the device to itself."""
        self.reserved_for = suspect

    def end_reservation(self) -> None:
        self.reserved_for = None

    def passed_trial(self) -> None:
        self.is_on_trial = False

    def told_to_leave(self) -> None:
        self.is_leaving = True

    def holds_tokens(self, num_kv_tokens: int) -> None:
        self.num_kv_tokens = num_kv_tokens

    def next_quantum(self, begins_watched: bool, is_read_along: bool) -> SampleQuantum:
        """The sample quantum that is sent now. Where a client that reads along waits for a first token, it draws first
        tokens alone, but not twice running, because meanwhile all others wait. While clients read along at all, none
        lasts much longer than `live_quantum_ms`: whoever comes next waits for its end."""
        info, steps = self.info, self.info.decode_steps
        self.was_for_first_tokens = begins_watched and not self.was_for_first_tokens and not info.continuous
        if self.was_for_first_tokens:
            steps = 1
        elif is_read_along and self.step_ms and not info.continuous:
            steps = min(steps, max(LIVE_STEPS_MIN, round(self.policy.live_quantum_ms / self.step_ms)))
        return SampleQuantum(
            decode_steps=steps, prefill_tokens=info.prefill_tokens, only_first_tokens=self.was_for_first_tokens
        )

    def took(self, decode_steps: int, elapsed_ms: float) -> None:
        """A sample quantum without prefill took this long."""
        self.step_ms = elapsed_ms / decode_steps

    def jobs(self) -> list[SampleJob]:
        """The sample requests that run here, at least in part."""
        return list(dict.fromkeys(running.job for running in self.sequences.values()))

    def sequences_of(self, job: SampleJob) -> list[int]:
        return [sequence_id for sequence_id, running in self.sequences.items() if running.job is job]

    def is_full(self, kind: Kind) -> bool:
        """Whether it has enough of this kind ahead; what is issued later can still take turns."""
        if len(self.in_flight) >= self.policy.commands_in_flight_max:
            return True
        num_ahead = self.quanta[kind] if self._kinds_are_apart else self.num_quanta
        return num_ahead >= self._quanta_max[kind]

    @property
    def takes_quanta(self) -> bool:
        """Whether it has room for a quantum of some kind."""
        return not (self.is_full("train") and self.is_full("sample"))

    def had_its_share(self, kind: Kind) -> bool:
        """Where both kinds run side by side, the kind that is ahead by its share waits until the other has had its own.
        The next answer to the other kind's quanta ends the wait."""
        is_alone = self.num_quanta == self.quanta[kind]
        return self.info.overlaps and not is_alone and self.shares.is_ahead(kind, self.policy.quanta_in_flight_max)

    def send(
        self,
        command: Command,
        answer: Answer,
        tensors: Sequence[np.ndarray] = (),
        cause: str = "",
        requests: tuple[str, ...] = (),
    ) -> Send:
        self._last_number += 1
        kind = _KINDS.get(type(command))
        self.in_flight[self._last_number] = Awaited(answer, kind)
        if kind:
            self.quanta[kind] += 1
            self.shares.charge(kind)
        return Send(self.worker_id, self._last_number, command, tensors, cause, requests)

    def answered(self, number: int) -> Awaited:
        """Take what was noted for a command, which is no longer in flight."""
        awaited = self.in_flight.pop(number)
        if awaited.kind:
            self.quanta[awaited.kind] -= 1
        return awaited


def cause_of(failure: CommandFailed) -> Cause:
    if any(sign in failure.message for sign in NO_SPACE):
        return "no_space"
    if failure.error in ("StorageError", "ContentLost"):
        return "storage"
    if failure.category == "user":
        return "user"
    return "engine" if failure.error in ("", "EngineError") else "other"


def error_of(failure: CommandFailed) -> TxError:
    return {"user": UserError, "server": ServerError}.get(failure.category, TxError)(failure.message)


def _quanta_max(info: EngineInfo, policy: Policy) -> dict[Kind, int]:
    if info.continuous:
        return {"train": 1, "sample": 1}
    # Where kinds overlap, the engine decides which sequences decode when a quantum's predecessor has ended. A second
    # quantum ahead would save it a round trip to the server, but keep newcomers out for one whole quantum more.
    return {"train": policy.quanta_in_flight_max, "sample": 1 if info.overlaps else policy.quanta_in_flight_max}


_KINDS: dict[type[Command], Kind] = {TrainMicroBatch: "train", SampleQuantum: "sample"}
