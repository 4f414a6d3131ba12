"""Which worker samples which job, where several can.

A sequence that an external engine's worker can take goes there, because the engine that trains has other work.
Everything else, and everything while there is no such worker, goes to workers that score. Among several external
engines, an adapter version goes where it already is, unless that engine has much more to do than another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tx_async.scheduler.core.fairness import Flow
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.scheduler.sampling.jobs import SampleJob
from tx_async.wire.worker import GREEDY_BELOW

SPREAD = 4
"""A version stays with the engine that has it, unless that engine runs more sequences than the least busy one by over
one in SPREAD of its places."""
DESERTIONS_MAX = 3
"""A job that was running when this many external engines went away goes to another kind of worker."""


class Place(NamedTuple):
    """Jobs with equal places can run on the same workers and wait in one line."""

    version: str | None
    runs_alone: bool
    scoring: frozenset[str]
    """The workers that can take its sample with prompt scores; empty when that sample does not wait."""
    plain: frozenset[str]
    """The workers that can take its other samples; empty when none waits."""

    @property
    def is_nowhere(self) -> bool:
        return not (self.scoring or self.plain)


def place_of(job: SampleJob, workers: Mapping[str, WorkerState]) -> Place:
    scoring, plain = job.waiting_kinds
    return Place(
        version=job.version,
        runs_alone=job.runs_alone,
        scoring=_candidates(job, workers, scores=True) if scoring else frozenset(),
        plain=_candidates(job, workers, scores=False) if plain else frozenset(),
    )


def _candidates(job: SampleJob, workers: Mapping[str, WorkerState], scores: bool) -> frozenset[str]:
    """The workers that it may go to: external ones where any can take it, else the others."""
    able = [worker for worker in workers.values() if not why_unable(worker, job, scores)]
    external = [worker for worker in able if worker.is_external]
    return frozenset(worker.worker_id for worker in external or able)


def why_unable(worker: WorkerState, job: SampleJob, scores: bool) -> str:
    """Why this worker cannot take a sample of this job; "" when it can."""
    op, limits = job.operation, worker.info.limits
    if "sample" not in worker.capabilities:
        return "it does not sample"
    if scores and not worker.scores:
        return "it does not score prompts"
    if worker.is_on_trial:
        return "its log-probabilities have not been compared yet"
    if worker.is_external and (job.runs_alone or job.num_desertions >= DESERTIONS_MAX):
        return "this request may have brought down workers"
    if reason := job.declined_by.get(worker.worker_id) or worker.refused_versions.get(job.version or ""):
        return reason
    if len(op.prompt) // 4 + job.max_tokens > worker.info.max_context_length:
        return f"its context has {worker.info.max_context_length} tokens"
    if worker.is_external and op.grammar:
        return "it knows no grammars"
    if limits is None:
        return ""
    if op.temperature > limits.temperature_max or GREEDY_BELOW <= op.temperature < limits.temperature_min:
        return f"it does not sample at temperature {op.temperature}"
    if op.topk_sample_logprobs > limits.topk_logprobs_max:
        return f"it returns at most {limits.topk_logprobs_max} candidates"
    if job.head_tokens and not _candidates_tell(job, limits.topk_logprobs_max):
        return "it does not tell what the sampler could draw"
    if len(op.stop_strings) > limits.stop_strings_max:
        return f"it takes at most {limits.stop_strings_max} stop strings"
    return ""


def _candidates_tell(job: SampleJob, candidates_max: int) -> bool:
    """Whether candidates tell what the sampler could draw: they are the plain model's, and say nothing of other
    distributions."""
    op = job.operation
    is_plain = op.temperature == 1.0 and op.top_p >= 1.0 and op.top_k < 1
    return is_plain and job.head_tokens <= candidates_max


def chosen(names: frozenset[str], version: str | None, workers: Mapping[str, WorkerState]) -> str | None:
    """The external worker that takes the next sample of a version; None when all are full."""
    free = [worker for name in sorted(names) if (worker := workers[name]).has_room]
    if not free:
        return None
    least = min(len(worker.sequences) for worker in free)
    holders = [worker for worker in free if version is None or version in worker.sampler_slots]
    near = [worker for worker in holders if len(worker.sequences) <= least + worker.info.num_sequences_max // SPREAD]
    return min(near or free, key=lambda worker: len(worker.sequences)).worker_id


class Lines:
    """Jobs with samples that wait for admission: each flow has a line for each place, oldest first."""

    def __init__(self, workers: Mapping[str, WorkerState]):
        #: the scheduler's, only read here
        self.workers = workers
        #: flow -> place -> request_id -> job; no mapping in it is empty
        self._lines: dict[Flow, dict[Place, dict[str, SampleJob]]] = {}
        #: request_id -> where the job stands
        self._places: dict[str, Place] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[Flow]:
        """The flows that have jobs in line."""
        return iter(self._lines)

    def __contains__(self, flow: Flow) -> bool:
        return flow in self._lines

    def place(self, request_id: str) -> Place | None:
        return self._places.get(request_id)

    def put(self, job: SampleJob) -> None:
        """Put a job in its right line, or out of line when nothing of it waits. Its turn stays as it was."""
        request_id = job.request.request_id
        place = place_of(job, self.workers) if job.pending else None
        if place == self._places.get(request_id):
            return
        self.remove(job)
        if place is not None:
            self._places[request_id] = place
            self._lines.setdefault(job.flow, {}).setdefault(place, {})[request_id] = job

    def remove(self, job: SampleJob) -> None:
        place = self._places.pop(job.request.request_id, None)
        if place is None:
            return
        lines = self._lines[job.flow]
        del lines[place][job.request.request_id]
        if not lines[place]:
            del lines[place]
        if not lines:
            del self._lines[job.flow]

    def sort_again(self) -> None:
        """Sort all jobs again: workers have come or gone, or what they can take has changed."""
        for job in [job for lines in self._lines.values() for line in lines.values() for job in line.values()]:
            self.put(job)

    def offers(self, worker: WorkerState) -> bool:
        """Whether a job waits that this worker may take."""
        return bool(self._lines) and any(
            worker.worker_id in place.scoring or worker.worker_id in place.plain
            for lines in self._lines.values()
            for place in lines
        )

    def heads(self, flow: Flow, worker: WorkerState) -> Iterable[SampleJob]:
        """The oldest job of each line that this worker may serve, oldest first."""
        lines = self._lines.get(flow, {})
        heads = [next(iter(line.values())) for place, line in lines.items() if self._is_turn(worker, place)]
        return sorted(heads, key=lambda job: job.order)

    def _is_turn(self, worker: WorkerState, place: Place) -> bool:
        return self.may_take(worker, place, scores=True) or self.may_take(worker, place, scores=False)

    def may_take(self, worker: WorkerState, place: Place, scores: bool) -> bool:
        names = place.scoring if scores else place.plain
        if worker.worker_id not in names:
            return False
        return not worker.is_external or chosen(names, place.version, self.workers) == worker.worker_id
