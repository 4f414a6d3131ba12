"""Run by `test_sharding.py` in a process with eight fake CPU devices: one family on several meshes against one device.

    python sharding_on_eight_devices.py <family> <folder> <fsdp>,<expert>,<tensor> ... [sampling]

Prints one JSON object: mesh -> what was found. One program per mesh: the engine's forward_backward and its optim_step,
with rows of two adapters. With "sampling" also what `sampling_on_parts.py` found.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.engine import sampling_on_parts
from tests.support import parity
from tx_async.engine import train
from tx_async.engine.adapter_slots import TrainingState, zeros
from tx_async.engine.batch import row_batch
from tx_async.engine.kernels import Kernels
from tx_async.engine.mesh import training_shardings
from tx_async.engine.optimizer import Adam, optim_step
from tx_async.engine.platform import current
from tx_async.engine.sharding import make_mesh, param_shardings
from tx_async.layers import grouped
from tx_async.layers.block import ForwardPass
from tx_async.layers.moe import MoeMlp
from tx_async.layers.residuals import NOTHING
from tx_async.models.decoder import Decoder, Params
from tx_async.models.load import load_model
from tx_async.testing.engine_bench import micro_batch, segment
from tx_async.testing.models import (
    DEEPSEEK_V3_TINY,
    GPT_OSS_TINY,
    LLAMA_TINY,
    QWEN3_5_TINY,
    QWEN3_MOE_TINY,
    QWEN3_TINY,
    make_model,
)
from tx_async.wire.worker import AdamParams, AdapterConfig, EngineConfig

SMALL = {"vocab_size": 64, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3_TINY | SMALL,
    # fsdp cannot cut what tensor leaves of this vocabulary
    "llama": LLAMA_TINY | SMALL | {"num_key_value_heads": 4, "vocab_size": 60},
    "qwen3_moe": QWEN3_MOE_TINY | SMALL,
    "deepseek": DEEPSEEK_V3_TINY | SMALL | {"first_k_dense_replace": 0},
    "qwen3_5": QWEN3_5_TINY | SMALL | {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_oss": GPT_OSS_TINY | SMALL,
    "phi3": parity.config_of("phi3") | SMALL,
}
SAMPLING = "sampling"
ROWS, SLOTS, LENGTH, CONFIG = 8, (0, 1), 11, AdapterConfig(rank=4)
"""Rows belong to the adapters in turn. Their length is one for which no array of the batch happens to have the shape of
all experts' matrices."""
ADAM = AdamParams(learning_rate=0.001, eps=1e-8, weight_decay=0.1, grad_clip_norm=20.0)
"""A first step moves each weight by about the learning rate, whatever its gradient: where that is nothing but rounding,
the move is, too. So the rate is small beside the weights (0.03)."""


def main(name: str, folder: str, *meshes: str) -> None:
    make_model(folder, FAMILIES[name], tokenizer=False)
    model, whole = load_model(folder)
    reference, _, _ = step(model, whole)
    found = {}
    for sizes in meshes:
        if sizes == SAMPLING:
            found[sizes] = sampling_on_parts.differing()
            continue
        fsdp, expert, tensor = map(int, sizes.split(","))
        config = EngineConfig(
            fully_sharded_data_parallel_size=fsdp, expert_parallel_size=expert, tensor_parallel_size=tensor
        )
        mesh = make_mesh(config)
        on_mesh = replace(model, mesh=mesh)
        params = jax.device_put(whole, param_shardings(on_mesh, mesh))
        results, program, alone = step(on_mesh, params)
        found[sizes] = {what: parity.relative_error(results[what], reference[what]) for what in results} | {
            "bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)),
            "all_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            "whole_experts": whole_experts(model, program),
            "nan_stays": alone,
        }
        if expert > 1:
            found[sizes] |= {"expert_rows": expert_rows(on_mesh, params), "all_rows": expert_rows(model, whole)}
    print(json.dumps(found))


def step(model: Decoder, params: Params) -> tuple[dict[str, np.ndarray], str, bool]:
    """-> (logits, and of the adapters: gradients, weights and moments after the first one's step; the compiled program;
    whether a NaN in a row of the second adapter is in its gradients, and changes no bit of the first one's)."""

    def run(params: Params, state: TrainingState, batch: Any, adam: Adam):
        gradients, logprobs, _ = train.forward_backward(
            current(), Kernels(), model, CONFIG.rank, NOTHING, params, state.weights, state.gradients, batch
        )
        state, outcome = optim_step(state._replace(gradients=gradients), jnp.int32(0), adam)
        return gradients, logprobs, state, outcome.grad_norm

    shardings = None
    state = zeros(model.lora_targets(), len(SLOTS) + 1, CONFIG.rank)
    for slot in SLOTS:
        adapter = parity.random_adapter(model, CONFIG, seed=slot)
        weights = jax.tree.map(lambda slots, mine, slot=slot: slots.at[:, slot].set(mine), state.weights, adapter)
        state = state._replace(weights=weights)
    if model.mesh is not None:  # as the engine does
        cut, whole = training_shardings(model, model.mesh), NamedSharding(model.mesh, PartitionSpec())
        on_mesh: Any = TrainingState(cut, cut, cut, cut, whole)
        state, shardings = jax.device_put(state, on_mesh), (cut, whole, on_mesh, whole)
    given = state
    arguments = (params, given, batch_of(model), Adam.of(ADAM))
    compiled = jax.jit(run, out_shardings=shardings).lower(*arguments).compile()
    gradients, logprobs, state, norm = compiled(*arguments)
    assert norm > ADAM.grad_clip_norm, "a clip that never clips shows nothing"
    results = {
        # Logits without the constant that log-probabilities do not show.
        "logits": logprobs - np.mean(logprobs, axis=-1, keepdims=True),
        **{"gradients": gradients, "weights": state.weights, "m": state.m, "v": state.v},
    }
    found = {name: flat(tree) for name, tree in results.items()}
    spoiled, *_ = compiled(params, given, batch_of(model, nan=True), Adam.of(ADAM))
    first, second = ([np.asarray(x)[:, slot] for x in jax.tree.leaves(spoiled)] for slot in SLOTS)
    same = all(map(np.array_equal, first, (np.asarray(x)[:, 0] for x in jax.tree.leaves(gradients))))
    return found, compiled.as_text(), same and any(np.isnan(x).any() for x in second)


def batch_of(model: Decoder, nan: bool = False) -> Any:
    """Every token of the vocabulary is a target of every position, with weights of either sign. nan: one of the first
    row of the last adapter is NaN."""
    targets = np.broadcast_to(np.arange(model.vocab_size), (LENGTH, model.vocab_size))
    rows = []
    for row in range(ROWS):
        weights = np.random.default_rng(row).standard_normal(targets.shape)
        if nan and row == len(SLOTS) - 1:
            weights[0, 0] = np.nan
        values = segment(LENGTH, row, vocab=model.vocab_size, target_tokens=targets, weights=weights)
        rows.append((SLOTS[row % len(SLOTS)], [values]))
    command, tensors = micro_batch(rows, LENGTH, k=model.vocab_size)
    return row_batch(command, tensors, np.array([*len(SLOTS) * [CONFIG.rank], 0], np.int32), model.vocab_size)[0]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def whole_experts(model: Decoder, program: str) -> int:
    """How often an array of all experts' matrices appears in a device's program."""
    shapes = {weight.shape[1:] for weight in model.weights if weight.num_experts and len(weight.dims) == 2}
    return sum(program.count(f"f32[{','.join(map(str, shape))}]") for shape in shapes)


def expert_rows(model: Decoder, params: Params) -> list[int]:
    """Rows (padding included) that each place along the expert axis really sent through experts: counted where the
    products are computed, while one layer runs."""
    stack = next(stack for stack in model.stacks if isinstance(model.mlp_of(stack), MoeMlp))
    mlp, original, rows = model.mlp_of(stack), grouped._block_mlp, Counter()

    def counting(activation: Any, x: jax.Array, *rest: Any) -> jax.Array:
        place = jax.lax.axis_index("expert") if model.mesh else 0
        jax.debug.callback(lambda place: rows.update({int(place): x.shape[0]}), place)
        return original(activation, x, *rest)

    def layer(w: Any, x: jax.Array) -> jax.Array:
        run = ForwardPass(parity.no_lora(model, len(x)), jnp.zeros(x.shape[:2], jnp.int32), {}, None, model.mesh)  # type: ignore[arg-type]
        return mlp(run, {name: leaf[0] for name, leaf in w.items()}, {}, x)

    x = np.random.default_rng(0).standard_normal((2, 64, model.hidden_size)).astype(np.float32)
    grouped._block_mlp = counting
    try:
        jax.block_until_ready(jax.jit(layer)(params[stack.name], x))
        jax.effects_barrier()
    finally:
        grouped._block_mlp = original
    return [rows[place] for place in sorted(rows)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])
