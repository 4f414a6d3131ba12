"""Adapter versions on the devices that sample: immutable, so one is simply overwritten when nothing runs on it."""

from __future__ import annotations

from msgspec import Struct

from tx_async.scheduler.decisions import Decisions
from tx_async.scheduler.worker_state import WorkerState
from tx_async.wire.worker import BASE_SLOT, LoadSampler


class SamplerSent(Struct, frozen=True):
    """A version is being loaded."""

    version: str


class SamplerSlots:
    def __init__(self, decisions: Decisions):
        self.decisions = decisions

    def bring(self, worker: WorkerState, version: str) -> bool:
        """Have a version loaded, or on its way. False while every slot is held by running sequences of other
        versions."""
        slots = worker.sampler_slots
        if version in slots:
            slots.touch(version)
            return True
        slot = slots.take(version)
        if slot is None:
            in_use = {job.version for job in worker.sequences.values()} | worker.loading_samplers
            victim = slots.victim(lambda other: other not in in_use)
            if victim is None:
                return False
            slots.release(victim)
            slot = slots.take(version)
            assert slot is not None
        worker.loading_samplers.add(version)
        self.decisions.send(worker, LoadSampler(sampler_slot=slot, key=version), SamplerSent(version))
        return True

    def finished(self, worker: WorkerState, version: str) -> None:
        worker.loading_samplers.discard(version)

    def failed(self, worker: WorkerState, version: str) -> None:
        worker.loading_samplers.discard(version)
        if version in worker.sampler_slots:
            worker.sampler_slots.release(version)

    def least_recent(self, worker: WorkerState) -> str | None:
        return worker.sampler_slots.victim(lambda _version: True)

    def slot_of(self, worker: WorkerState, version: str | None) -> int:
        if version is None:
            return BASE_SLOT
        slot = worker.sampler_slots.slot_of(version)
        assert slot is not None
        return slot
