"""Every family on a mesh of eight fake CPU devices computes what one device computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tx_async.engine.sharding import make_mesh
from tx_async.errors import ConfigError
from tx_async.wire.worker import EngineConfig

SCRIPT = Path(__file__).with_name("sharding_on_eight_devices.py")
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles in half the time
EIGHT_DEVICES = {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
BOUND = 1e-5


@pytest.mark.parametrize(
    ("case", "meshes"),
    [
        # fsdp, expert, tensor; the tiny models have two key heads, fewer than the tensor axis
        ("qwen3", ["8,1,1", "1,1,4", "2,1,4"]),
        ("llama", ["8,1,1", "2,1,4"]),
        ("qwen3_moe_sparse_step", ["8,1,1", "1,4,1", "2,2,2"]),
        ("deepseek", ["8,1,1", "1,4,1", "2,1,4"]),
    ],
)
def test_logits_and_lora_gradients_equal_those_of_one_device(case, meshes, tmp_path):
    command = [sys.executable, str(SCRIPT), case, str(tmp_path), *meshes]
    done = subprocess.run(command, env=os.environ | EIGHT_DEVICES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for mesh, found in json.loads(done.stdout.splitlines()[-1]).items():
        fsdp, expert, tensor = map(int, mesh.split(","))
        assert found["logits"] < BOUND, mesh
        assert found["gradients"] < BOUND, mesh
        # Norms, biases and key heads fewer than `tensor` are whole everywhere; the rest is divided.
        assert found["bytes"] < 2 * found["all_bytes"] / (fsdp * tensor) or expert > 1, mesh
        if expert > 1:
            assert found["whole_experts"] == 0, f"{mesh}: a device holds the matrices of all experts"


def test_a_mesh_larger_than_the_machine_is_refused_with_its_sizes():
    with pytest.raises(ConfigError, match=f"is 1024, but there are {len(jax.devices())} devices"):
        make_mesh(EngineConfig(fully_sharded_data_parallel_size=128, tensor_parallel_size=8))


def test_one_device_needs_no_mesh():
    assert make_mesh(EngineConfig()) is None
