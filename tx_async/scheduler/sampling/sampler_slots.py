"""Adapter versions on the devices that sample. They are immutable, so a version that nothing uses is simply
overwritten."""

from __future__ import annotations

from msgspec import Struct

from tx_async.errors import TxError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.outages import Outage
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.wire.worker import BASE_SLOT, LoadSampler


class SamplerSent(Struct, frozen=True):
    """A version is being loaded."""

    version: str


class SamplerSlots:
    def __init__(self, decisions: Decisions, policy: Policy):
        self.decisions = decisions
        self.policy = policy

    def bring(self, worker: WorkerState, version: str) -> bool:
        """Make sure that a version is loaded, being loaded, or waiting for storage. False while every slot is held by
        running sequences of other versions."""
        slots = worker.sampler_slots
        outage = worker.sampler_outages.get(version)
        if outage is not None and outage.until > self.decisions.now:
            return True
        if version in slots:
            slots.touch(version)
            return True
        slot = slots.take(version)
        if slot is None:
            in_use = {sample.job.version for sample in worker.sequences.values()} | worker.loading_samplers
            victim = slots.victim(lambda other: other not in in_use)
            if victim is None:
                return False
            slots.release(victim)
            slot = slots.take(version)
            assert slot is not None
        worker.loading_samplers.add(version)
        self.decisions.send(worker, LoadSampler(sampler_slot=slot, key=version), SamplerSent(version))
        return True

    def is_loaded(self, worker: WorkerState, version: str) -> bool:
        return version in worker.sampler_slots and version not in worker.loading_samplers

    def finished(self, worker: WorkerState, version: str) -> None:
        worker.loading_samplers.discard(version)
        worker.sampler_outages.pop(version, None)

    def refused(self, worker: WorkerState, version: str, reason: str) -> None:
        """The worker's engine will never take this version; another engine may."""
        self._leave(worker, version)
        worker.refused_versions[version] = reason

    def too_narrow(self, worker: WorkerState, version: str, rank: int) -> None:
        """The worker must start again with wider slots before it can take this version."""
        self._leave(worker, version)
        worker.outgrow(rank, self.decisions.now)

    def _leave(self, worker: WorkerState, version: str) -> None:
        worker.loading_samplers.discard(version)
        if version in worker.sampler_slots:
            worker.sampler_slots.release(version)

    def failed(self, worker: WorkerState, version: str, error: TxError) -> bool:
        """True when trying again will not help, or has not helped for `storage_patience_s`."""
        self._leave(worker, version)
        self._forget_old_outages(worker)
        outage = worker.sampler_outages.setdefault(version, Outage())
        outage.failed(self.decisions.now)
        is_over = error.category == "user" or outage.has_lasted(self.decisions.now) >= self.policy.storage_patience_s
        if is_over:
            del worker.sampler_outages[version]
        return is_over

    def _forget_old_outages(self, worker: WorkerState) -> None:
        """Forget outages of versions that nobody asks for any more."""
        oldest = self.decisions.now - self.policy.storage_patience_s
        for version in [name for name, outage in worker.sampler_outages.items() if outage.until < oldest]:
            del worker.sampler_outages[version]

    def least_recent(self, worker: WorkerState) -> str | None:
        return worker.sampler_slots.victim(lambda _version: True)

    def slot_of(self, worker: WorkerState, version: str | None) -> int:
        if version is None:
            return BASE_SLOT
        slot = worker.sampler_slots.slot_of(version)
        assert slot is not None
        return slot
