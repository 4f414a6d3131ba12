"""A view of the machine for somebody who watches: read from its state, never a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.core.worker_state import WorkerState
from tx_async.scheduler.interface import Passage
from tx_async.scheduler.training.lanes import Step
from tx_async.wire.dashboard import Overview, QueueView, RequestView, RunState, RunView, Station, WorkerView, mean_loss
from tx_async.wire.records import ModelRecord, RequestRecord

GAPS_MAX = 1000
"""How many numbers without a request are passed over in the search for the newest requests: pages ask often, so nobody
looks through all requests of the server for them."""
PassageOf = Callable[[str], Passage | None]


def overview(state: SchedulerState, requests: Mapping[str, int], samples: Mapping[str, int]) -> Overview:
    """requests, samples: how many unfinished ones each key has."""
    return Overview(
        workers=tuple(map(_worker, state.workers.values())),
        queues=tuple(QueueView(owner=key, requests=n, samples=samples.get(key, 0)) for key, n in requests.items()),
        operations_to_replay=state.training.runs.num_replays,
        train_tokens=state.training.micro_batches.num_tokens,
        sample_tokens=state.sampling.num_tokens,
        train_ms=state.busy_ms["train"],
        sample_ms=state.busy_ms["sample"],
    )


def _worker(worker: WorkerState) -> WorkerView:
    info = worker.info
    return WorkerView(
        worker_id=worker.worker_id,
        platform=info.platform,
        num_devices=info.num_devices,
        capabilities=tuple(sorted(worker.capabilities)),
        commands_in_flight=len(worker.in_flight),
        sequences=len(worker.sequences),
        sequences_max=info.num_sequences_max,
        training_slots=len(worker.training_slots),
        training_slots_max=info.num_training_slots,
        sampler_slots=len(worker.sampler_slots),
        sampler_slots_max=info.num_sampler_slots,
        memory=tuple((part.name, part.num_bytes, part.note) for part in info.memory),
        is_on_trial=worker.is_on_trial,
    )


def run_view(state: SchedulerState, model: ModelRecord) -> RunView:
    newest = state.catalog.histories.newest_row(model.model_id) or {}
    return RunView(state=_state_of(state, model), num_steps=int(newest.get("index", -1)) + 1, loss=mean_loss(newest))


def _state_of(state: SchedulerState, model: ModelRecord) -> RunState:
    lane = state.training.runs.lanes.get(model.model_id)
    if lane is None:
        return model.status if model.status != "live" else "idle"
    if any(step.num_outstanding and not step.finished for step in lane.steps.values()):
        return "running"
    return "queued" if any(not step.finished for step in lane.steps.values()) else "idle"


def requests_of(state: SchedulerState, model_id: str, limit: int, passage_of: PassageOf) -> list[RequestView]:
    """The requests of one run, newest first. passage_of: a request's passage, where one is remembered."""
    catalog = state.catalog
    lane = state.training.runs.lanes.get(model_id)
    steps = lane.steps if lane else {}
    model = catalog.models.get(model_id)
    newest = lane.newest_seq_id if lane else model.newest_seq_id if model else 0
    numbers = range(newest, max(-1, newest - GAPS_MAX - limit), -1)
    ids = filter(None, (catalog.request_ids.get((model_id, number)) for number in numbers))
    known = [catalog.requests[request_id] for request_id in islice(ids, limit)]
    return [_request(catalog, record, steps, passage_of(record.request_id)) for record in known]


def _request(
    catalog: Catalog, record: RequestRecord, steps: Mapping[int, Step], passage: Passage | None
) -> RequestView:
    result, step = catalog.results.get(record.request_id), steps.get(record.seq_id)
    station: Station = "queued"
    if result is not None:
        station = "failed" if result.failed else "finished"
    elif step is not None and (step.num_outstanding or step.is_sent):
        station = "sent"
    return RequestView(
        request_id=record.request_id,
        seq_id=record.seq_id,
        kind=record.kind,
        station=station,
        accepted_at=record.created_at,
        queued_at=(passage and passage.durable_at) or None,
        sent_at=(passage and passage.begun_at) or None,
        finished_at=((passage and passage.published_at) or result.finished_at) if result else None,
        body_bytes=record.body_bytes,
    )
