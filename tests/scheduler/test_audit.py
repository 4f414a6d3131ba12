"""The audit log: an event for what happens to a run or a checkpoint, in the commit that makes it so."""

import anyio
import anyio.lowlevel
import msgspec
import pytest

from tests.support.actor import InProcessServer, running
from tx_async.errors import StorageError
from tx_async.scheduler.core.audit import AuditLog
from tx_async.scheduler.core.catalog import Catalog
from tx_async.testing.memory_journal import Fault, MemoryDisk
from tx_async.wire.operations import CreateModel, SaveWeights, UnloadModel
from tx_async.wire.records import CheckpointRecord, Delete, Put, SessionRecord, decode_record
from tx_async.wire.worker import AdapterConfig

RUN = "s:train:0"
PATH = f"tinker://{RUN}/weights/a"


async def done(server: InProcessServer, operation) -> None:
    request = await server.scheduler.submit("alice", operation)
    await server.scheduler.retrieve("alice", request.request_id, 5.0)


async def make_run(server: InProcessServer) -> None:
    await server.scheduler.create_session(SessionRecord(session_id="s", owner="alice", created_at=1.0))
    lora = AdapterConfig(rank=4)
    await done(server, CreateModel(model_id=RUN, session_id="s", model_seq_id=0, base_model="base", lora=lora))


async def durable(server: InProcessServer) -> None:
    while len(server.scheduler.performer.outbox):
        await anyio.lowlevel.checkpoint()


def on_disk(disk: MemoryDisk) -> list[tuple[str, str, str]]:
    """(event, what it is about, who)"""
    events = [decode_record(data) for data in disk.tables["audit"].values()]
    return [(event.event, event.subject, event.owner) for event in events]


async def test_who_did_what_to_which_run_and_checkpoint():
    disk = MemoryDisk()
    async with running(disk) as server:
        scheduler = server.scheduler
        await make_run(server)
        await done(server, SaveWeights(model_id=RUN, seq_id=1, kind="weights", name="a"))
        await done(server, SaveWeights(model_id=RUN, seq_id=2, kind="weights", name="a", overwrite=True))
        checkpoint = scheduler.checkpoints[PATH]
        await scheduler.update_checkpoint("alice", msgspec.structs.replace(checkpoint, public=True))
        copy = await scheduler.copy_checkpoint("bob", PATH, "bobs", 0)
        await scheduler.update_checkpoint("alice", checkpoint)
        await scheduler.update_checkpoint("alice", msgspec.structs.replace(checkpoint, expires_at=9e9))
        await scheduler.delete_checkpoint("alice", PATH)
        await done(server, UnloadModel(model_id=RUN))
        scheduler.note("key.added", "carol", role="admin")
        await durable(server)
    assert on_disk(disk) == [
        ("run.created", RUN, "alice"),
        ("checkpoint.saved", PATH, "alice"),
        ("checkpoint.saved", PATH, "alice"),
        ("checkpoint.published", PATH, "alice"),
        ("run.created", "bobs:train:0", "bob"),
        ("checkpoint.copied", copy.path, "bob"),
        ("checkpoint.unpublished", PATH, "alice"),
        ("checkpoint.ttl_set", PATH, "alice"),
        ("checkpoint.deleted", PATH, "alice"),
        ("run.unloaded", RUN, "alice"),
        ("key.added", "carol", ""),
    ]


async def test_what_did_not_become_durable_is_no_event():
    disk = MemoryDisk()
    async with running(disk) as server:
        await server.scheduler.create_session(SessionRecord(session_id="s", owner="alice", created_at=1.0))
        server.driver.faults.append(Fault(error="disk full"))
        lora = AdapterConfig(rank=4)
        with pytest.raises(StorageError):
            await done(server, CreateModel(model_id=RUN, session_id="s", model_seq_id=0, base_model="base", lora=lora))
        assert server.scheduler.audits == {}
        await done(server, CreateModel(model_id=RUN, session_id="s", model_seq_id=0, base_model="base", lora=lora))
    assert on_disk(disk) == [("run.created", RUN, "alice")]


async def test_the_newest_events_are_kept_and_a_restart_counts_on():
    disk = MemoryDisk()
    async with running(disk, audit_events_max=3) as server:
        for i in range(5):
            server.scheduler.note("key.added", f"k{i}")
        await durable(server)
    async with running(disk, audit_events_max=3) as server:
        assert [event.subject for event in server.scheduler.audits.values()] == ["k2", "k3", "k4"]
        server.scheduler.note("key.added", "k5")
        await durable(server)
    assert list(disk.tables["audit"]) == [f"{i:012d} key.added k{i}" for i in (3, 4, 5)]


def test_a_checkpoint_whose_time_is_over_has_expired():
    lora = AdapterConfig(rank=4)
    record = CheckpointRecord(
        path=PATH, model_id=RUN, owner="alice", kind="weights", name="a", storage_key="k", base_model="base", lora=lora,
        created_at=1.0, size_bytes=1, expires_at=5.0,
    )  # fmt: skip
    log = AuditLog(Catalog([record]))
    delete, event = log.audited([Delete("checkpoint", PATH)], now=5.0)
    assert delete == Delete("checkpoint", PATH)
    assert isinstance(event, Put) and event.record.event == "checkpoint.expired"  # type: ignore[union-attr]
    assert log.audited([Put(record)], now=5.0) == (Put(record),), "nothing has changed"
