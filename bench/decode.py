"""One decode step, beside what the machine needs for it at least.

    python bench/decode.py [--batch 4 16] [--context 100] [--seconds 2] [--json]

For a 512-wide Qwen3 of 8 layers and 32,000 tokens in fp32: milliseconds per step for each batch and kind of rows, and
two floors of the same run: reading every weight once, and the step's multiplications at the rate of a large matmul.
Wall time suffers from whatever else runs; processor time (summed over threads) hardly does, so both are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import MODEL, Matmul, Memory, as_worker, describe, num_multiplied
from machine import measure as measure_once

from tx_async.engine.decode_batches import batch_sizes, decode_batch
from tx_async.engine.decode_programs import Adapters
from tx_async.engine.platform import current
from tx_async.testing.models import make_qwen3

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support.sampling_bench import SamplingBench

ROOT = Path(__file__).parents[1]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "1 adapter of rank 32": {"slots": (0,)},
    "4 adapters of rank 32": {"slots": (0, 1, 2, 3)},
    "1 adapter of rank 8": {"slots": (4,)},
    "4 adapters of rank 8": {"slots": (4, 5, 6, 7)},
}


def cases(bench: SamplingBench, rows: int, context: int) -> dict[str, Callable[[], Any]]:
    return {name: step_function(bench, rows, context, **kind) for name, kind in KINDS.items()}


def step_function(
    bench: SamplingBench,
    rows: int,
    context: int,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    slots: tuple[int, ...] = (-1,),
) -> Callable[[], Any]:
    """A full quantum for `rows` sequences of `context` tokens each; whatever their pages hold costs the same."""
    engine = bench.engine
    batch = decode_batch([], rows, engine.layout)
    num_pages = engine.layout.pages_for(context + engine.decode_steps)
    pages = 1 + np.arange(rows * num_pages) % (engine.layout.num_pages - 1)
    batch.tables[..., :num_pages] = pages.reshape(rows, num_pages)
    batch.remaining[:], batch.position[:] = 10_000, context
    batch.temperature[:], batch.top_k[:], batch.top_p[:] = temperature, top_k, top_p
    batch.adapter[:] = np.sort(np.resize(slots, rows))
    adapters = Adapters.of(bench.weights, bench.scale, batch.adapter)
    program, steps = engine.programs[f"decode {rows}"], np.int32(engine.decode_steps)

    def run() -> Any:
        out, engine.pools = program(engine.decode_params, adapters, engine.pools, batch, steps)
        return jax.block_until_ready(out)

    return run


def floors(bench: SamplingBench, rows: int) -> dict[str, Callable[[], Any]]:
    """Bytes of all weights that multiply, read once; and as many multiplications as a step has, in one matmul."""
    num_weights = num_multiplied(bench.params)
    return {
        "floor: weights read once": Memory(4 * num_weights).read,
        "floor: multiplications": Matmul(int((num_weights * rows) ** (1 / 3)), products=1).run,
    }


def measure(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, tuple[float, float]]:
    """name -> (wall, processor) seconds: the least of many turns, taken in turn so that a disturbance meets all."""
    for function in functions.values():
        function()
    best = dict.fromkeys(functions, (np.inf, np.inf))
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end:
        for name, function in functions.items():
            spent = measure_once(function)
            best[name] = min(best[name][0], spent.wall), min(best[name][1], spent.cpu)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    as_worker()
    known = batch_sizes(64, current())
    if unknown := sorted(set(options.batch) - set(known)):
        parser.error(f"no program decodes {unknown} rows; there are {list(known)}")
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "bench"))
    results: dict[str, Any] = {"machine": describe(), "context": options.context}
    with tempfile.TemporaryDirectory() as folder:
        bench = SamplingBench(
            make_qwen3(folder, tokenizer=False, **MODEL),
            sample_max_num_sequences=64,
            kv_cache_tokens=16_384,
            max_lora_rank=32,
            max_sampler_adapters=8,
        )
        for slot in range(8):
            bench.set_adapter(slot, seed=slot, rank=32 if slot < 4 else 8)
        for rows in options.batch:
            times = measure(cases(bench, rows, options.context) | floors(bench, rows), options.seconds)
            for name, (wall, processor) in times.items():
                steps = 1 if name.startswith("floor") else bench.engine.decode_steps
                results[f"batch {rows}, {name}"] = {"wall_ms": wall / steps * 1e3, "cpu_ms": processor / steps * 1e3}
    report(results, options.json)


def report(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for name, value in results.items():
        timed = isinstance(value, dict) and "wall_ms" in value
        text = f"{value['wall_ms']:8.2f} ms wall {value['cpu_ms']:8.2f} ms cpu" if timed else value
        print(f"{name:40s} {text}")


if __name__ == "__main__":
    main()
