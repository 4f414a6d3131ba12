"""What this machine does at most, right now: the rate of a large matrix product, and of memory.

Benchmarks set their own rates against these, measured in the same run, so that whatever else runs slows both.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.worker import allocator

MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "vocab_size": 32_000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""The Qwen3 that the benchmarks of a CPU use."""


def as_worker() -> None:
    """Start this script anew, with the memory allocator of a worker process. Call it first."""
    if not allocator.ENVIRONMENT.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | allocator.ENVIRONMENT)


def num_multiplied(params: dict[str, Any]) -> int:
    """Parameters that every token is multiplied with: all, but an embedding that is no head too. It is looked up."""
    looked_up = params["embed"].size if "head" in params else 0
    return sum(x.size for x in jax.tree.leaves(params)) - looked_up


class Measured(NamedTuple):
    """One quantity by the clock, and by processor time summed over threads."""

    wall: float
    cpu: float


def measure(function: Callable[[], Any]) -> Measured:
    """Seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Measured(time.perf_counter() - wall, time.process_time() - cpu)


class Matmul:
    """Square products, each of the one before it: nothing is multiplied by zero, and none starts early."""

    def __init__(self, size: int = 1024, products: int = 4, dtype: Any = jnp.float32):
        self.flop = 2 * size**3 * products
        keys = jax.random.split(jax.random.key(0))
        self._x, weights = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)
        self._weights = weights * jnp.asarray(size**-0.5, dtype)
        self._products, self._multiply = products, jax.jit(jnp.matmul)
        self.run()

    def run(self) -> None:
        x = self._x
        for _ in range(self._products):
            x = self._multiply(x, self._weights)
        x.block_until_ready()

    def rate(self) -> Measured:
        """FLOP/s, after a turn that brings the matrices and the threads back."""
        self.run()
        seconds = measure(self.run)
        return Measured(self.flop / seconds.wall, self.flop / seconds.cpu)


class Memory:
    """An array read once (summed), and one copied: whichever moves more bytes per second."""

    def __init__(self, num_bytes: int, dtype: Any = jnp.float32):
        self.values = jnp.ones(num_bytes // jnp.dtype(dtype).itemsize, dtype)
        self._sum = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
        self._copy = jax.jit(jnp.negative)
        self.rate(repeats=1)

    def read(self) -> Array:
        return self._sum(self.values).block_until_ready()

    def copy(self) -> Array:
        return self._copy(self.values).block_until_ready()

    def rate(self, repeats: int = 3) -> float:
        """Bytes/s by the clock, the best of a few turns."""
        read = min(measure(self.read).wall for _ in range(repeats))
        copy = min(measure(self.copy).wall for _ in range(repeats))
        return self.values.nbytes * max(1 / read, 2 / copy)


def describe() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
