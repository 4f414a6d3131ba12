"""What a key may make that stays, and what becomes of a client that has gone."""

import pytest

from tests.support.actor import running
from tests.support.simulated_clients import datum
from tx_async.errors import Conflict, Overloaded
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.scheduler import Scheduler
from tx_async.wire.operations import CreateModel, ForwardBackward, Sample, SaveWeights
from tx_async.wire.records import Delete, Put, SessionRecord
from tx_async.wire.worker import AdapterConfig


def session(name: str, owner: str = "alice", text: str = "") -> SessionRecord:
    return SessionRecord(session_id=name, owner=owner, created_at=1.0, display_name=text)


def create_model(number: int = 0, text: str = "") -> CreateModel:
    return CreateModel(
        model_id=f"s:train:{number}",
        session_id="s",
        model_seq_id=number,
        base_model="base",
        lora=AdapterConfig(rank=4),
        user_metadata={"text": text},
    )


def test_what_a_key_holds_is_counted_once_and_given_back():
    catalog = Catalog([session("a"), session("b", text="x" * 100)])
    catalog.apply([Put(session("b", text="x" * 50)), Put(session("c", "bob"))])
    assert catalog.holdings.numbers == {("alice", "session"): 2, ("bob", "session"): 1}
    assert catalog.holdings.num_bytes["alice"] > 100
    catalog.apply([Delete("session", name) for name in "abca"])
    assert not catalog.holdings.numbers and not catalog.holdings.num_bytes


async def test_sessions_models_and_samplers_are_bounded_for_each_key_and_by_name():
    async with running(tenant_sessions_max=2, tenant_models_max=1, tenant_samplers_max=1) as server:
        scheduler = server.scheduler
        for name in ("s", "t"):
            await scheduler.create_session(session(name))
        with pytest.raises(Overloaded, match="tenant_sessions_max"):
            await scheduler.create_session(session("u"))
        await scheduler.create_session(session("v", "bob"))
        await scheduler.submit("alice", create_model())
        await scheduler.submit("alice", create_model())  # a retry is nothing new
        with pytest.raises(Overloaded, match="tenant_models_max"):
            await scheduler.submit("alice", create_model(1))
        for _ in range(2):
            await scheduler.create_sampler("alice", "s", 0, "base", None)
        with pytest.raises(Overloaded, match="tenant_samplers_max"):
            await scheduler.create_sampler("alice", "s", 1, "base", None)


async def test_the_bytes_of_all_of_them_are_bounded_together():
    async with running(tenant_records_bytes_max=3000) as server:
        scheduler = server.scheduler
        await scheduler.create_session(session("s", text="x" * 1000))
        with pytest.raises(Overloaded, match="tenant_records_bytes_max"):
            await scheduler.submit("alice", create_model(text="x" * 2000))
        await scheduler.submit("alice", create_model(text="x" * 1000))


async def test_a_copy_never_takes_the_place_of_a_run():
    async with running() as server:
        scheduler = server.scheduler
        await scheduler.create_session(session("s"))
        await scheduler.submit("alice", create_model())
        save = SaveWeights(model_id="s:train:0", seq_id=1, kind="weights", name="a")
        request = await scheduler.submit("alice", save)
        await scheduler.retrieve("alice", request.request_id, 5)
        await scheduler.submit("alice", create_model(1))
        with pytest.raises(Conflict, match="s:train:1 is a training run"):
            await scheduler.copy_checkpoint("alice", "tinker://s:train:0/weights/a", "s", 1)
        assert scheduler.models["s:train:1"].status == "live"
        for _ in range(2):
            copy = await scheduler.copy_checkpoint("alice", "tinker://s:train:0/weights/a", "s", 2)
            assert copy.model_id == "s:train:2"
        save = SaveWeights(model_id="s:train:1", seq_id=1, kind="weights", name="a")
        request = await scheduler.submit("alice", save)
        await scheduler.retrieve("alice", request.request_id, 5)
        with pytest.raises(Conflict, match="s:train:1 is a training run"):  # not its own checkpoint of that name
            await scheduler.copy_checkpoint("alice", "tinker://s:train:0/weights/a", "s", 1)
        with pytest.raises(Conflict, match="a copy of another checkpoint"):
            await scheduler.copy_checkpoint("alice", "tinker://s:train:1/weights/a", "s", 2)
        batch = ForwardBackward(model_id="s:train:1", seq_id=2, data=(datum([1, 2, 3]),), loss_fn="cross_entropy")
        trained = await scheduler.submit("alice", batch)
        assert (await scheduler.retrieve("alice", trained.request_id, 5)).content == "forward_backward"  # type: ignore[union-attr]


async def test_the_samples_of_a_client_that_was_killed_end_after_missed_heartbeats(monkeypatch: pytest.MonkeyPatch):
    async with running(worker=False, heartbeat_timeout_s=60, session_timeout_s=600) as server:
        scheduler: Scheduler = server.scheduler
        for name in ("s", "idle"):
            await scheduler.create_session(session(name))
        sampler = await scheduler.create_sampler("alice", "s", 0, "base", None)
        sample = Sample(sampling_session_id=sampler.sampler_id, seq_id=1, prompt=b"\1\0\0\0", max_tokens=2)
        request = await scheduler.submit("alice", sample)
        now = scheduler.clock.monotonic()
        monkeypatch.setattr(scheduler.clock, "monotonic", lambda: now)

        def pass_in_silence(seconds: int) -> None:
            nonlocal now
            for _ in range(seconds):
                now += 1
                scheduler._sessions.expire()

        for _ in range(3):  # it polls, and so it is there
            pass_in_silence(50)
            await scheduler.retrieve("alice", request.request_id, 0.001)
        now += 1000  # this process was stopped, and could hear nobody
        pass_in_silence(50)
        assert scheduler.state.sampling.jobs
        pass_in_silence(12)
        assert not scheduler.state.sampling.jobs
        assert scheduler.sessions["s"].status == "expired" and scheduler.sessions["idle"].status == "active"
