"""A real server whose one worker is a mesh of two processes: its own, and one that was started by hand over tcp. And a
worker of another kind beside one that trains."""

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import tinker

from tests.support import xla
from tests.support.long_tests import long
from tests.support.peft_sampler import stride_of
from tx_async.storage.checkpoint_files import read_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.testing.sdk import UNCLOSED
from tx_async.testing.server import free_port, running_server

pytestmark = pytest.mark.filterwarnings(UNCLOSED)  # the SDK's sockets

TOKEN = "a-token-that-nobody-guesses"
ENVIRON = {"TX_WORKER_TOKEN": TOKEN} | xla.flags(1)
BACKEND = {
    "max_lora_adapters": 2, "max_lora_rank": 4, "max_sampler_adapters": 2, "max_context_length": 64,
    "sample_max_num_sequences": 2, "train_row_lengths": [32], "train_micro_batch_size": 2, "decode_steps": 4,
}  # fmt: skip
PROMPT = [5, 6, 7, 8]
LEASE_MS = 5_000
"""A process that stands still is noticed so late."""


def mesh(**sizes):
    return BACKEND | {"num_processes": 2, "coordinator_address": f"127.0.0.1:{free_port()}"} | sizes


@contextmanager
def hand_started(address, folder, *flags):
    """`tx-async worker` -> its process and the file with what it says."""
    command = [sys.executable, "-m", "tx_async.cli", "worker", "--connect", address, *flags]
    said = folder / f"worker{len(list(folder.glob('worker*.log')))}.log"
    with said.open("wb") as log, subprocess.Popen(command, env=os.environ | ENVIRON, stderr=log) as process:
        try:
            yield process, said
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def service_of(server):
    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
        yield service
    gc.collect()


def steps_of(trainer, numbers):
    """Issue steps; -> their futures."""
    futures = []
    for number in numbers:
        tokens = np.random.default_rng(number).integers(0, 256, 21)
        inputs = {
            "target_tokens": tinker.TensorData(data=tokens[1:].tolist(), dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * 20, dtype="float32"),
        }
        datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)
        futures.append(trainer.forward_backward([datum], "cross_entropy"))
        futures.append(trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)))
    return futures


def losses(futures):
    return [future.result().metrics["loss:sum"] for future in futures[::2]]


def ask(sampler, max_tokens):
    params = tinker.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return sampler.sample(tinker.ModelInput.from_ints(PROMPT), num_samples=1, sampling_params=params)


def answer(future):
    return list(future.result().sequences[0].tokens)


def sample(sampler, max_tokens=8):
    return answer(ask(sampler, max_tokens))


@contextmanager
def mesh_of_two(model, folder, **sizes):
    """-> the server, whose own process is 0, and the supervisor of process 1, which came over tcp."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        running_server(
            model, data_dir=folder, backend_config=mesh(**sizes), environ=ENVIRON, ready=False,
            worker_address=address, snapshot_every_steps=2, worker_heartbeat_interval_ms=500, worker_lease_ms=LEASE_MS,
            storage_patience_s=3,
        ) as server,
        hand_started(address, folder, "--process-id", "1") as (other, _),
    ):  # fmt: skip
        server.wait_ready(200)
        yield server, other


def worker_of(supervisor_pid):
    """The worker process that a supervisor, here or over there, runs now."""
    (worker,) = (
        child
        for child in psutil.Process(supervisor_pid).children()
        if "tx_async.worker.main" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE
    )
    return worker


@pytest.mark.parametrize(
    ("sizes", "victim", "number"),
    [
        ({"fully_sharded_data_parallel_size": 2}, 1, signal.SIGKILL),
        pytest.param({"tensor_parallel_size": 2}, 1, signal.SIGSTOP, marks=long),
        pytest.param({"tensor_parallel_size": 2}, 0, signal.SIGKILL, marks=long),
        pytest.param({"fully_sharded_data_parallel_size": 2}, 0, signal.SIGSTOP, marks=long),
    ],
)
def test_a_mesh_of_two_hosts_survives_the_loss_of_one_while_it_trains_and_samples(
    sizes, victim, number, tiny_qwen3, tmp_path
):
    """P12, with adapters and optimizer state cut over both: no future fails, and the run ends where one without a
    crash ends, bit for bit. Before that, a checkpoint that cannot be written fails alone."""
    with mesh_of_two(tiny_qwen3, tmp_path, **sizes) as (server, other), service_of(server) as service:
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=4, seed=1).result()
        found = losses(steps_of(trainer, range(3)))
        sampler = trainer.save_weights_and_get_sampling_client().result()
        before = sample(sampler, 16)
        workers = [worker_of(pid) for pid in (server.pid, other.pid)]
        a_save_that_cannot_be_written_fails_alone(trainer, tmp_path / "checkpoints")
        assert [worker_of(pid) for pid in (server.pid, other.pid)] == workers

        crossing = steps_of(trainer, range(3, 6))
        sampling = [ask(sampler, 16) for _ in range(4)]
        workers[victim].send_signal(number)
        started = time.monotonic()
        found += losses(crossing)
        assert [answer(future) for future in sampling] == [before] * 4
        print(f"back after {time.monotonic() - started:.1f} s")
        after = [worker_of(pid) for pid in (server.pid, other.pid)]
        assert not set(workers) & set(after)

        calm = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=4, seed=1).result()
        assert losses(steps_of(calm, range(6))) == found
        one, two = (sample(run.save_weights_and_get_sampling_client().result()) for run in (trainer, calm))
        assert one == two and len(one) == 8


def a_save_that_cannot_be_written_fails_alone(trainer, checkpoints):
    """Process 0 writes, and finds a file where a folder must be."""
    trainer.save_state(name="first").result()
    (folder,) = {file.parent.parent for file in checkpoints.rglob("weights/*/optimizer.safetensors")}
    away = folder.rename(folder.with_name("away"))
    folder.write_text("in the way")
    with pytest.raises(tinker.RequestFailedError, match=r"weights/second.* could not be"):
        trainer.save_state(name="second").result()
    folder.unlink()
    away.rename(folder)
    trainer.save_state(name="third").result()


def test_a_mesh_with_too_few_devices_is_refused_on_both_sides(tiny_qwen3, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        pytest.raises(AssertionError, match="is 4, but there are 2 devices"),
        hand_started(address, tmp_path, "--process-id", "1") as (_, said),
        running_server(
            tiny_qwen3, data_dir=tmp_path, backend_config=mesh(fully_sharded_data_parallel_size=4), environ=ENVIRON,
            worker_address=address,
        ),
    ):  # fmt: skip
        pass
    assert "is 4, but there are 2 devices" in said.read_text()


def test_a_sampler_without_jax_serves_beside_the_mesh_that_trains(tiny_qwen3, tmp_path):
    """It gets the adapter as PEFT files through storage; the scheduler finds it by its capability."""
    address = f"tcp://127.0.0.1:{free_port()}"
    example = ("--name", "example", "--capabilities", "sample", "--engine", "tests.support.peft_sampler:create")
    with (
        running_server(
            tiny_qwen3, data_dir=tmp_path, backend_config=mesh(fully_sharded_data_parallel_size=2), environ=ENVIRON,
            ready=False, worker_address=address, local_workers=0,
        ) as server,
        hand_started(address, tmp_path, "--capabilities", "train", "--process-id", "0"),
        hand_started(address, tmp_path, "--capabilities", "train", "--process-id", "1"),
        hand_started(address, tmp_path, *example),
    ):  # fmt: skip
        server.wait_ready(200)
        with service_of(server) as service:
            trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=4, seed=1).result()
            losses(steps_of(trainer, range(1)))
            path = trainer.save_weights_for_sampler(name="one").result().path
            found = sample(service.create_sampling_client(model_path=path).result())
            base = sample(service.create_sampling_client(base_model=str(tiny_qwen3)).result())
    store = Store(str(tmp_path / "checkpoints"))
    (folder,) = {file.parent for file in (tmp_path / "checkpoints").rglob("adapter_model.safetensors")}
    _, files = read_checkpoint_sync(store, str(folder.relative_to(tmp_path / "checkpoints")))
    stride = stride_of(files["adapter_model.safetensors"])
    assert found == [(8 + stride * step) % 320 for step in range(1, 9)]
    assert base == list(range(9, 17))
