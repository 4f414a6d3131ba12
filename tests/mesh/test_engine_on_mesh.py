"""Several processes compute what one process with as many devices computes, bit for bit, and what one device computes
within a bound; what one mesh saved, another loads."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.support import xla
from tests.support.long_tests import long
from tx_async.testing.models import make_deepseek_v3, make_llama, make_qwen3, make_qwen3_moe
from tx_async.testing.server import free_port
from tx_async.wire.worker import EngineConfig, Welcome

SCRIPT = Path(__file__).with_name("engine_on_mesh.py")
CONFIG = EngineConfig(
    max_lora_adapters=2, max_lora_rank=4, max_sampler_adapters=2, max_context_length=64, sample_max_num_sequences=2,
    train_row_lengths=(32,), train_micro_batch_size=2, decode_steps=4,
)  # fmt: skip
BOUND = 1e-4
"""Largest difference, relative to the largest value of a result, between two meshes; fp32."""
PROCESS_S = 250


def run(model: Path, folder: Path, num_processes: int, num_devices: int, key: str = "", **sizes: int):
    """-> what process 0 found. num_devices: of each process."""
    folder.mkdir(exist_ok=True)
    out = folder / f"{num_processes}x{num_devices}{key.replace('/', '-')}.npz"
    config = msgspec.structs.replace(
        CONFIG, num_processes=num_processes, coordinator_address=f"127.0.0.1:{free_port()}", **sizes
    )
    environ = os.environ | xla.flags(num_devices)
    processes = []
    for process_id in range(num_processes):
        welcome = Welcome(
            base_model=str(model), engine=config, checkpoints_base=str(folder / "checkpoints"), process_id=process_id,
            heartbeat_interval_ms=1000, lease_ms=1000,
        )  # fmt: skip
        command = [sys.executable, str(SCRIPT), msgspec.json.encode(welcome).decode(), str(out), *[key] * bool(key)]
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=PROCESS_S)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * num_processes, outputs
    with np.load(out) as found:
        return dict(found)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def assert_near(one, other):
    """Values within BOUND; what is counted, chosen or drawn is equal."""
    assert one.keys() == other.keys()
    largest = max(difference(name, one[name], other[name]) for name in one if name != "share of one device")
    print(f"largest relative difference {largest:.1e}")
    assert largest < BOUND


def difference(name, values, others):
    if not np.issubdtype(values.dtype, np.floating):
        np.testing.assert_array_equal(values, others, name)
        return 0.0
    scored = np.isfinite(values) & (values > -9e4)
    return np.max(np.abs(values - others)[scored], initial=0.0) / np.max(np.abs(values[scored]), initial=1e-6)


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


MODELS = {"llama": make_llama, "qwen3": make_qwen3, "moe": make_qwen3_moe, "deepseek": make_deepseek_v3}
FSDP, EXPERTS, TENSOR = "fully_sharded_data_parallel_size", "expert_parallel_size", "tensor_parallel_size"


@long
@pytest.mark.parametrize(
    ("family", "num_devices", "sizes"),
    [
        ("llama", 1, {TENSOR: 2}),
        ("moe", 1, {EXPERTS: 2}),
        ("deepseek", 1, {EXPERTS: 2}),
        ("qwen3", 2, {FSDP: 2, TENSOR: 2}),
        ("moe", 2, {EXPERTS: 2, TENSOR: 2}),
        ("deepseek", 2, {FSDP: 2, EXPERTS: 2}),
        ("llama", 4, {FSDP: 4, TENSOR: 2}),
        ("moe", 4, {FSDP: 2, EXPERTS: 2, TENSOR: 2}),
        ("deepseek", 4, {FSDP: 2, EXPERTS: 2, TENSOR: 2}),
    ],
)
def test_two_processes_compute_what_one_of_as_many_devices_computes(family, num_devices, sizes, tmp_path):
    """Bit for bit where a sum has two terms. Of more, gloo adds in another order than one process does."""
    model = MODELS[family](tmp_path / "model")
    one = run(model, tmp_path / "one", 1, 2 * num_devices, **sizes)
    two = run(model, tmp_path / "two", 2, num_devices, **sizes)
    if num_devices == 1:
        assert_equal(one, two)
    assert_near(one, two)


@long
def test_a_mesh_computes_what_one_device_computes(tiny_qwen3, tmp_path):
    sizes = {FSDP: 2, TENSOR: 2}
    assert_near(run(tiny_qwen3, tmp_path / "one", 1, 1), run(tiny_qwen3, tmp_path / "mesh", 2, 2, **sizes))
