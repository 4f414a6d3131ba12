"""The card: what its maker says that it can do, and what it does."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

import jax
import jax.numpy as jnp
from machine import Matmul, Memory

from tx_async.engine.platform import CPU, current, device_memory

SPECS = (
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100", 989e12, 3.35e12),
    ("H200 NVL", 835e12, 4.8e12),
    ("GH200", 989e12, 4.0e12),
    ("H200", 989e12, 4.8e12),
    ("A100-SXM4-40GB", 312e12, 1.555e12),
    ("A100-PCIE-40GB", 312e12, 1.555e12),
    ("A100 80GB PCIe", 312e12, 1.935e12),
    ("A100", 312e12, 2.039e12),
)
"""(part of JAX's name for a card, dense bf16 FLOP/s, bytes/s of its memory), as NVIDIA states them; the first part that
a name contains counts."""
MATMUL_SIZE, MATMUL_SIZE_CPU = 8192, 256
MEMORY_BYTES, MEMORY_BYTES_CPU = 2**32, 2**24
MEMORY_PARTS = 8
"""The array whose bytes are moved is at most one part in so many of the memory."""
TURNS = 5


class Card(NamedTuple):
    name: str
    driver: str
    jax: str
    spec_flops: float
    """Dense bf16; 0 = unknown, as in `spec_bytes`."""
    spec_bytes: float
    flops: float
    """Of a large bf16 product, measured."""
    bytes: float
    """A second, read or copied, measured."""

    def __str__(self) -> str:
        flops, moved = (
            f", {spec / 1e12:,.4g} by its spec" if spec else "" for spec in (self.spec_flops, self.spec_bytes)
        )
        return (
            f"{self.name}, driver {self.driver}, JAX {self.jax}. A large bf16 product: {self.flops / 1e12:,.4g} "
            f"TFLOP/s{flops}. Memory: {self.bytes / 1e12:,.3g} TB/s{moved}."
        )

    def of_flops(self, flops: float) -> tuple[float | None, float]:
        """(share of the spec, share of what was measured) of so many FLOP/s."""
        return flops / self.spec_flops if self.spec_flops else None, flops / self.flops

    def of_bytes(self, moved: float) -> tuple[float | None, float]:
        """The same of so many bytes/s."""
        return moved / self.spec_bytes if self.spec_bytes else None, moved / self.bytes


def spec_of(name: str) -> tuple[float, float]:
    """(FLOP/s, bytes/s) or zeros."""
    return next(((flops, moved) for part, flops, moved in SPECS if part in name), (0.0, 0.0))


def measure() -> Card:
    """Its arrays are gone when this returns: an engine plans the whole memory."""
    device = jax.devices()[0]
    on_cpu, (_, limit) = current() is CPU, device_memory()
    products = Matmul(MATMUL_SIZE_CPU if on_cpu else MATMUL_SIZE, 8, jnp.bfloat16)
    flops = max(products.rate().wall for _ in range(TURNS))
    del products
    memory = Memory(MEMORY_BYTES_CPU if on_cpu else min(MEMORY_BYTES, limit // MEMORY_PARTS or MEMORY_BYTES))
    moved = max(memory.rate() for _ in range(TURNS))
    return Card(device.device_kind, driver(), jax.__version__, *spec_of(device.device_kind), flops, moved)


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
