"""The actor: what it promises around the journal, with the real journal on a disk in memory."""

import asyncio

import anyio
import anyio.lowlevel
import msgspec
import numpy as np
import pytest

from tests.support.actor import InProcessServer, running
from tests.support.chain_engine import ChainEngine, Storage
from tests.support.simulated_clients import datum
from tests.support.simulation import INFO
from tx_async.config import ServerConfig
from tx_async.errors import (
    Conflict,
    NotReady,
    Overloaded,
    ResultGone,
    SessionGone,
    StorageError,
    UnknownCheckpoint,
    UnknownModel,
    UnknownSampler,
    UnknownSession,
)
from tx_async.scheduler.core.facts import Tick
from tx_async.scheduler.interface import StillPending
from tx_async.scheduler.scheduler import Scheduler
from tx_async.testing.memory_journal import Fault, MemoryDisk
from tx_async.wire.facts import CommandEnded, WorkerLost
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    ForwardBackward,
    OptimStep,
    Sample,
    SaveWeights,
    UnloadModel,
)
from tx_async.wire.records import ResultRecord, SessionRecord
from tx_async.wire.worker import AdamParams, AdapterConfig, CommandFailed

MODEL = "s:train:0"


async def with_model(server: InProcessServer) -> Scheduler:
    scheduler = server.scheduler
    if "s" not in scheduler.sessions:
        await scheduler.create_session(SessionRecord(session_id="s", owner="alice", created_at=1.0))
    await scheduler.submit("alice", create_model())
    return scheduler


def create_model(rank: int = 4) -> CreateModel:
    lora = AdapterConfig(rank=rank)
    return CreateModel(model_id=MODEL, session_id="s", model_seq_id=0, base_model="base", lora=lora)


def step(seq_id: int, rate: float = 1e-4) -> OptimStep:
    return OptimStep(model_id=MODEL, seq_id=seq_id, adam_params=AdamParams(learning_rate=rate))


def forward_backward(seq_id: int) -> ForwardBackward:
    return ForwardBackward(model_id=MODEL, seq_id=seq_id, data=(datum([1, 0, 2]),), loss_fn="cross_entropy")


def sample(seq_id: int, sampler: str = "s:sample:0") -> Sample:
    prompt = np.array([1, 2], np.int32).tobytes()
    return Sample(sampling_session_id=sampler, seq_id=seq_id, prompt=prompt, num_samples=2, max_tokens=4)


async def result_of(scheduler: Scheduler, request_id: str) -> ResultRecord:
    result = await scheduler.retrieve("alice", request_id, 5.0)
    assert isinstance(result, ResultRecord)
    return result


async def test_train_and_sample():
    async with running() as server:
        scheduler = await with_model(server)
        requests = [await scheduler.submit("alice", op) for op in (forward_backward(1), step(2))]
        save = SaveWeights(model_id=MODEL, seq_id=3, kind="sampler_weights", name="a")
        requests.append(await scheduler.submit("alice", save))
        contents = [(await result_of(scheduler, request.request_id)).content for request in requests]
        assert contents == ["forward_backward", "json", "json"]
        await scheduler.create_sampler("alice", "s", 0, None, f"tinker://{MODEL}/sampler_weights/a")
        drawn = await scheduler.submit("alice", sample(1))
        assert len(drawn.sample_sequence_ids) == 2
        assert (await result_of(scheduler, drawn.request_id)).content == "sample"


async def test_an_id_is_told_only_when_the_request_is_durable():
    async with running() as server:
        scheduler = await with_model(server)
        server.driver.faults.append(Fault(delay_s=0.05))
        task = asyncio.ensure_future(scheduler.submit("alice", step(1)))
        await anyio.sleep(0.02)
        assert not task.done() and not server.commands
        request = await task
        assert request.request_id in server.disk.tables["request"]


async def test_a_retry_while_the_commit_is_on_its_way_is_the_same_request():
    async with running() as server:
        scheduler = await with_model(server)
        server.driver.faults.append(Fault(delay_s=0.02))
        first, second = await asyncio.gather(scheduler.submit("alice", step(1)), scheduler.submit("alice", step(1)))
        assert first == second and len(server.disk.tables["request"]) == 2
        with pytest.raises(Conflict):
            await scheduler.submit("alice", step(1, rate=0.5))


async def test_a_client_that_hangs_up_during_the_commit_has_submitted_all_the_same():
    """The web server cancels a handler whose client is gone. The record is durable a moment later, and a retry must
    find it, not make a second one."""
    async with running() as server:
        scheduler = await with_model(server)
        server.driver.faults.append(Fault(delay_s=0.02))
        task = asyncio.ensure_future(scheduler.submit("alice", step(1)))
        await anyio.sleep(0.01)
        task.cancel()
        request = await scheduler.submit("alice", step(1))
        assert (await result_of(scheduler, request.request_id)).content == "json"
        assert len(server.disk.tables["request"]) == 2


async def test_a_disk_error_refuses_the_request_and_leaves_its_place_free():
    async with running() as server:
        scheduler = await with_model(server)
        server.driver.faults.append(Fault(error="disk full"))
        with pytest.raises(StorageError):
            await scheduler.submit("alice", step(1))
        assert len(scheduler.quota) == 0
        request = await scheduler.submit("alice", step(1))
        assert (await result_of(scheduler, request.request_id)).content == "json"


async def test_a_full_disk_delays_results_and_loses_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tx_async.scheduler.outbox.COMMIT_RETRY_S", 0.01)
    async with running() as server:
        scheduler = await with_model(server)
        requests = [await scheduler.submit("alice", op) for op in (forward_backward(1), step(2), step(3))]
        server.driver.faults.extend([Fault(error="disk full")] * 3)
        results = [await result_of(scheduler, request.request_id) for request in requests]
        assert [result.content for result in results] == ["forward_backward", "json", "json"]
        assert set(server.disk.tables["result"]) >= {request.request_id for request in requests}


async def test_what_was_decided_later_stays_later_when_the_disk_comes_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tx_async.scheduler.outbox.COMMIT_RETRY_S", 0.01)
    async with running() as server:
        scheduler = await with_model(server)
        server.driver.faults.append(Fault(error="disk full", delay_s=0.01))
        record = scheduler.sessions["s"]
        first = asyncio.ensure_future(
            scheduler.update_session("alice", msgspec.structs.replace(record, project_id="one"))
        )
        await anyio.sleep(0.005)
        await scheduler.update_session("alice", msgspec.structs.replace(record, project_id="two"))
        await first
    async with running(server.disk) as again:
        assert again.scheduler.sessions["s"].project_id == "two"


async def test_a_restart_finds_everything_that_was_acknowledged():
    disk, storage = MemoryDisk(), Storage()
    async with running(disk, storage) as server:
        scheduler = await with_model(server)
        done = await scheduler.submit("alice", forward_backward(1))
        before = await result_of(scheduler, done.request_id)
        server.is_worker_stuck = True
        waiting = [await scheduler.submit("alice", op) for op in (step(2), forward_backward(3))]
    async with running(disk, storage) as server:
        scheduler = server.scheduler
        assert await result_of(scheduler, done.request_id) == before
        for request in waiting:
            assert (await result_of(scheduler, request.request_id)).content != "error"
        assert await scheduler.submit("alice", step(2)) == waiting[0]


async def test_a_result_that_is_no_longer_in_memory_is_read_from_the_journal():
    async with running(result_cache_bytes=1) as server:
        scheduler = await with_model(server)
        requests = [await scheduler.submit("alice", step(seq_id)) for seq_id in (1, 2, 3)]
        results = [await result_of(scheduler, request.request_id) for request in requests]
        assert len(scheduler.payloads) == 1
        assert [await result_of(scheduler, request.request_id) for request in requests] == results


async def test_a_long_poll_says_when_no_worker_answers_any_more():
    async with running() as server:
        scheduler = await with_model(server)
        server.is_worker_stuck = True
        request = await scheduler.submit("alice", step(1))
        assert await scheduler.retrieve("alice", request.request_id, 0.01) == StillPending()
        (worker_id,) = scheduler.state.workers
        scheduler.silence = lambda: {worker_id: "worker w0.0: silent for 12 s"}
        pending = await scheduler.retrieve("alice", request.request_id, 0.01)
        assert isinstance(pending, StillPending) and pending.queue_state == "paused_capacity"
        assert "silent for 12 s" in (pending.queue_state_reason or "")


async def test_a_long_poll_ends_without_a_result_and_says_what_is_waited_for():
    async with running(worker=False) as server:
        scheduler = await with_model(server)
        request = await scheduler.submit("alice", step(1))
        pending = await scheduler.retrieve("alice", request.request_id, 0.01)
        assert isinstance(pending, StillPending) and pending.queue_state == "paused_capacity"
        server.attach()
        assert (await result_of(scheduler, request.request_id)).content == "json"


async def test_what_belongs_to_somebody_else_does_not_exist():
    async with running() as server:
        scheduler = await with_model(server)
        request = await scheduler.submit("alice", step(1))
        await result_of(scheduler, request.request_id)
        await scheduler.create_sampler("alice", "s", 0, "base", None)
        with pytest.raises(UnknownModel):
            await scheduler.submit("mallory", step(2))
        with pytest.raises(UnknownSampler):
            await scheduler.submit("mallory", sample(1))
        with pytest.raises(UnknownSampler):
            await scheduler.join_sampler("mallory", "s:sample:0")
        with pytest.raises(UnknownSession):
            scheduler.heartbeat("mallory", "s")
        with pytest.raises(UnknownSession):
            await scheduler.submit("mallory", create_model())
        with pytest.raises(ResultGone):
            await scheduler.retrieve("mallory", request.request_id, 0.01)
        await scheduler.cancel("mallory", request.request_id)


async def test_a_full_queue_answers_429_and_admits_again_when_something_has_ended():
    async with running(worker=False, queued_requests_max=2) as server:
        scheduler = await with_model(server)
        first = await scheduler.submit("alice", step(1))
        await scheduler.submit("alice", step(2))
        with pytest.raises(Overloaded):
            await scheduler.submit("alice", step(3))
        assert await scheduler.submit("alice", step(1)) == first
        server.attach()
        await result_of(scheduler, first.request_id)
        await scheduler.submit("alice", step(3))


async def test_a_silent_session_expires_and_comes_back_with_its_next_sign_of_life():
    async with running(worker=False, session_timeout_s=0) as server:
        scheduler = await with_model(server)
        await scheduler.create_sampler("alice", "s", 0, "base", None)
        drawn = await scheduler.submit("alice", sample(1))
        await anyio.sleep(0.01)
        scheduler._sessions.expire()
        assert scheduler.sessions["s"].status == "expired"
        assert (await result_of(scheduler, drawn.request_id)).content == "error"
        await scheduler.submit("alice", step(1))
        assert scheduler.sessions["s"].status == "active"
        scheduler._sessions.expire()
        scheduler.heartbeat("alice", "s")
        assert scheduler.sessions["s"].status == "active"


async def test_the_first_reason_of_a_finished_session_wins():
    async with running() as server:
        scheduler = await with_model(server)
        await scheduler.finish_session("alice", "s", "errored", "boom")
        await scheduler.finish_session("alice", "s", "success", None)
        assert scheduler.sessions["s"].status == "errored"
        with pytest.raises(SessionGone):
            scheduler.heartbeat("alice", "s")
        with pytest.raises(SessionGone):
            other = msgspec.structs.replace(create_model(), model_id="s:train:1", model_seq_id=1)
            await scheduler.submit("alice", other)


async def test_joins_get_different_numbers():
    async with running() as server:
        scheduler = await with_model(server)
        await scheduler.create_sampler("alice", "s", 0, "base", None)
        numbers = await asyncio.gather(*(scheduler.join_sampler("alice", "s:sample:0") for _ in range(5)))
        assert sorted(numbers) == [1, 2, 3, 4, 5]


async def test_creating_a_sampler_again_is_the_same_one_or_a_conflict():
    async with running() as server:
        scheduler = await with_model(server)
        first = await scheduler.create_sampler("alice", "s", 0, "base", None)
        assert await scheduler.create_sampler("alice", "s", 0, "base", None) == first
        with pytest.raises(Conflict):
            await scheduler.create_sampler("alice", "s", 0, None, "tinker://x/weights/y")


async def test_an_unknown_checkpoint_fails_the_future_and_not_the_submit():
    async with running() as server:
        scheduler = await with_model(server)
        operation = CreateModelFromCheckpoint(
            model_id="s:train:1", session_id="s", model_seq_id=1, path="tinker://no/weights/x", optimizer=False
        )
        request = await scheduler.submit("alice", operation)
        assert b"no such checkpoint" in (await result_of(scheduler, request.request_id)).payload


async def test_unload_ends_the_run_for_good():
    disk, storage = MemoryDisk(), Storage()
    async with running(disk, storage) as server:
        scheduler = await with_model(server)
        await result_of(scheduler, (await scheduler.submit("alice", step(1))).request_id)
        unload = await scheduler.submit("alice", UnloadModel(model_id=MODEL))
        assert (await result_of(scheduler, unload.request_id)).content == "json"
        after = await scheduler.submit("alice", step(2))
        assert b"unloaded" in (await result_of(scheduler, after.request_id)).payload
    async with running(disk, storage) as server:
        assert server.scheduler.models[MODEL].status == "unloaded"


async def test_checkpoints_are_changed_copied_and_deleted():
    async with running() as server:
        scheduler = await with_model(server)
        save = await scheduler.submit("alice", SaveWeights(model_id=MODEL, seq_id=1, kind="weights", name="a"))
        await result_of(scheduler, save.request_id)
        path = f"tinker://{MODEL}/weights/a"
        record = scheduler.checkpoints[path]
        await scheduler.update_checkpoint("alice", msgspec.structs.replace(record, public=True, storage_key="evil"))
        assert scheduler.checkpoints[path].public and scheduler.checkpoints[path].storage_key == record.storage_key
        copy = await scheduler.copy_checkpoint("bob", path, "bobs", 0)
        assert await scheduler.copy_checkpoint("bob", path, "bobs", 0) == copy
        await scheduler.delete_checkpoint("alice", path)
        assert record.storage_key in server.storage.files, "the copy needs them"
        with pytest.raises(UnknownCheckpoint):
            await scheduler.delete_checkpoint("alice", path)
        await scheduler.delete_checkpoint("bob", copy.path)
        await anyio.sleep(0.01)
        assert record.storage_key not in server.storage.files


async def test_stopping_snapshots_what_a_restart_would_replay_and_refuses_new_work():
    disk, storage = MemoryDisk(), Storage()
    async with running(disk, storage) as server:
        scheduler = await with_model(server)
        requests = [await scheduler.submit("alice", op) for op in (forward_backward(1), step(2), forward_backward(3))]
        await scheduler.stop(5.0)
        for request in requests[:1]:
            assert (await result_of(scheduler, request.request_id)).content == "forward_backward"
        with pytest.raises(NotReady):
            await scheduler.submit("alice", step(4))
        assert scheduler.models[MODEL].snapshots
    async with running(disk, storage) as server:
        last = await server.scheduler.submit("alice", step(4))
        assert (await result_of(server.scheduler, last.request_id)).content == "json"
        replayed = sum(type(command).__name__ == "TrainMicroBatch" for command in server.commands)
        assert replayed <= 2


async def test_stopping_ends_in_time_although_the_worker_is_stuck():
    async with running() as server:
        scheduler = await with_model(server)
        server.is_worker_stuck = True
        await scheduler.submit("alice", forward_backward(1))
        with anyio.fail_after(2):
            await scheduler.stop(0.1)


async def test_a_fatal_failure_is_the_worker_s_and_not_the_request_s():
    """The engine cannot vouch for its state: the worker starts again, and the request with it."""
    async with running() as server:
        scheduler = await with_model(server)
        server.is_worker_stuck = True
        request = await scheduler.submit("alice", forward_backward(1))
        failed = CommandFailed(number=server.numbers, category="server", message="device lost", fatal=True)
        scheduler.tell(CommandEnded("w0", failed))
        scheduler.tell(WorkerLost("w0", "device lost"))
        server.is_worker_stuck = False
        server.engine = ChainEngine(INFO, server.storage)
        server.attach()
        assert (await result_of(scheduler, request.request_id)).content == "forward_backward"


async def test_a_journal_that_another_server_has_taken_over_ends_this_one():
    from tx_async.errors import LeaseHeld
    from tx_async.journal.lease import Holder

    server = InProcessServer(MemoryDisk(), Storage(), ServerConfig())
    await server.open()
    with pytest.raises(BaseExceptionGroup) as failure:
        async with anyio.create_task_group() as group:
            group.start_soon(server.scheduler.run)
            group.start_soon(server.journal.run)
            await with_model(server)
            server.driver.steal(Holder.this_process())
            await anyio.sleep(5)
    assert failure.group_contains(LeaseHeld)
    await server.journal.close()


async def test_statistics_and_repr_tell_an_operator_what_is_going_on():
    async with running() as server:
        scheduler = await with_model(server)
        await result_of(scheduler, (await scheduler.submit("alice", step(1))).request_id)
        numbers = scheduler.statistics()
        assert (numbers.models, numbers.requests_unfinished, numbers.workers_ready) == (1, 0, 1)
        assert repr(scheduler).startswith("<Scheduler [Requests: 0 runs ready")


async def test_a_submission_that_was_refused_for_now_is_not_taken_for_burned():
    """The disk is full for the one that is missing: its client tries again, and what follows waits for it."""
    async with running() as server:
        scheduler = await with_model(server)
        later = await scheduler.submit("alice", step(2))
        lane = scheduler.state.training.runs.lanes[MODEL]
        lane.heard_at -= 1_000
        server.driver.faults.append(Fault(error="disk full"))
        with pytest.raises(StorageError):
            await scheduler.submit("alice", step(1))
        scheduler.state.handle(Tick(), scheduler.clock.now())
        first = await scheduler.submit("alice", step(1))
        for request in (first, later):
            result = await scheduler.retrieve("alice", request.request_id, 5.0)
            assert isinstance(result, ResultRecord) and result.content == "json"
