"""The scheduler's mind: facts in, instructions out. No I/O, no clock, no await.

`restore` (once), `handle` (every fact) and `drain` (at the end) are the only ways to change it, or the catalog that it
shares with readers; a test holds the rest of the package to that.

A worker always has up to `quanta_in_flight_max` quanta ahead (of each kind, where its engine runs them side by side). A
quantum is a train micro-batch or a few decode steps; any other may come between two of them: that is how training and
sampling, and all tenants, share one device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, get_args

from tx_async.errors import Cancelled, InvalidRequest, OtherBase, ServerError, UnknownCheckpoint
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.facts import (
    BodyLoaded,
    Fact,
    FilesListed,
    LiveRequested,
    RecordFact,
    RequestAccepted,
    RequestCancelled,
    ResultDurable,
    SessionEnded,
    SubmissionRefused,
    Tick,
)
from tx_async.scheduler.core.instructions import Instruction
from tx_async.scheduler.core.marks import ReplayMarks
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.recovery import restore
from tx_async.scheduler.core.registry import Registry, RegistryFact
from tx_async.scheduler.core.retention import Retention
from tx_async.scheduler.core.worker_state import Kind, WorkerState
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.scheduler.sampling.jobs import SampleJob, namespace_of
from tx_async.scheduler.sampling.live import LIVE, LiveJob
from tx_async.scheduler.sampling.recordings import head_tokens
from tx_async.scheduler.sampling.sampling import Sampling, SamplingAnswer, Stranded
from tx_async.scheduler.training.lanes import Step
from tx_async.scheduler.training.orphans import Orphans
from tx_async.scheduler.training.training import Training, TrainingAnswer
from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerProgress, WorkerReady
from tx_async.wire.operations import Operation, Sample
from tx_async.wire.records import Change, DropBody, Put, RequestRecord
from tx_async.wire.worker import CommandFailed, CommandFinished

RECORD_FACTS = frozenset(get_args(RecordFact))
LEAVING_S = 60.0
"""How long a worker that must start again with wider slots waits for what it has in flight; what storage has not taken
by then is computed again."""


class SchedulerState:
    def __init__(
        self,
        catalog: Catalog,
        base_model: BaseModelInfo,
        policy: Policy,
        now: float = 0.0,
        marks: ReplayMarks | None = None,
    ):
        self.catalog = catalog
        #: the record at which a process that ends now would have died
        self.marks = marks or ReplayMarks()
        self.base_model = base_model
        self.policy = policy
        self.decisions = Decisions(catalog, now)
        self.decisions.audit.events_max = policy.audit_events_max
        #: attached and ready workers, in order of attachment
        self.workers: dict[str, WorkerState] = {}
        #: the worker that trains: one mesh has all training state
        self._trainer: WorkerState | None = None
        self.training = Training(self.decisions, policy, self.workers, self.marks)
        self.sampling = Sampling(self.decisions, policy, self.workers)
        #: why no worker can take a sample request, by the request's id
        self.stranded = Stranded(self.sampling)
        self.registry = Registry(self.decisions)
        self.retention = Retention(self.decisions, self.training.runs, self.sampling, policy)
        self.orphans = Orphans(self.training.runs, self.decisions)
        #: the time that workers have spent on each kind of quantum, for an operator
        self.busy_ms: dict[Kind, float] = {"train": 0.0, "sample": 0.0}
        #: samples that were accepted before a restart and whose bodies are being read
        self.restoring: set[str] = set()
        #: type of a fact -> how it is taken up
        self._handlers: dict[type[Fact], Callable[[Any], None]] = {
            SubmissionRefused: self._refused,
            ResultDurable: self._durable,
            **dict.fromkeys(get_args(RegistryFact), self.registry.handle),
            RequestAccepted: self._accepted,
            LiveRequested: self._accept_live,
            RequestCancelled: self._cancel,
            SessionEnded: self._session_ended,
            WorkerProgress: self._progressed,
            WorkerReady: self._worker_ready,
            WorkerLost: self._worker_lost,
            CommandEnded: self._answered,
            BodyLoaded: self._body_loaded,
            FilesListed: self.orphans.found,
            Tick: self._tick,
        }

    def __repr__(self) -> str:
        running = sum(len(worker.in_flight) for worker in self.workers.values())
        resident = sum(len(worker.training_slots) for worker in self.workers.values())
        runs = self.training.runs
        return (
            f"<Scheduler [Requests: {len(runs.ready)} runs ready, {len(self.sampling.jobs)} samples open | "
            f"Commands: {running} running | Adapters: {resident} resident of {len(runs.lanes)} | "
            f"Workers: {len(self.workers)} ready]>"
        )

    def restore(self) -> list[Instruction]:
        """Take up what the journal holds: called once, before the first fact."""
        self.decisions.cause = "restart"
        for request in restore(self.training, self.marks):
            self.restoring.add(request.request_id)
            self.decisions.fetch_body(request.request_id)
        return self.decisions.take()

    def handle(self, fact: Fact, now: float) -> list[Instruction]:
        """Take up a change in the world, and decide what to do about it."""
        self.decisions.begin(fact.cause, now)
        self._handlers[type(fact)](fact)
        if type(fact) not in RECORD_FACTS:
            self.training.settle()
            for worker in self.workers.values():
                self._advance(worker)
        return self.decisions.take()

    @property
    def highest_rank(self) -> int:
        """The highest rank of a live run of this base; 0 without any. So a worker that starts after a crash has slots
        for all of them at once."""
        models = (model for model in self.catalog.models.values() if not self.catalog.is_of_other_base(model))
        return max((model.lora.rank for model in models if model.status == "live"), default=0)

    def check_turn(self, subject: str, seq_id: int) -> None:
        """Raises `Conflict` when the turn of this number has passed, `InvalidRequest` when it cannot be the next."""
        if lane := self.training.runs.lanes.get(subject):
            lane.check_turn(seq_id, self.policy)

    # ---- facts

    def _refused(self, fact: SubmissionRefused) -> None:
        self.training.runs.heard_of(fact.subject)

    def _durable(self, fact: ResultDurable) -> None:
        self.decisions.publish(fact.result)

    def drain(self, now: float) -> tuple[list[Instruction], bool]:
        """For a shutdown: begin nothing more, and snapshot every run that is worth it. The flag says whether something
        is still on its way."""
        self.decisions.begin("shutdown", now)
        self.training.is_draining = self.sampling.is_draining = True
        if self._trainer:
            self.training.snapshots.take_all(self._trainer)
        busy = any(worker.in_flight for worker in self.workers.values()) or self.training.snapshots.are_pending
        return self.decisions.take(), busy

    def _accepted(self, fact: RequestAccepted) -> None:
        models: tuple[Change, ...] = (Put(fact.model),) if fact.model else ()
        self.decisions.know(*models, Put(fact.request), *fact.events)
        if fact.model:
            self.training.runs.create(fact.model)
        if fact.result:
            self.decisions.publish(fact.result)
        else:
            self._accept(fact.request, fact.operation)

    def _accept(self, request: RequestRecord, operation: Operation) -> None:
        if isinstance(operation, Sample):
            self._accept_sample(request, operation)
        else:
            self.training.accept(request, operation)

    def _accept_sample(self, request: RequestRecord, operation: Sample) -> None:
        sampler = self.catalog.samplers.get(operation.sampling_session_id)
        if sampler is None:
            error = UnknownCheckpoint("The sampling session of this request has ended.")
            self.decisions.fail(request, error, DropBody(request.request_id))
            return
        try:
            check_room(operation, self.base_model)
            self.catalog.check_base(sampler)
        except (InvalidRequest, OtherBase) as error:
            self.decisions.fail(request, error, DropBody(request.request_id))
            return
        fields = self._job_fields(request, operation, sampler.storage_key)
        flow = (sampler.owner, sampler.session_id, sampler.sampler_id)
        recorded = head_tokens(operation, self.policy, self.base_model.vocab_size)
        self.sampling.accept(SampleJob(flow=flow, head_tokens=recorded, **fields))

    def _accept_live(self, fact: LiveRequested) -> None:
        fields = self._job_fields(fact.request, fact.operation, fact.version)
        self.sampling.accept(LiveJob(flow=(fact.request.owner, LIVE, fact.version or ""), **fields))

    def _job_fields(self, request: RequestRecord, operation: Sample, version: str | None) -> dict[str, Any]:
        room = self.base_model.max_context_length - len(operation.prompt) // 4
        eos = self.base_model.eos_token_ids if operation.use_eos else ()
        return {
            "request": request,
            "operation": operation,
            "version": version,
            "namespace": namespace_of(request.owner, version),
            # A seed that nobody asked for must survive a restart, too: it is part of the request.
            "seed": operation.seed if operation.seed is not None else seed_of(request),
            "max_tokens": min(operation.max_tokens or room, room),  # 0: a full context, whose prompt is scored
            "stop_token_ids": tuple(dict.fromkeys((*operation.stop_token_ids, *eos))),
            "pending": list(range(operation.num_samples))[::-1],
        }

    def _cancel(self, fact: RequestCancelled) -> None:
        request_id = fact.request_id
        if request_id in self.restoring:
            self.restoring.discard(request_id)
            self.decisions.fail(self.catalog.requests[request_id], Cancelled(), DropBody(request_id))
        else:
            self.sampling.cancel(request_id)

    def _session_ended(self, fact: SessionEnded) -> None:
        self.registry.end_session(fact)
        self.sampling.cancel_session(fact.session_id)

    def _progressed(self, fact: WorkerProgress) -> None:
        """Nothing can run on the worker yet."""

    def _worker_ready(self, fact: WorkerReady) -> None:
        self._worker_lost(WorkerLost(fact.worker_id, "it has begun anew"))  # a new process under an old name
        worker = WorkerState(fact.worker_id, fact.info, fact.capabilities, self.policy)
        self.workers[fact.worker_id] = worker
        self._trainer = self._first_trainer()
        self.sampling.worker_ready(worker)

    def _worker_lost(self, fact: WorkerLost) -> None:
        worker = self.workers.pop(fact.worker_id, None)
        if worker is None:
            return
        self.sampling.worker_lost(worker, fact.reason)
        if worker is self._trainer:
            self._trainer = self._first_trainer()
            self.training.runs.worker_lost(worker)

    def _first_trainer(self) -> WorkerState | None:
        return next((worker for worker in self.workers.values() if "train" in worker.capabilities), None)

    def _answered(self, fact: CommandEnded) -> None:
        worker, outcome = self.workers.get(fact.worker_id), fact.outcome
        if worker is None or outcome.number not in worker.in_flight:
            return
        if not isinstance(outcome, CommandFinished):
            self._failed(worker, outcome)
            return
        awaited = worker.answered(outcome.number)
        answer, kind = awaited.answer, awaited.kind
        if isinstance(answer, TrainingAnswer):
            self.training.finished(answer, outcome, fact.tensors)
        elif isinstance(answer, SamplingAnswer):
            self.sampling.finished(worker, answer, outcome, fact.tensors)
        if kind:
            worker.shares.measured(kind, outcome.elapsed_ms)
            self.busy_ms[kind] += outcome.elapsed_ms

    def _failed(self, worker: WorkerState, failure: CommandFailed) -> None:
        if failure.fatal:
            return  # `WorkerLost` follows, and the worker's requests run again
        answer = worker.answered(failure.number).answer
        if isinstance(answer, TrainingAnswer):
            self.training.failed(answer, failure)
        elif isinstance(answer, SamplingAnswer):
            self.sampling.failed(worker, answer, failure)

    def _body_loaded(self, fact: BodyLoaded) -> None:
        request = self.catalog.requests.get(fact.request_id)
        if request is None:
            return
        error = ServerError(f"The journal has lost the content of this request. {fact.message}".strip())
        if request.request_id not in self.restoring:
            self.training.body_loaded(request, fact.operation, error)
            return
        self.restoring.discard(request.request_id)
        if isinstance(fact.operation, Sample):
            with self.marks.of("run", request.request_id):
                self._accept_sample(request, fact.operation)
        else:
            self.decisions.fail(request, error, DropBody(request.request_id))

    def _tick(self, _fact: Tick) -> None:
        self.training.runs.burn_gaps()
        if self._trainer:
            self.training.save_again(self._trainer)
            self.training.snapshots.take_all(self._trainer, idle_since=self.decisions.now - self.policy.snapshot_idle_s)
        self.retention.sweep_if_due()
        self.orphans.look()

    # ---- deciding what runs next

    def _advance(self, worker: WorkerState) -> None:
        if worker.reserved_for is not None:
            self._end_reservation(worker)
        if worker.info.continuous and "sample" in worker.capabilities:
            self.sampling.admit(worker)
        if worker.takes_quanta:
            self._issue_quanta(worker)
        if worker.outgrown_by and not worker.is_leaving:
            self._leave_if_done(worker)

    def _issue_quanta(self, worker: WorkerState) -> None:
        trains, samples = worker is self._trainer, "sample" in worker.capabilities

        def is_busy(kind: Kind) -> bool:
            if worker.quanta[kind]:
                return True
            if kind == "train":
                return trains and self.training.has_work(worker)
            return samples and self.sampling.has_work(worker)

        worker.shares.weigh("sample", self.sampling.weight)
        while worker.takes_quanta and any(self._issue(worker, kind) for kind in worker.shares.order(is_busy)):
            pass

    def _leave_if_done(self, worker: WorkerState) -> None:
        """Once nothing of it is in flight, and what it has trained is in snapshots, have it start again with wider
        slots."""
        is_busy = bool(worker.in_flight)
        if worker is self._trainer:
            self.training.snapshots.take_all(worker)
            is_busy = bool(worker.in_flight) or self.training.snapshots.are_pending
        if not is_busy or self.decisions.now - worker.outgrown_at >= LEAVING_S:
            self.decisions.widen(worker)

    def _issue(self, worker: WorkerState, kind: Kind) -> bool:
        """Send one quantum of this kind. False when there was none, or when it is not this kind's turn."""
        if worker.is_full(kind) or worker.had_its_share(kind):
            return False
        return self.training.issue(worker) if kind == "train" else self.sampling.issue(worker)

    def _end_reservation(self, worker: WorkerState) -> None:
        """End a reservation: a suspect has had its turn alone, or will not have it."""
        match worker.reserved_for:
            case Step() as step if not self._is_due_on(worker, step):
                worker.end_reservation()
            case SampleJob() as job:
                is_open = job.request.request_id in self.sampling.jobs
                if not is_open or not (job.pending or worker.sequences_of(job)):
                    worker.end_reservation()
            case _:
                pass  # nobody, or a suspect whose turn has not come

    def _is_due_on(self, worker: WorkerState, step: Step) -> bool:
        """Whether part of the step is on the worker, or comes next."""
        lane = self.training.runs.lanes.get(step.model_id)
        if lane is None or lane.steps.get(step.seq_id) is not step or not worker.has_run(lane.model_id):
            return False
        return step.num_outstanding > 0 or lane.cursor == step.seq_id


def check_room(operation: Sample, base_model: BaseModelInfo) -> None:
    """Raises `InvalidRequest` for a prompt after which nothing can be sampled, unless it is scored."""
    room = base_model.max_context_length - len(operation.prompt) // 4
    if room < (not operation.scores_prompt):
        raise InvalidRequest(f"The prompt fills the model's context of {base_model.max_context_length} tokens.")


def seed_of(request: RequestRecord) -> int:
    """Distinct for each request (equal bodies without a seed must not give equal samples), and the same after a
    restart."""
    return int.from_bytes(hashlib.blake2b(request.request_id.encode(), digest_size=8).digest(), "little") >> 1
