"""Which jobs get a worker's places for sequences, and the command that gives them."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from tx_async.scheduler.core.fairness import Flow, prefixes_of
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import RunningSample, WorkerState
from tx_async.scheduler.sampling.jobs import SampleJob
from tx_async.scheduler.sampling.live import is_live
from tx_async.scheduler.sampling.sampler_slots import SamplerSlots
from tx_async.wire.worker import SequenceSpec

NEWCOMERS_SHARE = 8
"""One place in this many on the device stays free for sessions that have nothing running yet; half of these are only
for keys that have nothing running, and a quarter for live requests."""


class Places:
    """A worker's places for sequences: how many each flow has, and which flows may have another one."""

    def __init__(self, worker: WorkerState, policy: Policy):
        room = worker.info.num_sequences_max
        newcomers = room // NEWCOMERS_SHARE
        keys, live = (newcomers + 1) // 2, newcomers // 4
        #: live or not -> the most places that all such requests, one key's and one session's may have
        self._limits = {
            True: (max(1, room), max(1, room - keys), max(1, room - newcomers)),
            False: (max(1, room - live), max(1, room - keys - live), max(1, room - newcomers)),
        }
        self._shares = {True: policy.live_share, False: policy.sample_share}
        #: every prefix of a flow -> how many sequences it has
        self._running: defaultdict[Flow, int] = defaultdict(int)
        #: of live ones and of others
        self._of_class = {True: 0, False: 0}
        #: the same for one unit of their shares
        self._loads = {True: 0.0, False: 0.0}
        for flow, num_sequences in Counter(sample.job.flow for sample in worker.sequences.values()).items():
            self.take(flow, num_sequences)

    def take(self, flow: Flow, num_places: int = 1) -> None:
        for prefix in prefixes_of(flow):
            self._running[prefix] += num_places
        live = is_live(flow)
        self._of_class[live] += num_places
        self._loads[live] = self._of_class[live] / self._shares[live]

    def rank(self, flow: Flow) -> tuple[float, ...]:
        """The flow with the lowest rank is next."""
        key, session, run = prefixes_of(flow)
        running = self._running
        return self._loads[is_live(flow)], running[key], running[session], running[run]

    def may_grow(self, flow: Flow) -> bool:
        live = is_live(flow)
        of_class, of_key, of_session = self._limits[live]
        key, session, _ = prefixes_of(flow)
        running = self._running
        return self._of_class[live] < of_class and running[key] < of_key and running[session] < of_session


class Admission:
    """One `AdmitSequences` in the making."""

    def __init__(self, worker: WorkerState, slots: SamplerSlots):
        self.worker = worker
        self.slots = slots
        self.specs: list[SequenceSpec] = []
        self.tensors: list[np.ndarray] = []
        #: the ids of the requests that the sequences belong to
        self.requests: dict[str, None] = {}
        #: whether somebody waits for the first token of one of them
        self.has_watched = False
        #: versions that could get no slot
        self._without_slot: set[str] = set()
        #: the version that makes room for them: nothing more of it is admitted
        self._leaving: str | None = None

    def has_slot(self, job: SampleJob) -> bool:
        """Whether the job's adapter version is on the device; if not, it is requested."""
        version = job.version
        if version is None:
            return True
        if version in self._without_slot or version == self._leaving:
            return False
        if self.slots.bring(self.worker, version):
            return self.slots.is_loaded(self.worker, version)
        self._without_slot.add(version)
        self._leaving = self._leaving or self.slots.least_recent(self.worker)
        return False

    def add(self, job: SampleJob, index: int, sequence_id: int) -> None:
        slot = self.slots.slot_of(self.worker, job.version)
        self.specs.append(job.spec(sequence_id, index, slot, len(self.tensors)))
        self.tensors.extend(job.tensors(index))
        self.requests[job.request.request_id] = None
        self.has_watched |= job.is_watched
        self.worker.sequences[sequence_id] = RunningSample(job, index)
