"""Where training and sampling run side by side: who may have another quantum ahead."""

import msgspec
import pytest

from tests.support.simulation import INFO
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Kind, WorkerState, cause_of
from tx_async.wire.worker import CommandFailed, SampleQuantum, TrainMicroBatch

QUANTA: dict[Kind, TrainMicroBatch | SampleQuantum] = {
    "train": TrainMicroBatch(slots=(0,), row_length=32, targets_per_token=1, forward_only=False),
    "sample": SampleQuantum(decode_steps=4, prefill_tokens=64),
}
COST_MS: dict[Kind, float] = {"train": 1000.0, "sample": 150.0}


class SideBySide:
    """A worker whose two kinds each run one quantum after the other, beside each other."""

    def __init__(self, **shares: float):
        info = msgspec.structs.replace(INFO, overlaps=True)
        self.worker = WorkerState("w0", info, frozenset({"train", "sample"}), Policy(**shares))  # type: ignore[arg-type]
        self.busy_ms: dict[Kind, float] = dict.fromkeys(COST_MS, 0.0)
        self.ends: dict[Kind, list[tuple[float, int]]] = {kind: [] for kind in COST_MS}
        self.now = 0.0

    def run(self, until_ms: float, *kinds: Kind) -> None:
        while self.now < until_ms:
            while any(self._issue(kind) for kind in self.worker.shares.order(lambda kind: kind in kinds)):
                pass
            self._answer()

    def _issue(self, kind: Kind) -> bool:
        if self.worker.is_full(kind) or self.worker.had_its_share(kind):
            return False
        number = self.worker.send(QUANTA[kind], None).number
        last = self.ends[kind][-1][0] if self.ends[kind] else self.now
        self.ends[kind].append((max(last, self.now) + COST_MS[kind], number))
        return True

    def _answer(self) -> None:
        kind = min((kind for kind in self.ends if self.ends[kind]), key=lambda kind: self.ends[kind][0])
        self.now, number = self.ends[kind].pop(0)
        self.worker.answered(number)
        self.worker.shares.measured(kind, COST_MS[kind])
        self.busy_ms[kind] += COST_MS[kind]


def test_with_equal_shares_both_run_all_the_time():
    both = SideBySide()
    both.run(60_000, "train", "sample")
    assert both.busy_ms["train"] > 57_000 and both.busy_ms["sample"] > 57_000


@pytest.mark.parametrize("shares", [{"train_share": 2.0}, {"sample_share": 0.5}])
def test_a_smaller_share_is_a_smaller_part_of_the_time(shares):
    both = SideBySide(**shares)
    both.run(60_000, "train", "sample")
    assert both.busy_ms["train"] > 57_000 and 27_000 < both.busy_ms["sample"] < 33_000


def test_training_waits_too():
    both = SideBySide(sample_share=4.0)
    both.run(240_000, "train", "sample")
    assert both.busy_ms["sample"] > 235_000 and 54_000 < both.busy_ms["train"] < 66_000


def test_alone_each_has_the_whole_device():
    both = SideBySide(train_share=100.0)
    both.run(10_000, "sample")
    assert both.busy_ms["sample"] > 9_500


def test_who_waited_goes_on_at_once_when_the_other_has_no_more():
    both = SideBySide(train_share=100.0)
    both.run(10_000, "train", "sample")
    before, began = both.busy_ms["sample"], both.now
    both.run(20_000, "sample")
    assert both.busy_ms["sample"] - before > 0.75 * (both.now - began)


@pytest.mark.parametrize(
    ("error", "message", "cause"),
    [
        ("StorageError", "checkpoints/a could not be written: No space left on device (os error 28)", "no_space"),
        ("StorageError", "The storage /checkpoints is away.", "storage"),
        ("UnknownCheckpoint", "There is no checkpoint a.", "user"),
        ("", "ValueError: no", "engine"),
        ("ServerError", "no", "other"),
    ],
)
def test_a_failure_has_one_of_a_few_causes(error, message, cause):
    category = "user" if cause == "user" else "server"
    assert cause_of(CommandFailed(number=1, category=category, message=message, error=error)) == cause


def test_while_clients_read_along_a_quantum_lasts_no_longer_than_they_should_wait():
    info = msgspec.structs.replace(INFO, decode_steps=16)
    worker = WorkerState("w0", info, frozenset({"sample"}), Policy(live_quantum_ms=100.0))

    def steps(is_read_along: bool) -> int:
        return worker.next_quantum(begins_watched=False, is_read_along=is_read_along).decode_steps

    assert steps(is_read_along=True) == 16, "nobody knows yet how long a step takes"
    for step_ms, wanted in ((1.0, 16), (20.0, 5), (140.0, 2), (9_000.0, 2)):
        worker.took(4, 4 * step_ms)
        assert steps(is_read_along=True) == wanted
        assert steps(is_read_along=False) == 16
