"""Sample requests of all sessions: who is admitted next, which adapter versions are on the device, what has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct

from tx_async.errors import Cancelled, ServerError, TxError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.fairness import FairQueue
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Ignored, RunningSample, WorkerState, error_of
from tx_async.scheduler.sampling.jobs import SampleJob, renumber
from tx_async.scheduler.sampling.recorder import Recorder
from tx_async.scheduler.sampling.sampler_slots import SamplerSent, SamplerSlots
from tx_async.wire import results
from tx_async.wire.records import DropBody
from tx_async.wire.results import Failure
from tx_async.wire.worker import (
    AdmitSequences,
    CancelSequences,
    CommandFailed,
    CommandFinished,
    Sampled,
    SampleQuantum,
    SequenceSpec,
)

NEWCOMERS_SHARE = 8
"""One in so many places on the device stays free for sessions that have nothing running yet."""


class QuantumSent(Struct, frozen=True):
    sequence_ids: tuple[int, ...]
    """What was admitted by then."""


class AdmissionSent(Struct, frozen=True):
    sequence_ids: tuple[int, ...]


SamplingAnswer = QuantumSent | SamplerSent | AdmissionSent


class Sampling:
    def __init__(self, decisions: Decisions, policy: Policy, workers: dict[str, WorkerState]):
        self.decisions = decisions
        self.policy = policy
        #: all that are attached; their sequences are added and removed here
        self.workers = workers
        #: request_id -> accepted, unfinished job
        self.jobs: dict[str, SampleJob] = {}
        #: flow -> request_ids of jobs with samples that wait for admission, oldest first
        self.waiting: dict[str, dict[str, None]] = {}
        self.fair: FairQueue[str] = FairQueue()
        self.slots = SamplerSlots(decisions, policy)
        self.recorder = Recorder(decisions, policy)
        #: nothing more is admitted or decoded: a sample that is cut off runs again from its seed
        self.is_draining = False
        #: computed and sampled, for an operator
        self.num_tokens = 0
        self._last_sequence_id = 0

    def accept(self, job: SampleJob) -> None:
        self.jobs[job.request.request_id] = job
        if job.version is not None:
            self.decisions.hold_files(job.version)
        self._wait(job)

    def _wait(self, job: SampleJob) -> None:
        if job.pending:
            self.waiting.setdefault(job.flow, {})[job.request.request_id] = None

    def _stop_waiting(self, job: SampleJob) -> None:
        requests = self.waiting.get(job.flow, {})
        requests.pop(job.request.request_id, None)
        if not requests:
            self.waiting.pop(job.flow, None)

    # ---- issuing

    def has_work(self, worker: WorkerState) -> bool:
        return bool(worker.sequences or self.waiting) and not self.is_draining

    def issue(self, worker: WorkerState) -> bool:
        """Admit what there is room for, then one quantum. False when there is nothing to decode."""
        if isinstance(worker.reserved_for, SampleJob):
            self._admit_alone(worker, worker.reserved_for)
        elif worker.reserved_for is None:
            self._admit(worker)
        else:
            return False
        if not worker.sequences:
            return False
        info = worker.info
        command = SampleQuantum(decode_steps=info.decode_steps, prefill_tokens=info.prefill_tokens)
        self.decisions.send(worker, command, QuantumSent(tuple(worker.sequences)))
        return True

    def _admit(self, worker: WorkerState) -> None:
        """Flows take turns, the one with the fewest running sequences first; the last places stay free for
        newcomers."""
        room = worker.info.num_sequences_max
        reserve = room // NEWCOMERS_SHARE
        running = Counter(sample.job.flow for sample in worker.sequences.values())
        flows = self.fair.order(self.waiting)
        admission = Admission(worker, self.slots)
        while flows and len(worker.sequences) < room:
            flow = min(flows, key=running.__getitem__)
            job = self._next_job(admission, flow) if running[flow] < max(1, room - reserve) else None
            if job is None or worker.reserved_for is not None:
                flows.remove(flow)
                continue
            self._admit_sample(admission, job)
            running[flow] += 1
            if flow not in self.waiting:
                flows.remove(flow)
        self._send_admission(admission)

    def _next_job(self, admission: Admission, flow: str) -> SampleJob | None:
        """The flow's oldest job whose adapter is, or can be brought, on the device."""
        for request_id in self.waiting[flow]:
            job = self.jobs[request_id]
            if job.runs_alone:
                if admission.worker.reserved_for is None:
                    admission.worker.reserved_for = job
                return None
            if admission.has_slot(job):
                return job
        return None

    def _admit_alone(self, worker: WorkerState, job: SampleJob) -> None:
        """A suspect: it may have brought down workers. It gets the device when everything else is off it."""
        for other in worker.jobs():
            if other is not job:
                self._withdraw(worker, other)
        admission = Admission(worker, self.slots)
        while job.pending and len(worker.sequences) < worker.info.num_sequences_max and admission.has_slot(job):
            self._admit_sample(admission, job)
        self._send_admission(admission)

    def _admit_sample(self, admission: Admission, job: SampleJob) -> None:
        self._last_sequence_id += 1
        admission.add(job, self._last_sequence_id)
        if not job.pending:
            self._stop_waiting(job)

    def _send_admission(self, admission: Admission) -> None:
        if admission.specs:
            ids = tuple(spec.sequence_id for spec in admission.specs)
            command = AdmitSequences(sequences=tuple(admission.specs))
            self.decisions.send(admission.worker, command, AdmissionSent(ids), admission.tensors)

    # ---- answers

    def finished(
        self, worker: WorkerState, answer: SamplingAnswer, outcome: CommandFinished, tensors: Sequence[np.ndarray]
    ) -> None:
        if isinstance(answer, SamplerSent):
            self.slots.finished(worker, answer.version)
        if not isinstance(answer, QuantumSent):
            return
        assert isinstance(outcome.result, Sampled)
        for sequence_id, num_tokens in outcome.result.progress:
            self.num_tokens += num_tokens
            if sample := worker.sequences.get(sequence_id):
                self.fair.charge(sample.job.flow, num_tokens)
        for finished in outcome.result.finished:
            sample = worker.sequences.pop(finished.sequence_id, None)
            if sample is not None:
                sample.job.collect(sample.index, finished, tensors)
                if sample.job.is_finished:
                    self._finish(sample.job, "sample", sample.job.result())

    def failed(self, worker: WorkerState, answer: SamplingAnswer, failure: CommandFailed) -> None:
        error = error_of(failure)
        match answer:
            case SamplerSent(version=version):
                if self.slots.failed(worker, version, error):
                    self._end_all((job for job in self.jobs.values() if job.version == version), error)
            case AdmissionSent(sequence_ids=ids) if error.category == "user" and len(self._jobs_of(worker, ids)) == 1:
                self._end_all(self._jobs_of(worker, ids), error)
            case AdmissionSent(sequence_ids=ids) | QuantumSent(sequence_ids=ids):
                for job in self._jobs_of(worker, ids):
                    self._withdraw(worker, job)
                    self._try_again(job, error)

    def _jobs_of(self, worker: WorkerState, sequence_ids: Iterable[int]) -> list[SampleJob]:
        return list(dict.fromkeys(worker.sequences[s].job for s in sequence_ids if s in worker.sequences))

    # ---- how jobs end, or run again

    def worker_lost(self, worker: WorkerState) -> None:
        """Sampling changes no weights: the samples that were running run again from their seeds."""
        for job in worker.jobs():
            self._requeue(worker, job)
            self._try_again(
                job, ServerError(f"The worker died {job.num_failures + 1} times while it ran this request.")
            )

    def _requeue(self, worker: WorkerState, job: SampleJob) -> tuple[int, ...]:
        """What ran of a job on this worker waits for its next turn. Its sequences there."""
        ids = tuple(worker.sequences_of(job))
        job.requeue([worker.sequences.pop(sequence_id).index for sequence_id in ids])
        self._wait(job)
        return ids

    def _try_again(self, job: SampleJob, error: TxError) -> None:
        job.num_failures += 1
        if job.num_failures >= self.policy.attempts_max and job.request.request_id in self.jobs:
            self.end(job, error)

    def _withdraw(self, worker: WorkerState, job: SampleJob) -> None:
        """Take a job off a worker."""
        if ids := self._requeue(worker, job):
            self.decisions.send(worker, CancelSequences(sequence_ids=ids), Ignored())

    def end(self, job: SampleJob, error: TxError) -> None:
        """The job ends without a result: whatever of it runs is forgotten."""
        for worker in self.workers.values():
            self._withdraw(worker, job)
        self._finish(job, "error", results.encode_json(Failure.of(error)))

    def _end_all(self, jobs: Iterable[SampleJob], error: TxError) -> None:
        for job in list(jobs):
            self.end(job, error)

    def cancel(self, request_id: str) -> None:
        if job := self.jobs.get(request_id):
            self.end(job, Cancelled())

    def cancel_flow(self, flow: str) -> None:
        """The session has ended: nobody will fetch what its samples would give."""
        self._end_all((job for job in self.jobs.values() if job.flow == flow), Cancelled())

    def _finish(self, job: SampleJob, content, payload: bytes) -> None:
        self._stop_waiting(job)
        del self.jobs[job.request.request_id]
        recorded = self.recorder.recorded(job)
        self.decisions.finish(job.request, content, payload, DropBody(job.request.request_id), *recorded)
        if recorded:
            self.recorder.make_room(job.request.owner)
        if job.version is not None:
            self.decisions.let_go_of_files(job.version)


class Admission:
    """One `AdmitSequences` in the making."""

    def __init__(self, worker: WorkerState, slots: SamplerSlots):
        self.worker = worker
        self.slots = slots
        self.specs: list[SequenceSpec] = []
        self.tensors: list[np.ndarray] = []
        #: versions for which no slot could be had
        self._without_slot: set[str] = set()
        #: the version that makes room for them: nothing more of it is admitted
        self._leaving: str | None = None

    def has_slot(self, job: SampleJob) -> bool:
        """The job's adapter version is on the device; if not, it is asked for."""
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

    def add(self, job: SampleJob, sequence_id: int) -> None:
        index = job.pending.pop()
        slot = self.slots.slot_of(self.worker, job.version)
        self.specs.append(renumber(job.spec(sequence_id, index, slot), len(self.tensors)))
        self.tensors.extend(job.tensors(index))
        self.worker.sequences[sequence_id] = RunningSample(job, index)
