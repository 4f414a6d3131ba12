"""Drives an engine as a server does: the scheduler's own account of a worker says how many commands are ahead and whose
turn it is, and threads await the outcomes as a worker's do."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from tx_async.engine.engine import JaxEngine
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Kind, WorkerState
from tx_async.wire.worker import Command, Sampled, SampleQuantum, TrainMicroBatch
from tx_async.worker.engine_api import Pending, Reply

Work = Callable[[], tuple[Command, list[np.ndarray]]]
"""Makes the next command of a kind, with its tensors."""
GoesOn = Callable[[Sequence["Answer"]], bool]
"""Whether more commands are sent, after these answers."""


class Answer(NamedTuple):
    kind: Kind
    tokens: int
    """Trained or sampled."""
    at: float
    reply: Any


class _Outcome(NamedTuple):
    number: int
    command: Command
    sent_at: float
    at: float
    reply: Reply | Exception


class Driver:
    def __init__(self, engine: JaxEngine):
        self.engine = engine
        self.info = engine.info()
        self._worker = WorkerState("w0", self.info, frozenset({"train", "sample"}), Policy())
        together = ThreadPoolExecutor(1, thread_name_prefix="completions")
        apart = ThreadPoolExecutor(1, thread_name_prefix="sampling") if self.info.overlaps else together
        self._completions: dict[Kind, ThreadPoolExecutor] = {"train": together, "sample": apart}
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        #: when the newest answer of each thread came
        self._answered_at: dict[ThreadPoolExecutor, float] = {}

    def close(self) -> None:
        for pool in self._completions.values():
            pool.shutdown()

    def do(self, command: Command, tensors: Sequence[np.ndarray] = ()) -> Any:
        """One command, alone; -> its result."""
        return self.engine.execute(command, tensors)()[0]

    def run(self, work: dict[Kind, Work], goes_on: GoesOn) -> list[Answer]:
        """Have the device do these kinds of work as long as it `goes_on`; -> the answers in the order in which they
        came. Raises what a command has raised, once nothing is in flight any more."""
        answers: list[Answer] = []
        try:
            while True:
                if goes_on(answers):
                    self._issue(work)
                if not self._worker.in_flight:
                    return answers
                answers.append(self._next_answer())
        finally:
            while self._worker.in_flight:
                self._worker.answered(self._outcomes.get().number)

    def _issue(self, work: dict[Kind, Work]) -> None:
        """As the scheduler's `_issue_quanta`."""
        shares = self._worker.shares
        while self._worker.takes_quanta and any(
            self._issue_one(kind, work) for kind in shares.order(work.__contains__)
        ):
            pass

    def _issue_one(self, kind: Kind, work: dict[Kind, Work]) -> bool:
        if self._worker.is_full(kind) or self._worker.had_its_share(kind):
            return False
        command, tensors = work[kind]()
        number, sent_at = self._worker.send(command, None, tensors).number, time.perf_counter()  # type: ignore[arg-type]
        try:
            pending = self.engine.execute(command, tensors)
        except Exception as error:
            pending = _raiser(error)
        self._completions[kind].submit(self._complete, number, command, sent_at, pending)
        return True

    def _complete(self, number: int, command: Command, sent_at: float, pending: Pending) -> None:
        try:
            reply: Reply | Exception = pending()
        except Exception as error:
            reply = error
        self._outcomes.put(_Outcome(number, command, sent_at, time.perf_counter(), reply))

    def _next_answer(self) -> Answer:
        outcome = self._outcomes.get()
        kind = self._worker.answered(outcome.number).kind
        assert kind is not None
        if isinstance(outcome.reply, Exception):
            raise outcome.reply
        thread = self._completions[kind]
        began = max(outcome.sent_at, self._answered_at.get(thread, 0.0))
        self._answered_at[thread] = outcome.at
        self._worker.shares.measured(kind, 1000 * (outcome.at - began))
        reply, _ = outcome.reply
        return Answer(kind, _tokens(outcome.command, reply), outcome.at, reply)


def _raiser(error: Exception) -> Pending:
    def pending() -> Reply:
        raise error

    return pending


def _tokens(command: Command, reply: Any) -> int:
    if isinstance(command, TrainMicroBatch):
        return len(command.slots) * command.row_length
    assert isinstance(command, SampleQuantum) and isinstance(reply, Sampled)
    return sum(tokens for _, tokens in reply.progress) - reply.num_prefilled_tokens


# ---- for how long, and how fast


def for_seconds(seconds: float, kinds: Sequence[Kind], most: dict[Kind, int] | None = None) -> GoesOn:
    """So long after the first answer of every kind, which may have had to wait for what ran before; and until one kind
    has had `most` answers."""

    def goes_on(answers: Sequence[Answer]) -> bool:
        counts = {kind: sum(answer.kind == kind for answer in answers) for kind in kinds}
        if any(counts[kind] >= limit for kind, limit in (most or {}).items()):
            return False
        return not all(counts.values()) or time.perf_counter() < _first(answers, kinds) + seconds

    return goes_on


def rates(answers: Sequence[Answer], kinds: Sequence[Kind]) -> dict[Kind, float]:
    """Tokens/s of each kind, from the moment when every kind has had an answer."""
    began, ended = _first(answers, kinds), answers[-1].at
    within = [answer for answer in answers if answer.at > began]
    return {kind: sum(x.tokens for x in within if x.kind == kind) / (ended - began) for kind in kinds}


def _first(answers: Sequence[Answer], kinds: Sequence[Kind]) -> float:
    return max(next(answer.at for answer in answers if answer.kind == kind) for kind in kinds)
