"""What a request passes on its way, when, and what that took."""

import pytest
from prometheus_client import CollectorRegistry

from tests.scheduler.test_scheduler import MODEL, forward_backward, result_of, sample, step, with_model
from tests.support.actor import running
from tx_async.metrics import Metrics
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.instructions import SequenceEnded
from tx_async.scheduler.interface import Passage
from tx_async.scheduler.stations.passages import ENDED_MIN, Passages, kind_of
from tx_async.scheduler.stations.watch import Watch
from tx_async.wire.records import Delete, RequestRecord, ResultRecord
from tx_async.wire.worker import SequenceTimes

STATIONS = ("accepted_at", "durable_at", "begun_at", "ended_at", "published_at", "fetched_at")


def times_of(passage: Passage) -> list[float]:
    return [getattr(passage, name) for name in STATIONS]


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(f"tx_async_{name}", labels)
    assert found is not None
    return found


def request(request_id: str = "r", created_at: float = 0.0) -> RequestRecord:
    return RequestRecord(
        request_id=request_id, owner="o", kind="Sample", subject="s:sample:0", seq_id=1, body_digest="", body_bytes=0,
        created_at=created_at,
    )  # fmt: skip


class TickingClock:
    def __init__(self):
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


async def test_every_station_is_passed_in_order():
    async with running() as server:
        scheduler = await with_model(server)
        submitted = [await scheduler.submit("alice", op) for op in (forward_backward(1), step(2))]
        await scheduler.create_sampler("alice", "s", 0, None, None)
        submitted.append(await scheduler.submit("alice", sample(1)))
        for accepted in submitted:
            await result_of(scheduler, accepted.request_id)
        created, *passages = scheduler.passages("s")
        assert scheduler.passages("another") == []
        newest, before, first = scheduler.requests_of(MODEL, 10)
        registry = scheduler.performer.watch.metrics.registry
    assert [view.request_id for view in (before, newest)] == [passage.request_id for passage in passages[:2]]
    for view, passage in zip((first, before, newest), (created, *passages), strict=False):
        assert view.station == "finished" and view.accepted_at == passage.accepted_at
        assert (view.queued_at or 0, view.sent_at or 0) == (passage.durable_at, passage.begun_at)
    assert created.kind == "create_model" and created.published_at and not created.begun_at  # needs no device
    assert [passage.kind for passage in passages] == ["forward_backward", "optim_step", "sample"]
    assert [passage.request_id for passage in passages] == [accepted.request_id for accepted in submitted]
    for passage in passages:
        assert all(times_of(passage)) and times_of(passage) == sorted(times_of(passage))
        assert passage.worker_id == "w0" and not passage.failed
        assert value(registry, "run_seconds_count", kind=passage.kind) == 1
    assert {passage.subject for passage in passages} == {MODEL, "s:sample:0"}
    assert value(registry, "micro_batch_fill_count") == 1
    assert 0 < value(registry, "micro_batch_fill_sum") < 1


async def test_after_a_restart_the_journal_knows_two_of_them():
    async with running() as server:
        scheduler = await with_model(server)
        done = await scheduler.submit("alice", step(1))
        await result_of(scheduler, done.request_id)
    async with running(server.disk, server.storage) as again:
        _, passage = again.scheduler.passages("s")
    assert passage.request_id == done.request_id
    assert [bool(time) for time in times_of(passage)] == [True, False, False, False, True, False]


def test_first_tokens_and_tokens_are_measured_by_what_the_worker_tells():
    clock, metrics = TickingClock(), Metrics()
    watch = Watch(Catalog(), clock, metrics)
    asked = request(created_at=clock.time)
    watch.accepted(asked)
    clock.time += 10
    times = SequenceTimes(decode_began=1000.0, first_token=2000.0, last_token=5000.0)
    watch.sequence_ended(SequenceEnded(asked, times, num_tokens=8))
    assert value(metrics.registry, "time_to_first_token_seconds_sum") == pytest.approx(7.0)
    assert value(metrics.registry, "time_per_output_token_seconds_sum") == pytest.approx(0.5)
    passage = watch.passages.get("r")
    assert passage is not None and passage.first_token_at == pytest.approx(1007.0)
    unknown = SequenceTimes(decode_began=2000.0, first_token=2000.0, last_token=2000.0)
    watch.sequence_ended(SequenceEnded(asked, unknown, num_tokens=1))
    assert value(metrics.registry, "time_to_first_token_seconds_count") == 2
    assert value(metrics.registry, "time_per_output_token_seconds_count") == 1


def catalog_of(*request_ids: str) -> Catalog:
    return Catalog([request(request_id) for request_id in request_ids])


def test_only_the_newest_that_have_ended_are_remembered():
    passages = Passages(catalog_of("0", "1", "2", "3"), ended_max=2)
    for number in range(4):
        passages.begin(request(str(number)))
    for number in range(3):
        passage = passages.end(str(number))
        assert passage is not None
        passage.published_at = 1.0
    assert [bool(passages.get(str(number))) for number in range(4)] == [False, True, True, True]
    assert passages.end("2") is None and len(passages) == 3


def test_what_is_no_longer_on_record_is_forgotten():
    names = [str(number) for number in range(4 * ENDED_MIN)]
    catalog = catalog_of(*names)
    passages = Passages(catalog)
    for number, name in enumerate(names):
        passages.begin(request(name))
        passages.end(name)
        if 0 < number < len(names) - 1:  # the first stays on record
            catalog.apply([Delete("request", name)])
    assert passages.get(names[0]) and passages.get(names[-1]) and len(passages) <= ENDED_MIN + 2


def test_a_failure_is_seen():
    watch = Watch(Catalog(), TickingClock(), Metrics())
    watch.accepted(request())
    watch.finished(ResultRecord(request_id="r", finished_at=0.0, content="error", payload=b""))
    passage = watch.passages.get("r")
    assert passage is not None and passage.failed


def test_kinds_are_called_as_the_api_does():
    assert [kind_of(name) for name in ("ForwardBackward", "OptimStep", "Sample")] == [
        "forward_backward", "optim_step", "sample",
    ]  # fmt: skip
