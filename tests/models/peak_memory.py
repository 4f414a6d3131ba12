"""Run by `test_load.py` in a fresh process: load a model and print what it cost.

Prints JSON: bytes of the parameters, resident bytes before loading, peak resident bytes after.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from tx_async.models.load import load_model


def peak_resident_bytes() -> int:
    """Of this program alone: `ru_maxrss` would include the peak of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main(folder: str) -> None:
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))  # the runtime's own memory is not the loader's
    before = psutil.Process().memory_info().rss
    reports: list[tuple[str, float, float]] = []
    _, params = load_model(folder, "float32", lambda *report: reports.append(report))
    peak = peak_resident_bytes()
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"params": num_bytes, "before": before, "peak": peak, "stored": stored, "last": reports[-1]}))


if __name__ == "__main__":
    main(sys.argv[1])
