"""Several processes compute what one process with as many devices computes, bit for bit, and what one device computes
within a bound; what one mesh saved, another loads."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tx_async.testing.models import make_qwen3_moe
from tx_async.testing.server import free_port
from tx_async.wire.worker import EngineConfig, Welcome

SCRIPT = Path(__file__).with_name("engine_on_mesh.py")
CONFIG = EngineConfig(
    max_lora_adapters=2, max_lora_rank=4, max_sampler_adapters=2, max_context_length=64, sample_max_num_sequences=2,
    train_row_lengths=(32,), train_micro_batch_size=2, decode_steps=4,
)  # fmt: skip
BOUND = 1e-4
"""Largest difference, relative to the largest value of a result, between a mesh and one device; fp32."""
PROCESS_S = 250

long = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes minutes: set LONG_TESTS=1")


def run(model: Path, folder: Path, num_processes: int, num_devices: int, key: str = "", **sizes: int):
    """-> what process 0 found. num_devices: of each process."""
    folder.mkdir(exist_ok=True)
    out = folder / f"{num_processes}x{num_devices}{key.replace('/', '-')}.npz"
    config = msgspec.structs.replace(
        CONFIG, num_processes=num_processes, coordinator_address=f"127.0.0.1:{free_port()}", **sizes
    )
    environ = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    processes = []
    for process_id in range(num_processes):
        welcome = Welcome(
            base_model=str(model), engine=config, checkpoints_base=str(folder / "checkpoints"), process_id=process_id,
            heartbeat_interval_ms=1000, lease_ms=1000,
        )  # fmt: skip
        command = [sys.executable, str(SCRIPT), msgspec.json.encode(welcome).decode(), str(out), *[key] * bool(key)]
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=PROCESS_S)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, outputs
    with np.load(out) as found:
        return dict(found)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def assert_near(one, other):
    for name, values in one.items():
        if name == "share of one device":
            continue
        if name.endswith(" tokens"):
            np.testing.assert_array_equal(values, other[name], name)
            continue
        largest = np.nanmax(np.abs(values), initial=1e-6)
        np.testing.assert_allclose(values, other[name], rtol=0, atol=BOUND * largest, err_msg=name)


def test_two_processes_equal_one_with_two_devices_and_one_device_loads_what_they_saved(tiny_qwen3, tmp_path):
    one = run(tiny_qwen3, tmp_path / "one", 1, 2, fully_sharded_data_parallel_size=2)
    two = run(tiny_qwen3, tmp_path / "two", 2, 1, fully_sharded_data_parallel_size=2)
    assert_equal(one, two)
    assert two["share of one device"] < 0.8
    alone = run(tiny_qwen3, tmp_path / "two", 1, 1, key="run/trained")
    assert_equal(
        {name: values for name, values in two.items() if name.startswith("state")},
        {name: values for name, values in alone.items() if name.startswith("state")},
    )


@long
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", {"fully_sharded_data_parallel_size": 2, "tensor_parallel_size": 2}),
        ("moe", {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
        ("moe", {"fully_sharded_data_parallel_size": 2, "expert_parallel_size": 2}),
    ],
)
def test_mixed_axes_over_two_processes_compute_what_one_device_computes(family, sizes, tiny_qwen3, tmp_path):
    model = make_qwen3_moe(tmp_path / "moe") if family == "moe" else tiny_qwen3
    assert_near(run(model, tmp_path / "one", 1, 1), run(model, tmp_path / "mesh", 2, 2, **sizes))
