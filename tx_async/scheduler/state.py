"""The scheduler's mind: facts in, instructions out. No I/O, no clock, no await; mutated through `handle` only.

A worker always has up to `quanta_in_flight_max` quanta ahead. A quantum is a train micro-batch or a few decode steps;
between any two of them anything else may come: that is how training and sampling, and all tenants, share one device.
"""

from __future__ import annotations

import hashlib

from tx_async.errors import TxError, UnknownCheckpoint
from tx_async.scheduler.catalog import Catalog
from tx_async.scheduler.events import (
    BodyLoaded,
    CommandFailed,
    CommandFinished,
    Fact,
    FetchBody,
    Finish,
    Instruction,
    RequestAccepted,
    RequestCancelled,
    Tick,
    WorkerLost,
    WorkerReady,
)
from tx_async.scheduler.fairness import Shares
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.scheduler.lanes import Lane
from tx_async.scheduler.policy import Policy
from tx_async.scheduler.rollouts import BASE_NAMESPACE, AdmissionSent, QuantumSent, Rollouts, SamplerSent
from tx_async.scheduler.sampling import SampleJob
from tx_async.scheduler.training import BaseSent, RowsSent, SnapshotSent, StepSent, Training
from tx_async.scheduler.worker_state import WorkerState
from tx_async.wire import results
from tx_async.wire.operations import Operation, Sample
from tx_async.wire.records import DropBody, RequestRecord, ResultRecord
from tx_async.wire.results import Failure


class SchedulerState:
    def __init__(self, catalog: Catalog, base_model: BaseModelInfo, policy: Policy, now: float = 0.0):
        self.catalog = catalog
        self.base_model = base_model
        self.policy = policy
        self.now = now
        self.out: list[Instruction] = []
        #: attached and ready workers, in order of attachment
        self.workers: dict[str, WorkerState] = {}
        self.training = Training(catalog, policy, self, self.out, self.workers_of)
        self.rollouts = Rollouts(self, self.out)
        self.shares = Shares({"train": policy.train_share, "sample": policy.sample_share})
        #: samples that were accepted before a restart and whose bodies are being read
        self.restoring: set[str] = set()

    def __repr__(self) -> str:
        running = sum(len(worker.in_flight) for worker in self.workers.values())
        resident = sum(len(worker.training_slots) for worker in self.workers.values())
        return (
            f"<Scheduler [Requests: {len(self.training.ready)} runs ready, {len(self.rollouts.jobs)} samples open | "
            f"Commands: {running} running | Adapters: {resident} resident of {len(self.training.lanes)} | "
            f"Workers: {len(self.workers)} ready]>"
        )

    def restore(self) -> list[Instruction]:
        """Take up what the journal holds: called once, before the first fact."""
        self.training.restore()
        for request in self.catalog.requests.values():
            if request.kind == Sample.__name__ and request.request_id not in self.catalog.results:
                self.restoring.add(request.request_id)
                self.out.append(FetchBody(request.request_id))
        return self._drain()

    def handle(self, fact: Fact, now: float) -> list[Instruction]:
        self.now = now
        match fact:
            case RequestAccepted():
                self._accept(fact.request, fact.operation)
            case RequestCancelled():
                self.rollouts.cancel(list(self.workers.values()), fact.request_id)
            case WorkerReady():
                self.workers[fact.worker_id] = WorkerState(fact.worker_id, fact.info, fact.capabilities)
            case WorkerLost():
                self._worker_lost(fact.worker_id)
            case CommandFinished() | CommandFailed():
                self._answered(fact)
            case BodyLoaded():
                self._body_loaded(fact)
            case Tick():
                self._tick()
        for worker in self.workers.values():
            self._advance(worker)
        return self._drain()

    def workers_of(self, lane: Lane) -> list[WorkerState]:
        return [w for w in self.workers.values() if lane.model.model_id in w.training_slots]

    def request_shutdown(self, now: float) -> tuple[list[Instruction], bool]:
        """Snapshot every run that is worth it. The flag: some snapshots are still on their way."""
        self.now = now
        trainer = self._trainer()
        pending = self.training.snapshot_all(trainer) if trainer else False
        return self._drain(), pending

    def unload(self, model_id: str, error: TxError, now: float) -> list[Instruction]:
        """Forget a run; what is still queued for it fails with `error`."""
        self.now = now
        if lane := self.training.lanes.get(model_id):
            self.training.abandon(lane, error, ())
        return self._drain()

    def _drain(self) -> list[Instruction]:
        out = list(self.out)
        self.out.clear()
        return out

    # ---- facts

    def _accept(self, request: RequestRecord, operation: Operation) -> None:
        if isinstance(operation, Sample):
            self._accept_sample(request, operation)
        else:
            self.training.accept(self.training.lanes[request.subject], request, operation)

    def _accept_sample(self, request: RequestRecord, operation: Sample) -> None:
        sampler = self.catalog.samplers.get(operation.sampling_session_id)
        if sampler is None:
            error = UnknownCheckpoint("The sampling session of this request has ended.")
            payload = results.encode_json(Failure.of(error))
            record = ResultRecord(request_id=request.request_id, finished_at=self.now, content="error", payload=payload)
            self.out.append(Finish(record, (DropBody(request.request_id),)))
            return
        num_prompt_tokens = len(operation.prompt) // 4
        room = self.base_model.max_context_length - num_prompt_tokens
        eos = self.base_model.eos_token_ids if operation.use_eos else ()
        job = SampleJob(
            request=request,
            operation=operation,
            flow=sampler.session_id,
            version=sampler.storage_key,
            namespace=sampler.storage_key or BASE_NAMESPACE,
            # A seed that nobody asked for still has to survive a restart: it is the request's own.
            seed=operation.seed if operation.seed is not None else seed_of(request),
            max_tokens=min(operation.max_tokens or room, room),
            stop_token_ids=tuple(dict.fromkeys((*operation.stop_token_ids, *eos))),
            pending=list(range(operation.num_samples))[::-1],
        )
        self.rollouts.accept(job)

    def _worker_lost(self, worker_id: str) -> None:
        worker = self.workers.pop(worker_id, None)
        if worker is None:
            return
        self.rollouts.worker_lost(worker)
        if "train" in worker.capabilities:
            self.training.worker_lost()

    def _answered(self, fact: CommandFinished | CommandFailed) -> None:
        worker = self.workers.get(fact.worker_id)
        if worker is None or fact.number not in worker.in_flight:
            return
        answer = worker.answered(fact.number)
        training = isinstance(answer, RowsSent | StepSent | BaseSent | SnapshotSent)
        sampling = isinstance(answer, QuantumSent | SamplerSent | AdmissionSent)
        if isinstance(fact, CommandFinished):
            if getattr(answer, "is_quantum", False):
                self.shares.charge("train" if training else "sample", fact.elapsed_ms)
            if training:
                self.training.finished(answer, fact)
            elif sampling:
                self.rollouts.finished(worker, answer, fact)
        elif training:
            self.training.failed(answer, fact)
        elif sampling:
            self.rollouts.failed(worker, answer, fact)

    def _body_loaded(self, fact: BodyLoaded) -> None:
        request = self.catalog.requests.get(fact.request_id)
        if request is None:
            return
        if request.request_id in self.restoring:
            self.restoring.discard(request.request_id)
            if isinstance(fact.operation, Sample):
                self._accept_sample(request, fact.operation)
        else:
            self.training.body_loaded(request, fact.operation)

    def _tick(self) -> None:
        self.training.burn_gaps()
        if trainer := self._trainer():
            self.training.snapshot_all(trainer, idle_since=self.now - self.policy.snapshot_idle_s)

    # ---- deciding what runs next

    def _trainer(self) -> WorkerState | None:
        """The worker that trains: one mesh has all training state."""
        return next((worker for worker in self.workers.values() if "train" in worker.capabilities), None)

    def _advance(self, worker: WorkerState) -> None:
        trains = worker is self._trainer()
        samples = "sample" in worker.capabilities

        def has_work(name: str) -> bool:
            return (
                (trains and self.training.has_work) if name == "train" else (samples and self.rollouts.has_work(worker))
            )

        while worker.num_quanta < self.policy.quanta_in_flight_max:
            issued = False
            for name in self.shares.order(has_work):
                issued = self.training.issue(worker) if name == "train" else self.rollouts.issue(worker)
                if issued:
                    break
            if not issued:
                return


def seed_of(request: RequestRecord) -> int:
    """Distinct for each request (equal bodies without a seed must not give equal samples), and the same after a
    restart."""
    return int.from_bytes(hashlib.blake2b(request.request_id.encode(), digest_size=8).digest(), "little") >> 1
