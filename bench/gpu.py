"""Training and decoding on an accelerator, as shares of what its arithmetic and memory allow: one command, one table.

    python bench/gpu.py [--models 0.6B 8B] [--rows 1 4] [--batches 1 32 128] [--budget 440] [--tiny] [--json]

Qwen3 in bf16 with random weights made on the device: no network, no files. Each case drives the engine with the
commands that a worker gets.

- train R x 4096: forward_backward at rank 32, R packed rows of five sequences each, two micro-batches in flight. Useful
  FLOP are 4 N per token, N = parameters of all products; attention's and the adapter's own are not counted. The share
  is of the bf16 rate of a large matrix product. Goal: 40 %.
- decode B: B sequences of different prompts of --context tokens, base model, temperature 1. A step must read every
  weight (but the embedding) and every key and value once; the share is of the measured memory bandwidth. Goals: 75 % at
  batch 1, 60 % at 128.
- prefill B: the prompts of those sequences, 2 N FLOP per token.

Everything ends within --budget seconds, compilation included: what does not fit is listed as skipped. Programs stay in
.cache/bench-jax, so a second run compiles nothing. --tiny is a model of two layers that a CPU runs in seconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from gpu_table import Result, Table
from machine import Matmul, Memory, num_multiplied

from tx_async.engine import compilation
from tx_async.engine.decode_batches import bucket, prefill_rows
from tx_async.engine.engine import JaxEngine
from tx_async.engine.kernels import Paged, TrainedHeads, flash_difference, paged_difference, prefill_difference
from tx_async.engine.kv_cache import token_bytes
from tx_async.engine.platform import current
from tx_async.layers.weights import Weight
from tx_async.models.decoder import Decoder, Params, layers_apart, tree_of
from tx_async.models.load import from_config
from tx_async.scheduler.training.packing import fill, pack
from tx_async.storage.store import Store
from tx_async.testing.models import QWEN3_TINY
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import (
    BASE_SLOT,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    CreateAdapter,
    EngineConfig,
    Sampled,
    SampleQuantum,
    SequenceSpec,
    TrainMicroBatch,
)

ROOT = Path(__file__).parents[1]
QWEN3 = QWEN3_TINY | {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": QWEN3_TINY,
}
HEADS = (
    TrainedHeads(128, 128),
    TrainedHeads(64, 64, has_window=True, has_sinks=True),  # gpt-oss
    TrainedHeads(96, 96),  # Phi-3
    TrainedHeads(192, 128),  # latent attention
    TrainedHeads(256, 256, has_window=True),  # Gemma 3
)
"""Those with which the kernels of training are compared."""
OVER_PAGES = {
    "": Paged(features=128),
    ", gpt-oss": Paged(features=64, has_sinks=True),
    ", DeepSeek V3": Paged(128, 576, 512),
    ", DeepSeek V3 on eight devices": Paged(16, 576, 512),
}
"""With what kernels over pages are compared."""
TINY = {"models": ["tiny"], "rows": [2], "batches": [1, 8], "row_length": 128, "context": 32, "seconds": 0.2}
DTYPE = "bfloat16"
RANK = 32
SEGMENTS = (6, 4, 3, 2, 1)
"""How the sequences of a packed row share it, in sixteenths."""
IN_FLIGHT = 2
MATMUL_SIZE = {"cpu": 256}
MEMORY_BYTES = {"cpu": 1 << 24}
NEW_TOKENS_MAX = 2048
QUANTA_KEPT = 16
"""A batch decodes at least this many quanta of its own before its pages run out: the KV cache is sized for it."""
CACHE_SHARE_MAX = 0.5
"""Of the device's memory, for the KV cache."""


class Limits(NamedTuple):
    """The device's ceilings."""

    matmul: Matmul
    memory: Memory


def cases(options: argparse.Namespace) -> list[str]:
    """Names, in the order in which they run: what has a goal first."""
    return [
        *(f"train {rows}x{options.row_length}" for rows in options.rows),
        *(f"decode {batch}" for batch in options.batches),
        f"prefill {max(options.batches)}",
    ]


# ---- the model


def random_model(name: str) -> tuple[Decoder, Params]:
    """Norms are one, matrices keep the size of what goes through them."""
    model = from_config(SHAPES[name])
    params = tree_of(dict(zip(model.weights, jax.jit(partial(_random_leaves, model.weights))(), strict=True)))
    return model, layers_apart(params) if current().layers_apart else jax.block_until_ready(params)


def _random_leaves(weights: tuple[Weight, ...]) -> list[jax.Array]:
    def leaf(weight: Weight, key: jax.Array) -> jax.Array:
        if len(weight.dims) == 1:
            return jnp.ones(weight.shape, DTYPE)
        fan_in = weight.dims[1 if weight.name in ("embed", "head") else 0].size
        return jax.random.normal(key, weight.shape, DTYPE) * jnp.asarray(fan_in**-0.5, DTYPE)

    return [
        leaf(weight, key)
        for weight, key in zip(weights, jax.random.split(jax.random.key(0), len(weights)), strict=True)
    ]


@contextmanager
def engine_of(model: Decoder, params: Params, **config: Any) -> Iterator[JaxEngine]:
    with tempfile.TemporaryDirectory() as folder:
        engine = JaxEngine(model, params, EngineConfig(max_lora_rank=RANK, **config), Path(folder), Store(folder))
        try:
            yield engine
        finally:
            engine.close()


# ---- training


def train(model: Decoder, params: Params, rows: int, options: argparse.Namespace, limits: Limits) -> Result:
    length = options.row_length
    config = {"train_row_lengths": (length,), "max_context_length": 2 * length, "train_micro_batch_size": rows}
    small = {"max_lora_adapters": 1, "max_sampler_adapters": 1, "sample_max_num_sequences": 1, "kv_cache_tokens": 1}
    with engine_of(model, params, **config, **small) as engine:
        engine.execute(CreateAdapter(slot=0, config=AdapterConfig(rank=RANK)), [])()
        command, tensors = micro_batch(engine, rows, length)
        run = partial(engine.execute, command, tensors)
        run()()  # compiles
        before = limits.matmul.rate().wall
        started, batches, pending = time.perf_counter(), 0, [run() for _ in range(IN_FLIGHT)]
        while time.perf_counter() < started + options.seconds:
            pending.append(run())
            pending.pop(0)()
            batches += 1
        for wait in pending:
            wait()
        seconds = time.perf_counter() - started
        matmul = (before + limits.matmul.rate().wall) / 2
    batches += len(pending)
    rate = batches * rows * length / seconds
    note = f"{1e3 * seconds / batches:.1f} ms per micro-batch"
    return Result(rate, 4 * num_multiplied(params) * rate / matmul, "matmul", note)


def micro_batch(engine: JaxEngine, num_rows: int, length: int) -> tuple[TrainMicroBatch, list[np.ndarray]]:
    """Full rows of one adapter, packed as the scheduler packs them."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        data = tuple(_datum(rng, length * part // 16, engine.model.vocab_size) for part in SEGMENTS)
        operation = ForwardBackward(model_id="m", seq_id=0, data=data, loss_fn="cross_entropy")
        (row,) = pack(operation, engine.info()).rows
        rows.append((operation, row))
    command = TrainMicroBatch(slots=(0,) * num_rows, row_length=length, targets_per_token=1, forward_only=False)
    return command, fill(rows, length, 1)


def _datum(rng: np.random.Generator, length: int, vocab_size: int) -> Datum:
    tokens, targets = rng.integers(0, vocab_size, (2, length))
    return Datum(tokens.astype(np.int32).tobytes(), {"target_tokens": Tensor.of(targets.astype(np.int64))})


# ---- decoding


class Rollouts:
    """Sequences that one engine decodes, a batch of another size at a time."""

    def __init__(self, engine: JaxEngine, options: argparse.Namespace, limits: Limits):
        self.engine, self.options, self.limits = engine, options, limits
        self.steps = engine.sampling.decode_steps
        self.cache_tokens = engine.sampling.layout.cache_tokens
        self.step_bytes = jnp.dtype(DTYPE).itemsize * num_multiplied(engine.params)
        self.token_bytes = token_bytes(engine.model, DTYPE)
        #: of the newest batch
        self.prefill_s = 0.0

    def decode(self, batch: int) -> Result:
        context, new_tokens = self.options.context, self._new_tokens(batch)
        if new_tokens < QUANTA_KEPT * self.steps:
            raise MemoryError(f"the KV cache holds {self.cache_tokens} tokens only")
        self._compile(batch)
        before = self.limits.memory.rate()
        try:
            self._admit(batch, new_tokens)
            started = time.perf_counter()
            self._quantum(batch)  # prefills everybody
            self.prefill_s = time.perf_counter() - started
            started = time.perf_counter()
            self._quantum(batch)
            quantum_s = time.perf_counter() - started
            self.prefill_s -= quantum_s
            quanta = min(new_tokens // self.steps - 3, max(3, int(self.options.seconds / quantum_s)))
            started = time.perf_counter()
            for _ in range(quanta):
                self._quantum(batch)
            seconds = (time.perf_counter() - started) / (quanta * self.steps)
        finally:
            self.engine.execute(CancelSequences(sequence_ids=tuple(range(batch))), [])()
        bandwidth = (before + self.limits.memory.rate()) / 2
        position = context + self.steps * (2 + quanta / 2)  # on average
        moved = self.step_bytes + batch * position * self.token_bytes
        note = f"{1e3 * seconds:.2f} ms per step, {batch * position * self.token_bytes / moved:.0%} of the bytes are KV"
        return Result(batch / seconds, moved / seconds / bandwidth, "memory", note)

    def prefill(self, batch: int) -> Result:
        """Of the newest batch, which must be this one."""
        if not self.prefill_s:
            raise RuntimeError(f"decode {batch} did not run")
        rate = batch * self.options.context / self.prefill_s
        share = 2 * num_multiplied(self.engine.params) * rate / self.limits.matmul.rate().wall
        return Result(rate, share, "matmul", f"{self.prefill_s:.2f} s for all prompts")

    def _new_tokens(self, batch: int) -> int:
        """What each may sample: none ever gives up its pages to another one."""
        page = self.engine.sampling.layout.page_size
        each = self.cache_tokens // batch // page * page - 2 * page
        return min(each, self.engine.context) - self.options.context

    def _compile(self, batch: int) -> None:
        """What the batch will run, so that only running is timed."""
        programs = self.engine.sampling.programs
        sizes = sorted(int(name.split()[1]) for name in programs if name.startswith("decode "))
        tiles = batch * -(-(self.options.context - 1) // self.engine.sampling.tile_tokens)
        name = f"decode {bucket(sizes, min(batch, sizes[-1]))}"
        programs[f"{name} base" if f"{name} base" in programs else name].compile()
        for rows in set(prefill_rows(tiles, self.engine.sampling.prefill_rows)):
            programs[f"prefill {rows}"].compile()

    def _admit(self, batch: int, new_tokens: int) -> None:
        rng = np.random.default_rng(batch)
        prompts = rng.integers(0, self.engine.model.vocab_size, (batch, self.options.context)).astype(np.int32)
        sequences = tuple(
            SequenceSpec(
                sequence_id=i,
                sampler_slot=BASE_SLOT,
                adapter_version="base",
                prompt_index=i,
                max_tokens=new_tokens,
                seed=i,
            )
            for i in range(batch)
        )
        self.engine.execute(AdmitSequences(sequences=sequences), list(prompts))()

    def _quantum(self, batch: int) -> None:
        """Everybody's next tokens. Nobody shares the budget: half of what is left is always a whole prompt."""
        budget = 4 * batch * self.options.context
        command = SampleQuantum(decode_steps=self.steps, prefill_tokens=budget)
        reply, _ = self.engine.execute(command, [])()
        assert isinstance(reply, Sampled)
        assert reply.num_running == batch and not reply.num_waiting and not reply.finished, reply


def rollout_config(model: Decoder, options: argparse.Namespace) -> dict[str, Any]:
    """A KV cache for the largest batch, as far as the device's memory goes."""
    each = options.context + (QUANTA_KEPT + 2) * 16
    wanted = max(options.batches) * each
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory:
        wanted = min(wanted, int(CACHE_SHARE_MAX * memory) // token_bytes(model, DTYPE))
    return {
        "max_lora_adapters": 1,
        "max_sampler_adapters": 1,
        "sample_max_num_sequences": max(options.batches),
        "kv_cache_tokens": wanted,
        "max_context_length": options.context + NEW_TOKENS_MAX,
        "prefix_cache": False,
    }


# ---- everything


def measure_model(name: str, options: argparse.Namespace, limits: Limits, table: Table, deadline: float) -> None:
    model, params = random_model(name)
    for rows in options.rows:
        case = partial(train, model, params, rows, options, limits)
        table.run(name, f"train {rows}x{options.row_length}", deadline, case)
    with engine_of(model, params, **rollout_config(model, options)) as engine:
        rollouts = Rollouts(engine, options, limits)
        for batch in options.batches:
            table.run(name, f"decode {batch}", deadline, partial(rollouts.decode, batch))
        table.run(name, f"prefill {batch}", deadline, partial(rollouts.prefill, batch))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.6B", "8B"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="packed rows of a training micro-batch")
    parser.add_argument("--row-length", type=int, default=4096, help="a multiple of 16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128], help="of decoding")
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--seconds", type=float, default=3, help="of measuring in each case")
    parser.add_argument("--budget", type=float, default=440, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.tiny:
        vars(options).update(TINY)
    options.batches = sorted(set(options.batches))
    return options


def main() -> None:
    options = parse()
    table = Table(options.models, cases(options), options.budget, options.json)
    table.end_in_time()
    compilation.use_cache(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".cache" / "bench-jax"))
    platform = current().name
    differences = {
        **{f"flash_attention {heads.features}/{heads.values}": partial(flash_difference, heads) for heads in HEADS},
        **{f"paged_attention{kind}": partial(paged_difference, paged) for kind, paged in OVER_PAGES.items()},
        **{f"paged_prefill{kind}": partial(prefill_difference, paged) for kind, paged in OVER_PAGES.items()},
    }
    for name, difference in differences.items():
        if current().paged_kernel:
            print(f"{name}: {difference():.2g} of the largest value beside the plain version", flush=True)
    limits = Limits(
        Matmul(MATMUL_SIZE.get(platform, 8192), 8, DTYPE), Memory(MEMORY_BYTES.get(platform, 1 << 31), DTYPE)
    )
    table.limits = {
        "matmul_gflops": limits.matmul.rate().wall / 1e9,
        "memory_gb_per_s": limits.memory.rate() / 1e9,
    }
    for number, name in enumerate(options.models, 1):
        deadline = options.budget * number / len(options.models)
        try:
            measure_model(name, options, limits, table, deadline)
        except Exception as error:  # it does not fit: another model may
            table.fail(name, error)
        gc.collect()
    table.print()


if __name__ == "__main__":
    main()
