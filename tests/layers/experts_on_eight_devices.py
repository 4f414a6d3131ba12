"""Run by `test_experts_on_a_mesh.py` in a process with eight fake CPU devices: a layer's experts in their kernels,
interpreted, beside the plain version on the same mesh.

Prints one JSON object: "<fsdp>,<expert>,<tensor>" -> what was found.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from tx_async.layers import grouped_kernel
from tx_async.layers.block import ForwardPass
from tx_async.layers.lora import InStack, LoraGrouped, LoraRows
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import ChosenSoftmaxRouter
from tx_async.layers.sharding import AXES

D, F, EXPERTS, PER_TOKEN, RANK = 64, 96, 8, 2, 4
SIDES = {"gate": (D, F), "up": (D, F), "down": (F, D)}
LAYER = MoeMlp(D, F, ChosenSoftmaxRouter(D, EXPERTS, PER_TOKEN), bias=True)
NARROW = AbstractMesh((1, 2, 16), AXES)
rng = np.random.default_rng(0)


def main() -> None:
    shapes: set[tuple[int, ...]] = set()
    kernels = grouped_kernel.experts_mlp

    def interpreted(activation: Any, x: Array, blocks: Any, w: Any, lora: Any) -> Array:
        shapes.add(w["gate"].shape)
        return kernels(activation, x, blocks, w, lora, interpret=True)

    grouped_kernel.experts_mlp = interpreted
    found = {}
    for sizes, compare in (("1,4,2", training), ("2,2,2", decoding)):
        shape = tuple(map(int, sizes.split(",")))
        mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), AXES)
        found[sizes] = compare(mesh) | {"shapes": sorted(shapes)}
        shapes.clear()
    w, adapters, x = weights(), adapters_of(2), normal(2, 4, D)
    jax.eval_shape(partial(run, NARROW, True, LoraRows({}, jnp.ones(2))), w, adapters, x)
    print(json.dumps(found | {"narrow": sorted(shapes)}))


def normal(*shape: int) -> Array:
    return jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)


def weights() -> dict[str, Array]:
    router = {"router": normal(D, EXPERTS), "router_bias": normal(EXPERTS)}
    w = {name: normal(EXPERTS, *side) for name, side in SIDES.items()}
    biases = {f"{name}_bias": normal(EXPERTS, side[1]) for name, side in SIDES.items()}
    return w | biases | {name: x.astype(jnp.float32) for name, x in router.items()}


def adapters_of(*lead: int) -> dict[str, tuple[Array, Array]]:
    pairs = {
        name: (normal(*lead, EXPERTS, inputs, RANK), normal(*lead, EXPERTS, RANK, outputs))
        for name, (inputs, outputs) in SIDES.items()
    }
    return jax.tree.map(lambda x: x.astype(jnp.float32), pairs)


def run(mesh: Any, kernel: bool, lora: Any, w: Any, adapters: Any, x: Array) -> Array:
    return LAYER(ForwardPass(lora, jnp.zeros(x.shape[:2], jnp.int32), {}, None, mesh, kernel), w, adapters, x)  # type: ignore[arg-type]


def training(mesh: Mesh) -> dict[str, Any]:
    """Two rows, each with its own adapter: outputs, and gradients by adapters and inputs."""
    w, adapters, x, direction = weights(), adapters_of(2), normal(2, 24, D), normal(2, 24, D)

    def both_ways(kernel: bool, adapters: Any, x: Array, direction: Array) -> Any:
        lora = LoraRows({}, jnp.array([1.0, 0.5]))
        out, back = jax.vjp(lambda adapters, x: run(mesh, kernel, lora, w, adapters, x), adapters, x)
        return out, *back(direction)

    inputs = adapters, x, direction
    plain, kernel = (jax.jit(partial(both_ways, which)).lower(*inputs).compile() for which in (False, True))
    ours = kernel(*inputs)
    # The other tenant's row: its tokens, its adapter and what its loss says.
    beside_nan = kernel(*jax.tree.map(lambda x: x.at[1].set(jnp.nan), inputs))
    return {
        "difference": difference(plain(*inputs), ours),
        "sums": (kernel.as_text() or "").count(" all-reduce("),
        "row 0 keeps its bits": same(ours, beside_nan, lambda x: x[0]),
        "row 1 is NaN": bool(np.isnan(np.asarray(beside_nan[0][1], np.float32)).all()),
    }


def decoding(mesh: Mesh) -> dict[str, Any]:
    """Four rows of one token, of two adapters and none, with the adapters of all layers in one stack."""
    w, slots, x = weights(), adapters_of(2, 2), normal(4, 1, D)
    row_adapter = jnp.array([1, -1, 0, 1], jnp.int32)
    nothing = jnp.zeros(4, jnp.int32)

    def step(kernel: bool, slots: Any, x: Array) -> Array:
        scale, active = jnp.array([1.0, 0.5]), jnp.array([0, 1], jnp.int32)
        lora = LoraGrouped({"stack": slots}, scale, active, 2, nothing, nothing, 0, row_adapter)  # type: ignore[arg-type]
        return run(mesh, kernel, lora, w, {name: InStack(jnp.int32(1), "stack", name) for name in SIDES}, x)

    plain, kernel = (jax.jit(partial(step, which)) for which in (False, True))
    ours = kernel(slots, x)
    beside_nan = kernel(jax.tree.map(lambda x: x.at[:, 1].set(jnp.nan), slots), x)
    return {
        "difference": difference(plain(slots, x), ours),
        "others keep their bits": same(ours, beside_nan, lambda x: x[1:3]),
        "the adapter's rows are NaN": bool(np.isnan(np.asarray(beside_nan[np.array([0, 3])], np.float32)).all()),
    }


def difference(plain: Any, ours: Any) -> float:
    """The largest, relative to the largest value of an array."""

    def of(a: Array, b: Array) -> float:
        of_plain, of_ours = np.asarray(a, np.float32), np.asarray(b, np.float32)
        return float(np.max(np.abs(of_plain - of_ours)) / np.max(np.abs(of_plain)))

    return max(jax.tree.leaves(jax.tree.map(of, plain, ours)))


def same(one: Any, other: Any, part: Callable[[Array], Array]) -> bool:
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(np.asarray(part(a)), np.asarray(part(b)))), one, other)
    return all(jax.tree.leaves(equal))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
