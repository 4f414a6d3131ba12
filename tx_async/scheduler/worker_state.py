"""What the scheduler knows of one attached worker: its slots, and the commands that it has not answered yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tx_async.scheduler.adapters import SlotCache
from tx_async.scheduler.events import Send
from tx_async.wire.worker import Command, EngineInfo, SampleQuantum, TrainMicroBatch


class WorkerState:
    def __init__(self, worker_id: str, info: EngineInfo, capabilities: frozenset[str]):
        self.worker_id = worker_id
        self.info = info
        self.capabilities = capabilities
        #: model_id -> training slot
        self.training_slots: SlotCache[str] = SlotCache(info.num_training_slots)
        #: adapter version (storage key) -> sampler slot
        self.sampler_slots: SlotCache[str] = SlotCache(info.num_sampler_slots)
        #: command number -> what to do with the answer
        self.in_flight: dict[int, Any] = {}
        #: train micro-batches and sample quanta among them: what `quanta_in_flight_max` bounds
        self.num_quanta = 0
        #: sequence_id -> job, admitted and not ended
        self.sequences: dict[int, Any] = {}
        self._last_number = 0

    def __repr__(self) -> str:
        return (
            f"<Worker {self.worker_id} [{len(self.in_flight)} commands in flight, {self.num_quanta} quanta | "
            f"{len(self.training_slots)} training, {len(self.sampler_slots)} sampling adapters | "
            f"{len(self.sequences)} sequences]>"
        )

    def send(self, command: Command, on_answer: Any, tensors: Sequence[np.ndarray] = ()) -> Send:
        self._last_number += 1
        self.in_flight[self._last_number] = on_answer
        self.num_quanta += isinstance(command, TrainMicroBatch | SampleQuantum)
        return Send(self.worker_id, self._last_number, command, tensors)

    def answered(self, number: int) -> Any:
        """What was noted for a command; it is no longer in flight."""
        on_answer = self.in_flight.pop(number)
        self.num_quanta -= getattr(on_answer, "is_quantum", False)
        return on_answer
