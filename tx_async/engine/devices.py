"""Devices for which a plan can be made on a machine that has none. The command line reads it, so it imports little."""

from tx_async.wire.worker import EngineConfig

GPU_BYTES = {
    "h100": 84_942_979_072,
    "h200": 150_754_820_096,
    "a100": 84_974_239_744,
    "b200": 191_502_483_456,
    "l40s": 47_697_362_944,
}
"""The memory of one device, by the name that `doctor --device` takes."""
NOT_HERE = "there is none for this device, or it failed its self-test"
"""Why a task of a kernel runs in the plain version in every layer."""
MEMORY_FRACTION = 0.92
"""The share of a device's memory for the worker's arrays; the rest is for the driver, CUDA graphs and libraries."""


def usable(device: str) -> int:
    """How many bytes of a device of that name a worker may use."""
    return int(GPU_BYTES[device] * MEMORY_FRACTION)


def in_mesh(config: EngineConfig) -> int:
    """How many devices the parallel sizes ask for."""
    return config.tensor_parallel_size * config.expert_parallel_size * config.fully_sharded_data_parallel_size
