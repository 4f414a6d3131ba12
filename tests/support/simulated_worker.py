"""The simulated world's worker: commands that reached it, and what it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tests.support.chain_engine import ChainEngine, Storage
from tx_async.scheduler.core.facts import Fact
from tx_async.wire.facts import CommandEnded
from tx_async.wire.worker import CommandFailed, CommandFinished, EngineInfo, Result

WORKER = "w0"


class Sent(Struct):
    """A command that reached the worker."""

    number: int
    command: object
    tensors: list[np.ndarray]
    cause: str = ""


class SimulatedWorker:
    def __init__(self, info: EngineInfo, storage: Storage):
        self.engine = ChainEngine(info, storage)
        #: sent, not executed
        self.inbox: deque[Sent] = deque()
        #: facts on their way to the server, in command order
        self.outbox: deque[Fact] = deque()
        #: executed saves whose files are being written
        self.saving: list[Sent] = []
        self.last_number = 0


def finished(sent: Sent, result: Result, tensors: Sequence[np.ndarray] = (), elapsed_ms: float = 0.0) -> CommandEnded:
    outcome = CommandFinished(number=sent.number, result=result, elapsed_ms=elapsed_ms)
    return CommandEnded(WORKER, outcome, tensors)


def failed(sent: Sent, category: str, message: str, error: str = "") -> CommandEnded:
    outcome = CommandFailed(number=sent.number, category=category, message=message, error=error)  # type: ignore[arg-type]
    return CommandEnded(WORKER, outcome)
