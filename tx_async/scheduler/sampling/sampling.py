"""Sample requests of all sessions: which are admitted next, which adapter versions are on the device, and which have
ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from msgspec import Struct

from tx_async.errors import Cancelled, Category, InvalidRequest, ServerError, TxError
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.fairness import FairQueue, Flow
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.worker_state import Ignored, RunningSample, WorkerState, error_of
from tx_async.scheduler.interface import LivePiece
from tx_async.scheduler.sampling.admission import Admission, Places
from tx_async.scheduler.sampling.jobs import SampleJob
from tx_async.scheduler.sampling.live import LiveJob
from tx_async.scheduler.sampling.placement import Lines, why_unable
from tx_async.scheduler.sampling.recorder import Recorder
from tx_async.scheduler.sampling.recordings import check_whole
from tx_async.scheduler.sampling.sampler_slots import SamplerSent, SamplerSlots
from tx_async.scheduler.sampling.trials import TrialJob, Trials
from tx_async.wire import results
from tx_async.wire.records import DropBody, ResultContent
from tx_async.wire.results import Failure
from tx_async.wire.worker import (
    AdmitSequences,
    CancelSequences,
    CommandFailed,
    CommandFinished,
    FinishedSequence,
    Loaded,
    Result,
    Sampled,
)


class QuantumSent(Struct, frozen=True):
    sequence_ids: tuple[int, ...]
    """The samples that were admitted by then."""
    decode_steps: int


class AdmissionSent(Struct, frozen=True):
    sequence_ids: tuple[int, ...]


SamplingAnswer = QuantumSent | SamplerSent | AdmissionSent


class Sampling:
    def __init__(self, decisions: Decisions, policy: Policy, workers: dict[str, WorkerState]):
        self.decisions = decisions
        self.policy = policy
        #: all attached workers; their sequences are added and removed here
        self.workers = workers
        #: request_id -> accepted, unfinished job
        self.jobs: dict[str, SampleJob] = {}
        #: how many jobs are live
        self.num_live = 0
        #: when the newest of them came or ended
        self._last_live_at = -math.inf
        #: the jobs with samples that wait for admission
        self.waiting = Lines(workers)
        self.fair = FairQueue()
        self.slots = SamplerSlots(decisions, policy)
        self.recorder = Recorder(decisions, policy)
        self.trials = Trials(decisions, self.accept, self._drop)
        #: external workers that have left, and why, until they are back
        self.left: dict[str, str] = {}
        #: nothing more is admitted or decoded: a sample that is cut off runs again from its seed
        self.is_draining = False
        #: for an operator: tokens computed and sampled, prompt tokens of finished samples, and the cached ones among
        #: these
        self.num_tokens = self.num_prompt_tokens = self.num_cached_tokens = 0
        #: sequences that gave their pages to others
        self.num_preempted = 0
        self._last_sequence_id = 0
        self._last_order = 0

    def accept(self, job: SampleJob) -> None:
        self.jobs[job.request.request_id] = job
        self._count_live(job, 1)
        self._last_order += 1
        job.order = self._last_order
        if job.version is not None:
            self.decisions.hold_files(job.version)
        self._wait(job)

    def _wait(self, job: SampleJob) -> None:
        """Put a job in line unless it has ended."""
        if self._is_open(job):
            self.waiting.put(job)

    def _count_live(self, job: SampleJob, change: int) -> None:
        if job.is_watched:
            self.num_live += change
            self._last_live_at = self.decisions.now

    def _is_open(self, job: SampleJob) -> bool:
        return self.jobs.get(job.request.request_id) is job

    def worker_ready(self, worker: WorkerState) -> None:
        self.left.pop(worker.worker_id, None)
        self.trials.begin(worker)
        self.waiting.sort_again()

    def why_waiting(self, request_id: str) -> str:
        """Why no attached worker can take a request's waiting samples; "" while one can, or some of them run."""
        place, job = self.waiting.place(request_id), self.jobs.get(request_id)
        if job is None or place is None or not place.is_nowhere:
            return ""
        workers = self.workers.values()
        if any(worker.sequences_of(job) for worker in workers):
            return ""
        scores, _ = job.waiting_kinds
        reasons = [f"worker {worker.worker_id}: {why_unable(worker, job, scores)}" for worker in workers]
        return "; ".join([*reasons, *(f"worker {name}: {reason}" for name, reason in self.left.items())])

    @property
    def weight(self) -> float:
        """The weight of sampling against training: the sum over classes that have work, because they decode
        together."""
        unwatched = len(self.jobs) > self.num_live or not self.num_live
        return unwatched * self.policy.sample_share + bool(self.num_live) * self.policy.live_share

    # ---- issuing

    def has_work(self, worker: WorkerState) -> bool:
        return self._goes_on(worker) and bool(worker.sequences or self.waiting.offers(worker))

    def _goes_on(self, worker: WorkerState) -> bool:
        return not (self.is_draining or worker.outgrown_by)

    def admit(self, worker: WorkerState) -> None:
        """Admit all that there is room for, on a worker whose sequences run by themselves, whatever else is in
        flight."""
        is_full = len(worker.in_flight) >= self.policy.commands_in_flight_max
        if worker.has_room and not is_full and not self.is_draining and self.waiting.offers(worker):
            self._admit(worker)

    def issue(self, worker: WorkerState) -> bool:
        """Admit what there is room for, then send one quantum. False when there is nothing to decode."""
        if not self._goes_on(worker):
            return False
        if isinstance(worker.reserved_for, SampleJob):
            admission = self._admit_alone(worker, worker.reserved_for)
        elif worker.reserved_for is None:
            admission = self._admit(worker)
        else:
            return False
        if not worker.sequences:
            return False
        is_read_along = self.decisions.now - self._last_live_at < self.policy.live_memory_s or self.num_live > 0
        command = worker.next_quantum(admission.has_watched, is_read_along)
        self.decisions.send(worker, command, QuantumSent(tuple(worker.sequences), command.decode_steps))
        return True

    def _admit(self, worker: WorkerState) -> Admission:
        """Live requests and others share the places by weight. Within each, keys take turns, the one with the fewest
        running sequences first, then the sessions of a key, then what a session samples from; the last places stay free
        for those that have nothing running yet."""
        flows = self.fair.order(self.waiting)
        admission = Admission(worker, self.slots)
        if flows and worker.has_room:
            self._give_places(admission, flows)
            self._send_admission(admission)
        return admission

    def _give_places(self, admission: Admission, flows: list[Flow]) -> None:
        worker, places = admission.worker, Places(admission.worker, self.policy)
        flows = list(filter(places.may_grow, flows))
        while flows and worker.has_room:
            flow = min(flows, key=places.rank)
            job = self._next_job(admission, flow) if places.may_grow(flow) else None
            if job is None or worker.reserved_for is not None:
                flows.remove(flow)
                continue
            self._admit_sample(admission, job)
            places.take(flow)
            if flow not in self.waiting:
                flows.remove(flow)

    def _next_job(self, admission: Admission, flow: Flow) -> SampleJob | None:
        """The flow's oldest job that this worker may take and whose adapter is on its device or can be brought
        there."""
        for job in self.waiting.heads(flow, admission.worker):
            if job.runs_alone:
                if admission.worker.reserved_for is None:
                    admission.worker.reserve_for(job)
                return None
            if admission.has_slot(job):
                return job
        return None

    def _admit_alone(self, worker: WorkerState, job: SampleJob) -> Admission:
        """Admit a suspect, which may have brought down workers. It gets the device when everything else is off it."""
        for other in worker.jobs():
            if other is not job:
                self._withdraw(worker, other)
        admission = Admission(worker, self.slots)
        while job.pending and len(worker.sequences) < worker.info.num_sequences_max and admission.has_slot(job):
            self._admit_sample(admission, job)
        self._send_admission(admission)
        return admission

    def _admit_sample(self, admission: Admission, job: SampleJob) -> None:
        self._last_sequence_id += 1
        place, kinds = self.waiting.place(job.request.request_id), job.waiting_kinds
        scores = place is not None and self.waiting.may_take(admission.worker, place, scores=True)
        admission.add(job, job.take(scores), self._last_sequence_id)
        if job.waiting_kinds != kinds:
            self.waiting.put(job)

    def _send_admission(self, admission: Admission) -> None:
        if admission.specs:
            ids = tuple(spec.sequence_id for spec in admission.specs)
            command = AdmitSequences(sequences=tuple(admission.specs))
            answer, requests = AdmissionSent(ids), admission.requests
            self.decisions.send(admission.worker, command, answer, admission.tensors, requests)

    # ---- answers

    def finished(
        self, worker: WorkerState, answer: SamplingAnswer, outcome: CommandFinished, tensors: Sequence[np.ndarray]
    ) -> None:
        if isinstance(answer, SamplerSent):
            self._loaded(worker, answer.version, outcome.result)
        if not isinstance(answer, QuantumSent):
            return
        assert isinstance(outcome.result, Sampled)
        worker.holds_tokens(outcome.result.num_kv_tokens)
        if not outcome.result.num_prefilled_tokens:
            worker.took(answer.decode_steps, outcome.elapsed_ms)
        self.num_preempted += outcome.result.num_preempted
        for sequence_id, num_tokens in outcome.result.progress:
            self.num_tokens += num_tokens
            if sample := worker.sequences.get(sequence_id):
                self.fair.charge(sample.job.flow, num_tokens)
        for piece in outcome.result.pieces:
            sample = worker.sequences.get(piece.sequence_id)
            if sample is not None and isinstance(sample.job, LiveJob):
                self._tell(sample.job, partial(sample.job.piece, sample.index, piece, tensors))
        for finished in outcome.result.finished:
            sample = worker.sequences.pop(finished.sequence_id, None)
            if sample is not None:
                self._sampled(worker, sample, finished, tensors)
        self._failed_alone(worker, outcome.result.failed)

    def _sampled(
        self, worker: WorkerState, sample: RunningSample, finished: FinishedSequence, tensors: Sequence[np.ndarray]
    ) -> None:
        job = sample.job
        try:
            check_whole(finished, tensors, self.policy)
        except InvalidRequest as error:
            self.end(job, error)
            return
        self._count(job, finished, len(tensors[finished.tokens_index]))
        job.collect(sample.index, finished, tensors)
        if isinstance(job, LiveJob):
            self._tell(job, partial(job.last_piece, sample.index))
        if job.is_finished:
            self._succeed(job, worker)

    def _tell(self, job: LiveJob, piece: Callable[[], LivePiece | None]) -> None:
        """Send a piece to the client of a live request; a request that would contradict what was sent ends."""
        try:
            news = piece()
        except ServerError as error:
            self.end(job, error)
            return
        if news is not None:
            self.decisions.deliver(job.request.request_id, news)

    def _count(self, job: SampleJob, finished: FinishedSequence, num_tokens: int) -> None:
        if not isinstance(job, TrialJob):
            self.num_prompt_tokens += len(job.operation.prompt) // 4
            self.num_cached_tokens += finished.num_cached_tokens
            if finished.times and num_tokens:
                self.decisions.sequence_ended(job.request, finished.times, num_tokens)

    def _loaded(self, worker: WorkerState, version: str, result: Result) -> None:
        if isinstance(result, Loaded) and result.needs_rank:
            self.slots.too_narrow(worker, version, result.needs_rank)
        elif isinstance(result, Loaded) and result.refused:
            self.slots.refused(worker, version, result.refused)
            self.waiting.sort_again()
        else:
            self.slots.finished(worker, version)

    def _failed_alone(self, worker: WorkerState, failed: Sequence[tuple[int, Category, str]]) -> None:
        """Sequences that ended without a result while all others go on. A job fails once, however many of its sequences
        failed."""
        errors: dict[SampleJob, TxError] = {}
        for sequence_id, category, message in failed:
            if sample := worker.sequences.pop(sequence_id, None):
                sample.job.requeue([sample.index])
                error = error_of(CommandFailed(number=0, category=category, message=message))
                errors.setdefault(sample.job, error)
        for job, error in errors.items():
            if error.category == "user":
                self.end(job, error)
                continue
            if worker.is_external:
                job.declined_by[worker.worker_id] = error.message
            self._withdraw(worker, job)
            if not worker.is_external:
                self._try_again(job, error)

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

    def worker_lost(self, worker: WorkerState, reason: str) -> None:
        """Sampling changes no weights, so the samples that were running run again from their seeds."""
        self.trials.end(worker)
        for job in worker.jobs():
            if worker.is_external:
                job.num_desertions += 1
            self._requeue(worker, job)
            if not worker.is_external and not worker.is_leaving:
                times = job.num_failures + 1
                self._try_again(job, ServerError(f"The worker died {times} times while it ran this request."))
        if worker.is_external:
            self.left[worker.worker_id] = reason
        self.waiting.sort_again()

    def _requeue(self, worker: WorkerState, job: SampleJob) -> tuple[int, ...]:
        """The samples of a job that ran on this worker wait for their next turn. -> the job's sequences there."""
        ids = tuple(worker.sequences_of(job))
        job.requeue([worker.sequences.pop(sequence_id).index for sequence_id in ids])
        self._wait(job)
        return ids

    def _try_again(self, job: SampleJob, error: TxError) -> None:
        job.num_failures += 1
        if job.num_failures >= self.policy.attempts_max:
            self.end(job, error)
        else:
            self._wait(job)

    def _withdraw(self, worker: WorkerState, job: SampleJob) -> None:
        """Take a job off one worker."""
        if ids := self._requeue(worker, job):
            self.decisions.send(worker, CancelSequences(sequence_ids=ids), Ignored())

    def end(self, job: SampleJob, error: TxError) -> None:
        """The job ends without a result: samples that still run are forgotten."""
        if not self._is_open(job):
            return
        for worker in self.workers.values():
            self._withdraw(worker, job)
        match job:
            case TrialJob():
                if tried := self.workers.get(job.worker_id):
                    self.trials.failed(job, tried, error.message)
            case LiveJob():
                self._drop(job)
                self.decisions.deliver(job.request.request_id, error=error)
            case _:
                self._finish(job, "error", results.encode_json(Failure.of(error)))

    def _end_all(self, jobs: Iterable[SampleJob], error: TxError) -> None:
        for job in list(jobs):
            self.end(job, error)

    def cancel(self, request_id: str) -> None:
        if job := self.jobs.get(request_id):
            self.end(job, Cancelled())

    def cancel_session(self, session_id: str) -> None:
        """The session has ended: nobody will fetch the results of its samples."""
        self._end_all((job for job in self.jobs.values() if job.flow[1] == session_id), Cancelled())

    def _succeed(self, job: SampleJob, worker: WorkerState) -> None:
        match job:
            case TrialJob():
                if tried := self.workers.get(job.worker_id):
                    self.trials.finished(job, tried, worker.info.dtype == "float32")
                    self.waiting.sort_again()
            case LiveJob():
                self._drop(job)
            case _:
                self._finish(job, "sample", job.result())

    def _finish(self, job: SampleJob, content: ResultContent, payload: bytes) -> None:
        self.waiting.remove(job)
        del self.jobs[job.request.request_id]
        recorded = self.recorder.recorded(job)
        self.decisions.finish(job.request, content, payload, DropBody(job.request.request_id), *recorded)
        if recorded:
            self.recorder.make_room(job.request.owner)
        self._let_go_of(job.version)

    def _drop(self, job: SampleJob) -> None:
        """Drop a job: nobody waits for its result."""
        if self._is_open(job):
            for worker in self.workers.values():
                self._withdraw(worker, job)
            self.waiting.remove(job)
            del self.jobs[job.request.request_id]
            self._count_live(job, -1)
            self._let_go_of(job.version)

    def _let_go_of(self, version: str | None) -> None:
        if version is None:
            return
        self.decisions.let_go_of_files(version)
        if not self.decisions.holds_files(version):
            for worker in self.workers.values():
                worker.refused_versions.pop(version, None)


class Stranded:
    """Why no attached worker can take a request, for whoever asks about its state."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling

    def get(self, request_id: str) -> str:
        """The reason; "" while one can."""
        return self._sampling.why_waiting(request_id)
