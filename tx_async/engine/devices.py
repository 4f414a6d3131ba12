"""Devices that a plan can be made for without having one. Imports nothing: the command line reads it."""

GPU_BYTES = {
    "h100": 84_942_979_072,
    "h200": 150_754_820_096,
    "a100": 84_974_239_744,
    "b200": 191_502_483_456,
    "l40s": 47_697_362_944,
}
"""Memory of one, by the name that `doctor --device` takes."""
MEMORY_FRACTION = 0.92
"""Of a device's memory, for the worker's arrays; the rest is the driver's, CUDA graphs' and the libraries'."""


def usable(device: str) -> int:
    """Bytes of a device of that name that a worker may use."""
    return int(GPU_BYTES[device] * MEMORY_FRACTION)
