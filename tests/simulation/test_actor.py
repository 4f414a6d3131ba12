"""The real actor and the real journal through crashes at random moments: everything acknowledged ends, with the results
of a run that was never interrupted."""

import asyncio
import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.support.actor import InProcessServer, running
from tests.support.chain_engine import Adapter, Storage
from tests.support.simulated_clients import datum
from tx_async.errors import NotReady, Overloaded, StorageError
from tx_async.testing.memory_journal import Fault, MemoryDisk
from tx_async.wire.operations import CreateModel, ForwardBackward, Operation, OptimStep
from tx_async.wire.records import ResultRecord, SessionRecord
from tx_async.wire.worker import AdamParams, AdapterConfig

SEEDS = 25
STEPS = 12
RUNS = ("s:train:0", "s:train:1", "s:train:2")
SETTINGS: dict[str, Any] = {"snapshot_every_steps": 3}


def operations_of(model: str) -> list[Operation]:
    run = RUNS.index(model)
    operations: list[Operation] = []
    for i in range(STEPS):
        data = (datum([1 + i, run, 3]), datum([2 + i, run]))
        operations.append(ForwardBackward(model_id=model, seq_id=2 * i + 1, data=data, loss_fn="cross_entropy"))
        operations.append(OptimStep(model_id=model, seq_id=2 * i + 2, adam_params=AdamParams()))
    return operations


class Clients:
    """They survive the server: what was acknowledged to them, and what they were told."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.acknowledged: dict[tuple[str, int], str] = {}
        self.results: dict[str, ResultRecord] = {}

    async def run(self, server: InProcessServer) -> None:
        """Until everything has been sent and answered; or the server dies."""
        scheduler = server.scheduler
        if "s" not in scheduler.sessions:
            await scheduler.create_session(SessionRecord(session_id="s", owner="alice", created_at=1.0))
        for number, model in enumerate(RUNS):
            lora = AdapterConfig(rank=4, seed=number)
            await scheduler.submit(
                "alice",
                CreateModel(model_id=model, session_id="s", model_seq_id=number, base_model="base", lora=lora),
            )
        await asyncio.gather(*(self._drive(server, model) for model in RUNS))

    async def _drive(self, server: InProcessServer, model: str) -> None:
        operations = operations_of(model)
        self.random.shuffle(operations)
        for operation in operations:
            key = (model, operation.seq_id)  # type: ignore[union-attr]
            request = await server.scheduler.submit("alice", operation)
            assert self.acknowledged.setdefault(key, request.request_id) == request.request_id
            if self.random.random() < 0.3:
                await anyio.lowlevel.checkpoint()
        for seq_id in range(1, len(operations) + 1):
            request_id = self.acknowledged[model, seq_id]
            result = await server.scheduler.retrieve("alice", request_id, 10.0)
            assert isinstance(result, ResultRecord)
            assert self.results.setdefault(request_id, result) == result


def faults(choose: random.Random) -> list[Fault]:
    return [
        Fault(
            delay_s=choose.choice([0.0, 0.0, 0.001, 0.003]),
            error=choose.choice(["", "", "", "", "disk full"]),
            crash=choose.choice(["", "", "", "", "before", "after"]) if i > 3 else "",  # type: ignore[arg-type]
        )
        for i in range(choose.randint(0, 30))
    ]


async def interrupted_run(seed: int) -> tuple[Clients, Storage, MemoryDisk]:
    choose = random.Random(seed)
    clients, disk, storage = Clients(seed), MemoryDisk(), Storage()
    for life in range(20):
        async with running(disk, storage, **SETTINGS) as server:
            if life < 6:
                server.driver.faults.extend(faults(choose))
            task = asyncio.ensure_future(clients.run(server))
            for _ in range(choose.randint(0, 3) if life < 6 else 0):
                await asyncio.wait([task], timeout=choose.random() * 0.02)
                server.lose_worker()
            await asyncio.wait([task], timeout=choose.random() * 0.05 if life < 6 else 20)
            if not task.done():
                task.cancel()
            try:
                await task
                if len(server.scheduler.performer.outbox) and life < 6:
                    continue  # the disk has crashed behind the last answer
                server.driver.faults.clear()
                await caught_up(server)
                await server.scheduler.stop(5.0)
                return clients, storage, disk
            except (asyncio.CancelledError, StorageError, NotReady, Overloaded):
                continue
    raise AssertionError("it never got through")


async def caught_up(server: InProcessServer) -> None:
    """Replays run for their effect after every result is known."""
    lanes = server.scheduler.state.training.runs.lanes
    with anyio.fail_after(10):
        while any(lanes[model].cursor <= 2 * STEPS for model in RUNS):  # noqa: ASYNC110
            await anyio.sleep(0.001)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tx_async.scheduler.outbox.COMMIT_RETRY_S", 0.001)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_crashes_are_delays(seed: int):
    clients, storage, disk = await interrupted_run(seed)
    assert len(clients.results) == len(RUNS) * 2 * STEPS
    async with running() as clean:
        reference = Clients(seed)
        await reference.run(clean)
        for key, request_id in clients.acknowledged.items():
            expected = reference.results[reference.acknowledged[key]]
            assert clients.results[request_id].payload == expected.payload, key
        await clean.scheduler.stop(5.0)
        expected_states = newest_snapshots(clean.scheduler.models, clean.storage)
    async with running(disk, storage, worker=False) as server:
        assert newest_snapshots(server.scheduler.models, storage) == expected_states


def newest_snapshots(models, storage: Storage) -> dict[str, Adapter]:
    return {name: storage.files[model.snapshots[0].key] for name, model in models.items()}
