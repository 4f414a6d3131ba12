"""One training batch in-process, beside what the machine needs for it at least.

    python bench/train_floor.py [--cases uniform …] [--repeats 2] [--rank 8] [--max-lora-rank 32] [--torch] [--json]

A 512-wide Qwen3 of 8 layers, 32,000 tokens, tied, fp32 (42 M parameters), packed as the scheduler packs it:

- uniform: 16 sequences of 256 tokens; mixed: 16 of 32 to 512; forward: uniform, forward only;
- tenants4, tenants8: uniform, split among as many adapters.

The useful rate is 4 N FLOP per real token (2 N forward only), N = parameters of all products. Its share is taken of
the matmul rate measured right before and after each micro-batch, so whatever else runs slows both. `wall` is by the
clock, `cpu` by processor time summed over threads. --torch adds the uniform case in transformers + PEFT + torch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "HF_HUB_OFFLINE": "1"}

import machine
import numpy as np
from machine import Matmul, describe, measure, num_multiplied

from tx_async.engine.engine import JaxEngine, create
from tx_async.scheduler.training.packing import fill, pack
from tx_async.testing.models import make_qwen3
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import (
    AdamParams,
    AdapterConfig,
    CreateAdapter,
    EngineConfig,
    StepOptimizer,
    TrainMicroBatch,
    Welcome,
)

ROOT = Path(__file__).parents[1]
MODEL = machine.MODEL | {"tie_word_embeddings": True}
TENANTS = {"uniform": 1, "mixed": 1, "tenants4": 4, "tenants8": 8, "forward": 1}
MATMUL_SIZE = 1024

Lengths = Sequence[int]


def lengths_of(case: str) -> list[int]:
    if case == "mixed":
        return np.random.default_rng(0).integers(32, 513, 16).tolist()
    return [256] * 16


def operations(case: str) -> list[ForwardBackward]:
    """One per tenant."""
    rng, lengths, tenants = np.random.default_rng(1), lengths_of(case), TENANTS[case]

    def datum(length: int) -> Datum:
        tokens, targets = rng.integers(0, MODEL["vocab_size"], (2, length))
        return Datum(tokens.astype(np.int32).tobytes(), {"target_tokens": Tensor.of(targets.astype(np.int64))})

    share = len(lengths) // tenants
    parts = [lengths[i * share : (i + 1) * share] for i in range(tenants)]
    data = [tuple(datum(length) for length in part) for part in parts]
    return [ForwardBackward(model_id="m", seq_id=0, data=d, loss_fn="cross_entropy") for d in data]


def micro_batches(engine: JaxEngine, case: str) -> list[tuple[TrainMicroBatch, list[np.ndarray], int]]:
    """(command, tensors, real tokens), one row each; tenant i trains slot i."""
    found = []
    for slot, operation in enumerate(operations(case)):
        packed = pack(operation, engine.info())
        for row in packed.rows:
            k = packed.targets_per_token
            size = dict((length, rows) for rows, length in engine.row_shapes)[row.length]
            command = TrainMicroBatch(
                slots=(slot, *[-1] * (size - 1)),
                row_length=row.length,
                targets_per_token=k,
                forward_only=case == "forward",
            )
            tensors = fill([(operation, row), *[None] * (size - 1)], row.length, k)
            found.append((command, tensors, sum(segment.length for segment in row.segments)))
    return found


def run(engine: JaxEngine, case: str, repeats: int, matmul: Matmul) -> dict[str, Any]:
    batches = micro_batches(engine, case)
    shapes = {command.row_length: (command, tensors) for command, tensors, _ in batches}
    for command, tensors in shapes.values():  # compiles
        engine.execute(command, tensors)()
    flop_per_token = (2 if case == "forward" else 4) * num_multiplied(engine.params)
    walls, cpus, seconds, rates, tokens = [], [], 0.0, [], 0
    for _ in range(repeats):
        before = matmul.rate()
        for command, tensors, real in batches:
            span = measure(engine.execute(command, tensors))
            after = matmul.rate()
            walls.append((real * flop_per_token, span.wall * (before.wall + after.wall) / 2))
            cpus.append((real * flop_per_token, span.cpu * (before.cpu + after.cpu) / 2))
            rates.append(after.wall)
            seconds, tokens, before = seconds + span.wall, tokens + real, after
    steps = [
        measure(engine.execute(StepOptimizer(slot=slot, adam=AdamParams()), [])).wall for slot in range(TENANTS[case])
    ]
    padded = sum(command.row_length for command, *_ in batches)
    return {
        "tokens_per_s": tokens / seconds,
        "share_of_matmul_wall": _share(walls),
        "share_of_matmul_cpu": _share(cpus),
        "matmul_gflops": median(rates) / 1e9,
        "rows": [command.row_length for command, *_ in batches],
        "filled": tokens / repeats / padded,
        "optim_step_ms": median(steps) * 1e3,
    }


def _share(pairs: list[tuple[float, float]]) -> float:
    """Useful operations over those that the matmul would have done in the same time."""
    return sum(useful for useful, _ in pairs) / sum(possible for _, possible in pairs)


def make_engine(folder: Path, rank: int, max_rank: int) -> JaxEngine:
    make_qwen3(folder / "model", tokenizer=False, **MODEL)
    config = EngineConfig(
        max_lora_adapters=8,
        max_lora_rank=max_rank,
        max_sampler_adapters=1,
        sample_max_num_sequences=1,
        kv_cache_tokens=4096,
        compilation_cache_dir=str(ROOT / ".cache" / "bench-jax"),
    )
    welcome = Welcome(
        base_model=str(folder / "model"),
        engine=config,
        checkpoints_base=str(folder),
        heartbeat_interval_ms=1,
        lease_ms=1,
    )
    engine = create(welcome, lambda *_: None)
    for slot in range(8):
        engine.execute(CreateAdapter(slot=slot, config=AdapterConfig(rank=rank, seed=slot)), [])()
    return engine


def run_torch(folder: Path, rank: int, repeats: int) -> dict[str, Any]:
    """The uniform case, forward and backward, four sequences at a time; every target module that the engine has."""
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        return {"not_installed": str(error)}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=32, target_modules=modules))
    tokens = torch.randint(0, MODEL["vocab_size"], (4, 256))
    x = torch.ones(MATMUL_SIZE, MATMUL_SIZE)

    def step() -> None:
        logits = model(input_ids=tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()

    step()
    span = [measure(step) for _ in range(4 * repeats)]
    matmuls = [measure(lambda: x @ x) for _ in range(8)]
    seconds, flop = median(s.wall for s in span), 2 * MATMUL_SIZE**3
    return {"tokens_per_s": tokens.numel() / seconds, "matmul_gflops": flop / median(s.wall for s in matmuls) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(TENANTS), choices=list(TENANTS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-lora-rank", type=int, default=32)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", action="store_true", help="JSON only")
    options = parser.parse_args()
    machine.as_worker()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, matmul = make_engine(folder, options.rank, options.max_lora_rank), Matmul(MATMUL_SIZE)
        results: dict[str, Any] = {case: run(engine, case, options.repeats, matmul) for case in options.cases}
        engine.close()
        if options.torch:
            results["torch"] = run_torch(folder, options.rank, options.repeats)
    print(
        json.dumps(
            {"benchmark": "train_floor", "machine": describe(), "results": results}, indent=None if options.json else 1
        )
    )
    if not options.json:
        print(", ".join(_line(name, result) for name, result in results.items()))


def _line(name: str, result: dict[str, Any]) -> str:
    if "tokens_per_s" not in result:
        return f"{name}: not installed"
    share = f" ({result['share_of_matmul_wall']:.0%} of matmul)" if "share_of_matmul_wall" in result else ""
    return f"{name}: {result['tokens_per_s']:.0f} tokens/s{share}"


if __name__ == "__main__":
    main()
