"""Every family on a mesh of eight fake CPU devices computes what one device computes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from tests.support import long_tests, xla
from tx_async.engine.sharding import make_mesh
from tx_async.errors import ConfigError
from tx_async.wire.worker import EngineConfig

SCRIPT = Path(__file__).with_name("sharding_on_eight_devices.py")
EIGHT_DEVICES = xla.flags(8) | {"JAX_PLATFORMS": "cpu"}
BOUND = 1e-5


# fsdp, expert, tensor. qwen3 and qwen3_moe have two key heads, fewer than a tensor axis of four; llama has four.
MESHES = {
    "qwen3": ["2,1,4"],
    "llama": ["4,1,2"],
    "qwen3_moe": ["1,4,1", "2,2,2"],
    "deepseek": ["1,4,1"],
    "qwen3_5": ["2,1,4"],
    "gpt_oss": ["1,2,2"],
    "phi3": ["1,1,4", "sampling"],
}
"""With "sampling": what `sampling_on_parts.py` compares, in the same process."""
LONG_MESHES = {
    "qwen3": ["8,1,1", "1,1,4"],
    "llama": ["8,1,1", "1,1,4"],
    "qwen3_moe": ["8,1,1", "1,1,4"],
    "deepseek": ["8,1,1", "1,1,4", "2,2,2"],
}
"""Half a minute each: with LONG_TESTS=1. Every axis is cut in one of the others."""
if long_tests.ARE_ON:
    MESHES |= {family: MESHES[family] + meshes for family, meshes in LONG_MESHES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """family -> the future of what its process found; two processes at a time."""
    folder = tmp_path_factory.mktemp("models")

    def run(family: str) -> dict:
        command = [sys.executable, str(SCRIPT), family, str(folder / family), *MESHES[family]]
        done = subprocess.run(command, env=os.environ | EIGHT_DEVICES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        yield {family: pool.submit(run, family) for family in reversed(MESHES)}


@pytest.mark.parametrize("family", list(reversed(MESHES)))
def test_logits_gradients_and_an_optimizer_step_equal_those_of_one_device(family, found):
    for mesh, of_mesh in found[family].result().items():
        if mesh == "sampling":
            continue
        fsdp, expert, tensor = map(int, mesh.split(","))
        for what in ("logits", "gradients", "weights", "m", "v"):
            assert of_mesh[what] < BOUND, (mesh, what)
        assert of_mesh["nan_stays"], f"{mesh}: what is in one row reached the gradients of another adapter"
        # Norms, biases and key heads fewer than `tensor` are whole everywhere; the rest is divided.
        assert of_mesh["bytes"] < 2 * of_mesh["all_bytes"] / (fsdp * tensor) or expert > 1, mesh
        if expert > 1:
            assert of_mesh["whole_experts"] == 0, f"{mesh}: a device holds the matrices of all experts"


def test_devices_with_a_part_of_the_vocabulary_each_draw_what_one_device_draws(found):
    """Greedy, at a temperature, within limits among equals, shaped; reported candidates, heads and prompt scores. A row
    of NaN is there, too."""
    for case, differing in found["phi3"].result()["sampling"].items():
        assert not differing, case


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek"])
def test_expert_parallelism_divides_the_compute_of_experts(family, found):
    """Random routers are not even, and blocks are padded: the busiest of four devices still has less than half."""
    of_mesh = found[family].result()["1,4,1"]
    (alone,), together = of_mesh["all_rows"], of_mesh["expert_rows"]
    assert len(together) == 4 and sum(together) == alone, "the same blocks, divided"
    assert max(together) < alone / 2


def test_a_mesh_larger_than_the_machine_is_refused_with_its_sizes():
    with pytest.raises(ConfigError, match=f"is 1024, but there are {len(jax.devices())} devices"):
        make_mesh(EngineConfig(fully_sharded_data_parallel_size=128, tensor_parallel_size=8))


def test_one_device_needs_no_mesh():
    assert make_mesh(EngineConfig()) is None
