"""Sample requests of all sessions: who is admitted next, which adapter versions are on the device, what has ended."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct

from tx_async.errors import Cancelled, TxError
from tx_async.scheduler.events import CommandFailed, CommandFinished, Finish, Instruction
from tx_async.scheduler.fairness import FairQueue
from tx_async.scheduler.sampling import SampleJob, renumber
from tx_async.scheduler.training import Clock, Ignored, error_of
from tx_async.scheduler.worker_state import WorkerState
from tx_async.wire import results
from tx_async.wire.records import DropBody, ResultRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import (
    BASE_SLOT,
    AdmitSequences,
    CancelSequences,
    LoadSampler,
    Sampled,
    SampleQuantum,
    SequenceSpec,
)

BASE_NAMESPACE = "base"


class QuantumSent(Struct, frozen=True):
    is_quantum: bool = True


class SamplerSent(Struct, frozen=True):
    version: str


class AdmissionSent(Struct, frozen=True):
    sequence_ids: tuple[int, ...]


class Rollouts:
    def __init__(self, clock: Clock, out: list[Instruction]):
        self.clock = clock
        self.out = out
        #: request_id -> accepted, unfinished job
        self.jobs: dict[str, SampleJob] = {}
        #: flow -> request_ids of jobs with samples that wait for admission, oldest first
        self.waiting: dict[str, dict[str, None]] = {}
        self.fair: FairQueue[str] = FairQueue()
        self._last_sequence_id = 0

    def accept(self, job: SampleJob) -> None:
        self.jobs[job.request.request_id] = job
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
        return bool(worker.sequences or self.waiting)

    def issue(self, worker: WorkerState) -> bool:
        """Admit what there is room for, then one quantum. False when there is nothing to decode."""
        self._admit(worker)
        if not worker.sequences:
            return False
        command = SampleQuantum(decode_steps=worker.info.decode_steps, prefill_tokens=worker.info.prefill_tokens)
        self.out.append(worker.send(command, QuantumSent()))
        return True

    def _admit(self, worker: WorkerState) -> None:
        """Flows take turns, the one with the fewest running sequences first; the last places stay free for
        newcomers."""
        room = worker.info.num_sequences_max
        reserve = room // 8
        specs: list[SequenceSpec] = []
        tensors: list[np.ndarray] = []
        running: dict[str, int] = {}
        for job in worker.sequences.values():
            running[job.flow] = running.get(job.flow, 0) + 1
        blocked: set[str] = set()
        while len(worker.sequences) < room:
            flows = [
                f for f in self.fair.order(self.waiting) if f not in blocked and running.get(f, 0) < room - reserve
            ]
            if not flows:
                break
            flow = min(flows, key=lambda f: running.get(f, 0))
            admitted = self._admit_one(worker, flow, specs, tensors)
            if admitted:
                running[flow] = running.get(flow, 0) + 1
            else:
                blocked.add(flow)
        if specs:
            ids = tuple(spec.sequence_id for spec in specs)
            self.out.append(worker.send(AdmitSequences(sequences=tuple(specs)), AdmissionSent(ids), tensors))

    def _admit_one(self, worker: WorkerState, flow: str, specs: list[SequenceSpec], tensors: list[np.ndarray]) -> bool:
        """The next sample of the flow whose adapter is, or can be brought, on the device."""
        for job in self._waiting_jobs(flow):
            slot = self._slot_for(worker, job)
            if slot is None:
                continue
            index = job.pending.pop()
            self._last_sequence_id += 1
            sequence_id = self._last_sequence_id
            specs.append(renumber(job.spec(sequence_id, index, slot), len(tensors)))
            tensors.extend(job.tensors(index))
            job.running[sequence_id] = (worker.worker_id, index)
            worker.sequences[sequence_id] = job
            if not job.pending:
                self._stop_waiting(job)
            return True
        return False

    def _waiting_jobs(self, flow: str) -> Iterator[SampleJob]:
        return iter([self.jobs[request_id] for request_id in self.waiting.get(flow, ())])

    def _slot_for(self, worker: WorkerState, job: SampleJob) -> int | None:
        """Slot of the job's adapter version; None while every slot is held by running sequences of other versions."""
        if job.version is None:
            return BASE_SLOT
        slots = worker.sampler_slots
        if job.version in slots:
            return slots.touch(job.version)
        slot = slots.take(job.version)
        if slot is None:
            in_use = {other.version for other in worker.sequences.values()}
            victim = slots.victim(lambda version: version not in in_use)
            if victim is None:
                return None
            slots.release(victim)
            slot = slots.take(job.version)
            assert slot is not None
        self.out.append(worker.send(LoadSampler(sampler_slot=slot, key=job.version), SamplerSent(job.version)))
        return slot

    # ---- answers

    def finished(self, worker: WorkerState, answer, event: CommandFinished) -> None:
        if isinstance(answer, QuantumSent):
            assert isinstance(event.result, Sampled)
            for sequence_id, num_tokens in event.result.progress:
                if job := worker.sequences.get(sequence_id):
                    self.fair.charge(job.flow, num_tokens)
            for finished in event.result.finished:
                job = worker.sequences.pop(finished.sequence_id, None)
                if job is not None and finished.sequence_id in job.running:
                    job.collect(finished, event.tensors)
                    if job.is_finished:
                        self._finish(job, "sample", job.result())

    def failed(self, worker: WorkerState, answer, event: CommandFailed) -> None:
        error = error_of(event.category, event.message)
        if isinstance(answer, SamplerSent):
            if answer.version in worker.sampler_slots:
                worker.sampler_slots.release(answer.version)
            jobs = [job for job in self.jobs.values() if job.version == answer.version]
        elif isinstance(answer, AdmissionSent):
            jobs = [worker.sequences[s] for s in answer.sequence_ids if s in worker.sequences]
        else:
            jobs = list(worker.sequences.values())
        for job in {job.request.request_id: job for job in jobs}.values():
            self.end([worker], job, error)

    def end(self, workers: list[WorkerState], job: SampleJob, error: TxError) -> None:
        """The job ends without a result: whatever of it runs is forgotten."""
        for worker in workers:
            ids = tuple(s for s, (worker_id, _) in job.running.items() if worker_id == worker.worker_id)
            if ids:
                self.out.append(worker.send(CancelSequences(sequence_ids=ids), Ignored()))
                for sequence_id in ids:
                    worker.sequences.pop(sequence_id, None)
        job.running = {}
        job.pending = []
        self._finish(job, "error", results.encode_json(Failure.of(error)))

    def cancel(self, workers: list[WorkerState], request_id: str) -> None:
        if job := self.jobs.get(request_id):
            self.end(workers, job, Cancelled())

    def worker_lost(self, worker: WorkerState) -> None:
        for job in self.jobs.values():
            job.requeue(worker.worker_id)
            self._wait(job)

    def _finish(self, job: SampleJob, content, payload: bytes) -> None:
        self._stop_waiting(job)
        del self.jobs[job.request.request_id]
        record = ResultRecord(
            request_id=job.request.request_id, finished_at=self.clock.now, content=content, payload=payload
        )
        self.out.append(Finish(record, (DropBody(job.request.request_id),)))
