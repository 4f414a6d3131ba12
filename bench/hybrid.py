"""A hybrid of the width and depth of a Qwen3: what three layers of four with a gated delta rule cost, or save.

`models.py` calls it. Both models take turns, and each rate is of the least processor time (summed over threads) of
several turns: a busy machine changes it little.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import step_function
from machine import measure

from tx_async.models.load import from_config
from tx_async.testing.models import QWEN3_5_TINY, make_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support.sampling_bench import SamplingBench

HYBRID = QWEN3_5_TINY | {
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
"""Qwen3.5's proportions at an eighth of the width of its 9B; attention as the Qwen3 beside it has it."""
CONTEXTS = (100, 4096)
ROWS = 16
Run = Callable[[], Any]


def beside(qwen3: dict[str, Any], training: Callable[[Any, int, int], Run], repeats: int) -> dict[str, Any]:
    """Tokens per second of both and their ratio: training 8 rows of 256 and one of 4,096, decoding 16 rows at two
    contexts. training(model, rows, length): one forward and backward pass."""
    configs = {"qwen3": qwen3, "hybrid": HYBRID | _sizes(qwen3)}
    models = {name: from_config(config) for name, config in configs.items()}
    found: dict[str, Any] = {}
    for rows, length in ((8, 256), (1, 4096)):
        runs = {name: training(model, rows, length) for name, model in models.items()}
        found |= _rates(f"training {rows} x {length}", runs, rows * length, repeats)
    with tempfile.TemporaryDirectory() as folder:
        benches = {name: _bench(Path(folder) / name, config) for name, config in configs.items()}
        for context in CONTEXTS:
            runs = {name: step_function(bench, ROWS, context) for name, bench in benches.items()}
            steps = benches["qwen3"].engine.decode_steps
            found |= _rates(f"sampling {ROWS} rows at {context}", runs, ROWS * steps, repeats)
    return found


def _sizes(qwen3: dict[str, Any]) -> dict[str, Any]:
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    heads = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    return {key: qwen3[key] for key in (*shared, *heads)}


def _bench(folder: Path, config: dict[str, Any]) -> SamplingBench:
    make_model(folder, config, tokenizer=False)
    return SamplingBench(folder, sample_max_num_sequences=ROWS, kv_cache_tokens=16_384)


def _rates(case: str, runs: dict[str, Run], tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    for run in runs.values():  # compiles
        run()
    least = dict.fromkeys(runs, np.inf)
    for _ in range(repeats):
        for name, run in runs.items():
            least[name] = min(least[name], measure(run).cpu)
    rates = {name: tokens / seconds for name, seconds in least.items()}
    ratio = rates["hybrid"] / rates["qwen3"]
    print(f"{case}: hybrid / Qwen3 {ratio:.2f}", file=sys.stderr, flush=True)
    return {case: {f"{name}_tokens_per_cpu_s": rate for name, rate in rates.items()} | {"ratio": ratio}}


def random_tokens(vocab: int, rows: int, length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab, (rows, length)), jnp.int32)
