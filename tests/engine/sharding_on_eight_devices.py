"""Run by `test_sharding.py` in a process with eight fake CPU devices: one family on several meshes against one device.

    python sharding_on_eight_devices.py <case of tx_async.testing.parity> <folder> <fsdp>,<expert>,<tensor> ...

Prints one JSON object: mesh -> what was found.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tx_async.engine.sharding import make_mesh, param_shardings
from tx_async.models.decoder import Decoder, Params
from tx_async.models.load import load_model
from tx_async.testing import parity
from tx_async.testing.models import make_model
from tx_async.wire.worker import AdapterConfig, EngineConfig

ROWS = 8


def main(name: str, folder: str, *meshes: str) -> None:
    case = next(case for case in parity.CASES if case.name == name)
    make_model(folder, case.config, tokenizer=False)
    tokens = parity.tokens_of(case._replace(length=12), 0, ROWS)
    model, whole = load_model(folder)
    logits, gradients, _ = run(model, whole, tokens)
    found = {}
    for sizes in meshes:
        fsdp, expert, tensor = map(int, sizes.split(","))
        config = EngineConfig(
            fully_sharded_data_parallel_size=fsdp, expert_parallel_size=expert, tensor_parallel_size=tensor
        )
        mesh = make_mesh(config)
        model = replace(model, mesh=mesh)
        params = jax.device_put(whole, param_shardings(model, mesh))
        on_mesh, gradients_on_mesh, program = run(model, params, tokens)
        found[sizes] = {
            "logits": parity.relative_error(on_mesh, logits),
            "gradients": parity.relative_error(flat(gradients_on_mesh), flat(gradients)),
            "bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)),
            "all_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            "whole_experts": whole_experts(model, program),
        }
    print(json.dumps(found))


def flat(tree) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def run(model: Decoder, params: Params, tokens: np.ndarray):
    config = AdapterConfig(rank=4)
    lora = parity.rows_of(parity.random_adapter(model, config), config, ROWS)
    directions = jnp.array(np.random.default_rng(0).standard_normal((*tokens.shape, model.vocab_size), np.float32))

    def loss(lora, params):
        logits = parity.logits(model, params, jnp.asarray(tokens), lora)
        return (logits * directions).sum(), logits

    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(lora, params).compile()
    gradients, logits = compiled(lora, params)
    return np.asarray(logits), jax.tree.map(np.asarray, gradients.weights), compiled.as_text()


def whole_experts(model: Decoder, program: str) -> int:
    """How often an array of all experts' matrices appears in a device's program."""
    shapes = {weight.shape[1:] for weight in model.weights if weight.num_experts}
    return sum(program.count(f"f32[{','.join(map(str, shape))}]") for shape in shapes)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])
