"""How fast a model computes, as a share of what the machine can do, and how long it takes to compile.

    python bench/models.py [--rows 8] [--length 256] [--rank 32] [--layers 2,32] [--only hybrid]

Rates count the FLOPs that the arithmetic needs: 2 per weight and token forward, 2 more for the gradient of the input
(the weights are frozen), 6 per LoRA weight and token, and attention's two products over the visible pairs. They are set
against the rate of a large matrix product, measured in turn with them, so that a busy machine slows both. Then a hybrid
of the same width and depth beside it (`hybrid.py`), training and sampling. Prints JSON and a line for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hybrid
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tx_async.engine.platform import current
from tx_async.layers.attention import PackedAttention
from tx_async.layers.delta_rule import Chunks
from tx_async.layers.lora import LoraRows
from tx_async.models.decoder import Decoder, Params
from tx_async.models.load import from_config
from tx_async.testing.models import QWEN3_TINY
from tx_async.wire.worker import AdapterConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support import parity

QWEN3_512 = QWEN3_TINY | {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


def main() -> None:
    options = parse()
    if options.only != "hybrid":
        whole(options)
    if options.only != "qwen3":
        found = hybrid.beside(QWEN3_512, partial(one_pass, options.rank), options.repeats)
        print(json.dumps(found, indent=2))
        print("hybrid / Qwen3: " + ", ".join(f"{name} {rates['ratio']:.2f}" for name, rates in found.items()))


def one_pass(rank: int, model: Decoder, rows: int, length: int) -> Callable[[], Any]:
    inputs = random_params(model), random_lora(model, rank, rows), hybrid.random_tokens(model.vocab_size, rows, length)
    return lambda backward=programs(model, length)[1]: jax.block_until_ready(backward(*inputs))


def whole(options: argparse.Namespace) -> None:
    model = from_config(QWEN3_512)
    params, lora = random_params(model), random_lora(model, options.rank, options.rows)
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, model.vocab_size, (options.rows, options.length)), jnp.int32
    )
    forward, backward = programs(model, options.length)
    found = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}",
        "model": "Qwen3, 512 wide, 8 layers, without its head",
        "tokens": f"{options.rows} rows of {options.length}, LoRA rank {options.rank} on every layer",
        **rates(model, forward, backward, (params, lora, tokens), options),
        **compile_times(model, options),
    }
    print(json.dumps(found, indent=2))
    print(
        f"forward {found['forward_share']:.0%}, forward + backward {found['forward_backward_share']:.0%} of "
        f"{found['matmul_gflops']:.0f} GFLOP/s; compiling {options.layers[1]} layers takes "
        f"{found['compile_forward_ratio']:.2f}× (forward), {found['compile_forward_backward_ratio']:.2f}× (with "
        f"backward) the time of {options.layers[0]}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("qwen3", "hybrid"))
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), default=(2, 32))
    return parser.parse_args()


def rates(
    model: Decoder, forward: Callable, backward: Callable, inputs: tuple, options: argparse.Namespace
) -> dict[str, float]:
    """Each round measures the three in turn; the shares are medians of the rounds' ratios."""
    square = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048), np.float32))
    product = jax.jit(lambda x: x @ x)
    for function, args in ((product, (square,)), (forward, inputs), (backward, inputs)):
        jax.block_until_ready(function(*args))
    flops = flops_of(model, options.rows, options.length, options.rank)
    rounds = []
    for _ in range(options.repeats):
        matmul = 2 * 2048**3 / seconds(product, square)
        rounds.append(
            (matmul, flops[0] / seconds(forward, *inputs) / matmul, flops[1] / seconds(backward, *inputs) / matmul)
        )
    matmul, forward_share, backward_share = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "matmul_gflops": matmul / 1e9,
        "forward_gflop": flops[0] / 1e9,
        "forward_share": forward_share,
        "forward_backward_gflop": flops[1] / 1e9,
        "forward_backward_share": backward_share,
    }


def seconds(function: Callable, *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def flops_of(model: Decoder, rows: int, length: int, rank: int) -> tuple[int, int]:
    """(forward, forward + backward): weights are frozen, so their gradients are not computed; LoRA's are."""
    base = lora = 0
    for weight in model.weights:
        if weight.group and weight.stack:
            base += int(np.prod(weight.shape))
            lora += weight.num_layers * rank * (weight.dims[0].size + weight.dims[1].size)
    mixer: Any = model.layers[0].mixer
    heads = mixer.num_heads * mixer.head_dim
    pairs = rows * length * (length + 1) // 2 * model.num_layers * heads
    tokens = rows * length
    forward = tokens * 2 * (base + lora) + 4 * pairs
    return forward, tokens * (4 * base + 6 * lora) + 12 * pairs


def programs(model: Decoder, length: int) -> tuple[Callable, Callable]:
    def hidden(params: Params, lora: LoraRows, tokens: Array) -> Array:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        chunks = Chunks(*current().rule_chunks(length))
        attend = PackedAttention(positions, jnp.ones_like(positions), chunks=chunks)
        return model.forward(params, lora, tokens, positions, attend)[0]

    def loss(weights: Any, params: Params, lora: LoraRows, tokens: Array) -> Array:
        return hidden(params, replace(lora, weights=weights), tokens).sum()

    def backward(params: Params, lora: LoraRows, tokens: Array) -> Any:
        return jax.value_and_grad(loss)(lora.weights, params, lora, tokens)

    return jax.jit(hidden), jax.jit(backward)


def compile_times(model: Decoder, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds to lower and compile, without any cache; the least of three."""
    jax.config.update("jax_enable_compilation_cache", False)
    found: dict[str, float] = {}
    for num_layers in options.layers:
        deep = replace(model, layers=model.layers[:1] * num_layers)
        shapes = jax.eval_shape(lambda deep=deep: (random_params(deep), random_lora(deep, options.rank, options.rows)))
        tokens = jax.ShapeDtypeStruct((options.rows, options.length), jnp.int32)
        for name, index in (("forward", 0), ("forward_backward", 1)):
            times = []
            for _ in range(3):
                program = programs(deep, options.length)[index]
                start = time.process_time()  # of all threads: a busy machine does not change it
                program.lower(*shapes, tokens).compile()
                times.append(time.process_time() - start)
            found[f"compile_{name}_{num_layers}_layers_s"] = min(times)
    few, many = options.layers
    for name in ("forward", "forward_backward"):
        found[f"compile_{name}_ratio"] = (
            found[f"compile_{name}_{many}_layers_s"] / found[f"compile_{name}_{few}_layers_s"]
        )
    return found


def random_params(model: Decoder) -> Params:
    params: Params = {stack.name: {} for stack in model.stacks}
    for i, weight in enumerate(model.weights):
        scale = weight.dims[0].size ** -0.5
        leaf = jax.random.normal(jax.random.key(i), weight.shape) * scale
        (params[weight.stack] if weight.stack else params)[weight.name] = leaf
    return params


def random_lora(model: Decoder, rank: int, rows: int) -> LoraRows:
    config = AdapterConfig(rank=rank, train_unembed=False)
    adapter = jax.tree.map(partial(jnp.asarray), parity.random_adapter(model, config))
    return LoraRows(jax.tree.map(lambda w: jnp.repeat(w[:, None], rows, axis=1), adapter), jnp.full(rows, 32 / rank))


if __name__ == "__main__":
    main()
