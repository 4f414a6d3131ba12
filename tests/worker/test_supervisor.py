"""Real worker processes: how they live, die, come back, and leave nothing."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import uvloop

from tx_async.config import ServerConfig
from tx_async.dispatch.router import Router
from tx_async.dispatch.runtime import default_root
from tx_async.errors import BaseModelError
from tx_async.testing.dispatch import FAKE_ENGINE, running_dispatch, until
from tx_async.testing.fake_engine import FAULTS_VARIABLE
from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerProgress
from tx_async.wire.worker import (
    AdamParams,
    AdapterConfig,
    CancelSequences,
    CreateAdapter,
    Done,
    EngineConfig,
    SaveAdapter,
    Saved,
    StepOptimizer,
)
from tx_async.worker.supervisor import Supervisor

NOTHING = CancelSequences(sequence_ids=())


@pytest.fixture
def config(tmp_path):
    return ServerConfig(
        data_dir=str(tmp_path), worker_heartbeat_interval_ms=100, worker_lease_ms=1_500, shared_memory_bytes=1 << 20
    )


@pytest.fixture
def mesh(config):
    """One worker that consists of two processes."""
    return with_(config, backend_config=EngineConfig(num_processes=2), local_workers=2)


def with_(config, **fields):
    return ServerConfig(**{field: getattr(config, field) for field in config.__struct_fields__} | fields)


def faults(monkeypatch, **fields):
    monkeypatch.setenv(FAULTS_VARIABLE, json.dumps(fields))


def pids(running):
    return [process.pid for process in running.supervisor.processes]


def is_gone(pid):
    """Ended; whether its parent has noticed is not our business."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_worker_serves_and_stops_without_leaving_anything(config):
    async with running_dispatch(config) as running:
        await running.ready()
        assert running.supervisor.waiting_for() == []
        folder, [pid] = running.router.runtime.path, pids(running)
        assert (await running.call(NOTHING)).result == Done()
        await running.supervisor.stop(5.0)
        assert running.supervisor.processes[0].exit_text.startswith("exited with code 0")
    assert is_gone(pid) and not folder.exists()


async def test_an_interrupt_of_the_terminal_reaches_the_server_only(config):
    """Ctrl-C goes to the whole foreground process group; the server stops its workers itself, in order."""
    async with running_dispatch(config) as running:
        await running.ready()
        assert os.getpgid(pids(running)[0]) != os.getpgid(0)


async def test_what_a_worker_is_waiting_for_can_be_read(config, monkeypatch):
    faults(monkeypatch, load_ms=500)
    async with running_dispatch(config) as running:
        assert running.supervisor.waiting_for() == ["worker w0.0: starting"]
        await until(lambda: "worker w0.0: loading weights 40 %" in running.supervisor.waiting_for())
        await running.ready()


async def test_a_killed_worker_is_noticed_at_once_and_starts_again(config):
    async with running_dispatch(config) as running:
        await running.ready()
        [pid] = pids(running)
        os.kill(pid, signal.SIGKILL)
        lost = await running.next(WorkerLost, timeout_s=1.0)
        assert "SIGKILL" in lost.reason or "connection" in lost.reason
        await running.ready()
        assert pids(running) != [pid] and running.supervisor.processes[0].num_starts == 2
        assert (await running.call(NOTHING)).number == 1


async def test_a_worker_that_starts_again_for_wider_slots_is_no_warning(config, caplog):
    caplog.set_level(logging.INFO)
    async with running_dispatch(config) as running:
        await running.ready()
        running.router.widen("w0", 128)
        await running.next(WorkerLost)
        await running.ready()
        assert running.router.lora_rank == 128 and running.supervisor.processes[0].num_starts == 2
    said = [record for record in caplog.records if "starts again" in record.getMessage()]
    assert said and not [record for record in said if record.levelno > logging.INFO]


async def test_a_stopped_worker_is_lost_with_its_lease_and_returns(config):
    """SIGSTOP: its connection stands, but it says nothing, and hears nothing. Nobody has to send it SIGCONT."""
    async with running_dispatch(config) as running:
        await running.ready()
        [pid] = pids(running)
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        lost = await running.next(WorkerLost)
        assert "silent" in lost.reason or "SIGKILL" in lost.reason
        assert 1.0 < time.monotonic() - started < 4.0
        await running.ready()
        assert is_gone(pid) and pids(running) != [pid]


async def test_a_worker_that_goes_on_after_it_was_given_up_learns_so(config, monkeypatch):
    """Nobody ends it here (as on a host that stood still as a whole): it hears that it is not known any more."""
    monkeypatch.setattr("tx_async.worker.supervisor.PULSE_POLL_S", 1000.0)
    async with running_dispatch(config) as running:
        await running.ready()
        [pid] = pids(running)
        os.kill(pid, signal.SIGSTOP)
        assert "silent" in (await running.next(WorkerLost)).reason
        os.kill(pid, signal.SIGCONT)
        await running.ready()
        assert pids(running) != [pid]


async def test_a_busy_worker_is_not_lost(config, monkeypatch):
    """A command may take longer than a lease (a compilation does): the dealer's thread answers meanwhile."""
    faults(monkeypatch, stall_at=1, stall_ms=2_500)
    async with running_dispatch(config) as running:
        await running.ready()
        assert (await running.call(NOTHING)).failure is None
        assert running.supervisor.processes[0].num_starts == 1


async def test_an_error_of_the_engine_is_fatal_and_says_why(config, monkeypatch, tmp_path, capfd):
    faults(monkeypatch, error_at=2, once_file=str(tmp_path / "once"))
    async with running_dispatch(config) as running:
        await running.ready()
        await running.call(NOTHING)
        failed = (await running.call(NOTHING)).failure
        assert failed and failed.fatal and "told to fail" in failed.message
        assert "told to fail" in (await running.next(WorkerLost)).reason
        await until(lambda: running.supervisor.processes[0].num_starts == 2)
        await running.ready()
    assert "Traceback" in capfd.readouterr().err


async def test_an_error_of_one_command_fails_that_command_alone(config, monkeypatch):
    faults(monkeypatch, user_error_at=1)
    async with running_dispatch(config) as running:
        await running.ready()
        failed = (await running.call(NOTHING)).failure
        assert failed and not failed.fatal
        assert (await running.call(NOTHING)).failure is None


async def test_a_worker_that_cannot_load_is_tried_again_and_healthz_can_say_why(config, monkeypatch, tmp_path):
    faults(monkeypatch, load_error="the disk is on fire", once_file=str(tmp_path / "once"))
    async with running_dispatch(config) as running:
        expected = "worker w0.0 exited with code 1 (last said: RuntimeError: the disk is on fire)"
        await until(lambda: expected in running.supervisor.waiting_for(in_full=True))
        assert running.supervisor.waiting_for() == ["worker w0.0: restarting"], "what tenants are told"
        await running.ready()


async def test_a_base_model_that_cannot_be_loaded_ends_the_server(config, monkeypatch):
    faults(monkeypatch, base_model_error="The folder has no weights.")
    router = Router(config, lambda event: None)
    await router.start()
    with pytest.raises(BaseModelError, match=r"The folder has no weights\."):
        await asyncio.wait_for(Supervisor(config, router, engine=FAKE_ENGINE).run(), 10)
    await router.stop()


async def test_an_engine_that_does_not_exist_ends_the_server(config):
    router = Router(config, lambda event: None)
    await router.start()
    with pytest.raises(BaseModelError, match="module:function"):
        await asyncio.wait_for(Supervisor(config, router, engine="tx_async.testing.fake_engine:nothing").run(), 10)
    await router.stop()


async def test_a_worker_that_does_not_stop_is_killed(config, monkeypatch):
    faults(monkeypatch, stall_at=1, stall_ms=60_000)
    async with running_dispatch(config) as running:
        await running.ready()
        [pid] = pids(running)
        running.router.send("w0", NOTHING)
        await asyncio.sleep(0.2)
        await running.supervisor.stop(0.5)
        assert is_gone(pid)


async def test_a_stop_while_starting_leaves_no_process(config, monkeypatch):
    faults(monkeypatch, load_ms=60_000)
    async with running_dispatch(config) as running:
        await running.next(WorkerProgress)
        [pid] = pids(running)
        started = time.monotonic()
        await running.supervisor.stop(5.0)
        assert time.monotonic() - started < 5.0 and is_gone(pid)


# uvloop forks, and JAX, which other tests of this process may have imported, warns of that. No server ever imports JAX.
@pytest.mark.filterwarnings(r"ignore:os\.fork:RuntimeWarning")
def test_it_runs_under_uvloop_as_well(config):
    async def serve():
        async with running_dispatch(config) as running:
            await running.ready()
            tensors = [np.arange(50_000, dtype=np.float32)]
            for _ in range(200):
                assert (await running.call(NOTHING, tensors)).failure is None
            return pids(running)[0]

    assert is_gone(uvloop.run(serve()))


# ---- a mesh of two processes


async def test_two_processes_get_one_stream_and_give_one_answer(mesh):
    async with running_dispatch(mesh) as running:
        await running.ready()
        tensors = [np.arange(50_000, dtype=np.float32)]
        assert (await running.call(CreateAdapter(slot=0, config=AdapterConfig(rank=4)), tensors)).result == Done()
        saved = await running.call(
            SaveAdapter(slot=0, config=AdapterConfig(rank=4), key="here", kind="training"), tensors
        )
        assert isinstance(saved.result, Saved)
        statistics = running.router.statistics()
        # Written once for both, and given back when both had answered.
        assert statistics.shared_bytes == 2 * tensors[0].nbytes and statistics.arena_used_bytes == 0
        for number in range(3, 500):
            running.router.send("w0", StepOptimizer(slot=0, adam=AdamParams()))
            assert (await running.finished()).number == number


@pytest.mark.parametrize("killed", [0, 1])
async def test_a_mesh_fails_as_one_and_returns_as_one(mesh, killed):
    async with running_dispatch(mesh) as running:
        await running.ready()
        before = pids(running)
        for _ in range(2):
            running.router.send("w0", NOTHING)
        os.kill(before[killed], signal.SIGKILL)
        while not isinstance(event := await running.events.get(), WorkerLost):
            assert isinstance(event, CommandEnded) and event.failure is None
        assert f"process {killed}" in event.reason
        await running.ready()
        assert not set(before) & set(pids(running))
        assert (await running.call(NOTHING)).number == 1


async def test_a_stopped_process_of_a_mesh_takes_the_other_with_it(mesh):
    async with running_dispatch(mesh) as running:
        await running.ready()
        before = pids(running)
        os.kill(before[1], signal.SIGSTOP)
        running.router.send("w0", NOTHING)
        assert "process 1" in (await running.next(WorkerLost)).reason
        await running.ready()
        assert all(is_gone(pid) for pid in before)


async def test_processes_that_disagree_are_not_trusted(mesh, monkeypatch, tmp_path):
    """One of the two fails a command that the other finished: their engines have diverged."""
    faults(monkeypatch, user_error_at=1, once_file=str(tmp_path / "once"))
    async with running_dispatch(mesh) as running:
        await running.ready()
        running.router.send("w0", NOTHING)
        assert "disagree" in (await running.next(WorkerLost)).reason
        await running.ready()


async def test_a_save_that_process_0_alone_cannot_write_fails_alone(mesh, monkeypatch, tmp_path):
    """Its files are process 0's business: the engines agree all the same, and the mesh goes on."""
    faults(monkeypatch, user_error_at=1, process_id=0)
    async with running_dispatch(mesh) as running:
        await running.ready()
        save = SaveAdapter(slot=0, config=AdapterConfig(rank=4), key="here", kind="training")
        failed = (await running.call(save)).failure
        assert failed and not failed.fatal
        assert (await running.call(NOTHING)).failure is None


async def test_half_a_mesh_is_not_ready(mesh):
    async with running_dispatch(with_(mesh, local_workers=1)) as running:
        await until(lambda: running.supervisor.waiting_for() == ["worker w0.1: not attached"])


# ---- a server that is killed

SERVER = """
import asyncio, sys
from tx_async.config import ServerConfig
from tx_async.testing.dispatch import running_dispatch
from tx_async.wire.worker import CancelSequences
import numpy as np

async def main():
    async with running_dispatch(ServerConfig(data_dir=sys.argv[1])) as running:
        await running.ready()
        running.router.send("w0", CancelSequences(sequence_ids=()), [np.zeros(100_000, np.float32)])
        await asyncio.sleep(0.2)
        print(running.supervisor.processes[0].pid, running.router.runtime.path, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def killed_server(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SERVER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        pid, folder = process.stdout.readline().split()
        yield process, int(pid), Path(folder)
        process.kill()


async def test_after_kill_9_of_the_server_its_worker_ends_and_the_next_server_cleans_up(killed_server):
    process, worker_pid, folder = killed_server
    assert not is_gone(worker_pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    await until(lambda: is_gone(worker_pid), timeout_s=2.0)
    assert folder.exists() and folder.parent == default_root()
    router = Router(ServerConfig(), lambda event: None)
    await router.start()
    assert not folder.exists()
    await router.stop()


@pytest.fixture
def stalling(monkeypatch):
    faults(monkeypatch, stall_at=1, stall_ms=60_000)


async def test_a_busy_worker_ends_as_well_when_the_server_is_killed(stalling, killed_server):
    process, worker_pid, _ = killed_server
    process.kill()
    await until(lambda: is_gone(worker_pid), timeout_s=2.0)


async def test_a_start_without_descriptors_is_tried_again(config, monkeypatch):
    """EMFILE when a worker is to start again: the server goes on, and the worker comes when there is room."""
    refusals = [OSError(24, "Too many open files")] * 2
    create = asyncio.create_subprocess_exec

    async def create_unless_full(*arguments, **options):
        if refusals:
            raise refusals.pop()
        return await create(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create_unless_full)
    async with running_dispatch(config) as running:
        await running.ready()
        assert not refusals and running.supervisor.processes[0].num_starts == 1
