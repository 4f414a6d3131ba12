"""The arithmetic of experts: blocks of tokens, each of which picks its own matrices.

A row of the batch is dispatched by itself: its tokens are sorted by expert and padded to whole blocks, so a block holds
tokens of one row and one expert, has a fixed shape, and its bits depend on nothing else. Blocks that stay empty cost
nothing. Every rearrangement is a gather in both directions (each is the other's inverse): no scatter, so gradients are
deterministic, and no product with a mask, so a NaN stays in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.lora import ExpertLora, LayerLora

BLOCK_MAX = 128
"""The most tokens of a block."""


class Dispatch(NamedTuple):
    """The places of each row's A = L · k assignments: M slots in N blocks."""

    slot: Array
    """int32 [R, A]: the slot of an assignment; M where its expert is not on this device."""
    source: Array
    """int32 [R, M]: the assignment in a slot; A where it is empty."""
    expert: Array
    """int32 [R, N]: the expert of a block."""
    used: Array
    """bool [R, N]."""


def block_shape(num_assignments: int, num_experts: int, num_devices: int = 1, least: int = 1) -> tuple[int, int]:
    """(blocks, rows of a block, `least` or more) that hold a row's assignments however they fall: a function of the
    shapes alone.

    num_experts: those of this device; each of num_devices has as many. An assignment may go to any of them, so a
    device's blocks are no larger than if it had all experts: else it would compute mostly padding.
    """
    even = max(1, num_assignments // (num_experts * num_devices))
    size = max(least, min(BLOCK_MAX, 1 << (even - 1).bit_length()))
    return min(num_assignments, num_assignments // size + num_experts), size


def dispatch(experts: Array, num_experts: int, blocks: tuple[int, int]) -> Dispatch:
    """experts int32 [R, A]; values outside of [0, num_experts) belong to another device."""
    return jax.vmap(partial(_dispatch_row, num_experts=num_experts, blocks=blocks))(experts)


def _dispatch_row(experts: Array, num_experts: int, blocks: tuple[int, int]) -> Dispatch:
    (num_blocks, size), num_assignments = blocks, experts.shape[0]
    here = (experts >= 0) & (experts < num_experts)
    experts = jnp.where(here, experts, num_experts)
    counts = (experts[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    per_expert = -(-counts // size)
    ends = jnp.cumsum(per_expert)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    ordered = experts[order]
    padding = jnp.concatenate([(ends - per_expert) * size - (jnp.cumsum(counts) - counts), jnp.zeros(1, jnp.int32)])
    slots = jnp.arange(num_assignments, dtype=jnp.int32) + padding[ordered]
    slots = jnp.where(ordered < num_experts, slots, num_blocks * size)
    source = jnp.full(num_blocks * size, num_assignments, jnp.int32).at[slots].set(order, mode="drop")
    slot = jnp.zeros(num_assignments, jnp.int32).at[order].set(slots)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, block, side="right", method="compare_all")  # no loop, so nothing to wait for
    expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
    return Dispatch(slot, source, expert, block < ends[-1])


@jax.custom_vjp
def rearrange(x: Array, index: Array, inverse: Array) -> Array:
    """x [R, A, D] -> [R, M, D] with row m = x[index[m]], zeros where the index is A. `inverse` is the index that leads
    back."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


rearrange.defvjp(
    lambda x, index, inverse: (rearrange(x, index, inverse), (index, inverse)),
    lambda indices, dy: (rearrange(dy, indices[1], indices[0]), None, None),
)


class RowBlocks(NamedTuple):
    """The inputs of each of the N blocks of all rows."""

    expert: Array
    """int32 [N]."""
    adapter: Array
    """int32 [N], -1 = none."""
    used: Array
    """bool [N]."""


Matrices = dict[str, Array]
"""gate, up [E, D, F], down [E, F, D]; gate_bias, up_bias [E, F], down_bias [E, D] where the family has them."""


Activation = Callable[[Array, Array], Array]
"""(gate, up) -> the input of the down projection; hashable, part of the program."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def experts_mlp(activation: Activation, x: Array, blocks: RowBlocks, w: Matrices, lora: ExpertLora) -> Array:
    """x [N, B, D] -> [N, B, D], each block through its expert with its adapter; zeros where not used.

    One loop runs forward and one backward, which computes a block again instead of keeping its inner features. Only x
    and the adapters get gradients: blocks add up in their order, so an adapter's sum is a function of its own blocks.
    """

    def one(_: None, block: tuple[Array, RowBlocks]) -> tuple[None, Array]:
        x, mine = block
        run = lambda: _block_mlp(activation, x, _of_block(lora, mine), *_static(mine, w, lora))  # noqa: E731
        return None, jax.lax.cond(mine.used, run, lambda: jnp.zeros_like(x))

    return jax.lax.scan(one, None, (x, blocks))[1]


def _keep(activation: Activation, x: Array, blocks: RowBlocks, w: Matrices, lora: ExpertLora) -> tuple[Array, Any]:
    return experts_mlp(activation, x, blocks, w, lora), (x, blocks, w, lora)


def _gradients(activation: Activation, kept: Any, dy: Array) -> tuple[Any, ...]:
    x, blocks, w, lora = kept

    def one(total: LayerLora, block: tuple[Array, Array, RowBlocks]) -> tuple[LayerLora, Array]:
        x, dy, mine = block
        pairs = _of_block(lora, mine)

        def back() -> tuple[Array, LayerLora]:
            run = lambda x, pairs: _block_mlp(activation, x, pairs, *_static(mine, w, lora))  # noqa: E731
            return jax.vjp(run, x, pairs)[1](dy)

        dx, more = jax.lax.cond(mine.used, back, lambda: jax.tree.map(jnp.zeros_like, (x, pairs)))
        place = jnp.maximum(mine.adapter, 0), mine.expert
        return jax.tree.map(lambda t, m: t.at[place].add(m.astype(t.dtype)), total, more), dx

    zeros = jax.tree.map(lambda pair: jnp.zeros_like(pair, jnp.float32), lora.weights)
    total, dx = jax.lax.scan(one, zeros, (x, dy, blocks))
    total = jax.tree.map(lambda t, pair: t.astype(pair.dtype), total, lora.weights)
    return dx, None, None, ExpertLora(total, jnp.zeros_like(lora.scale), None)


experts_mlp.defvjp(_keep, _gradients)


def _of_block(lora: ExpertLora, block: RowBlocks) -> LayerLora:
    """name -> (A [in, rank], B [rank, out])."""
    return jax.tree.map(lambda pair: pair[jnp.maximum(block.adapter, 0), block.expert], lora.weights)


def _static(block: RowBlocks, w: Matrices, lora: ExpertLora) -> tuple[Matrices, Array, Array]:
    matrices = {name: matrix[block.expert] for name, matrix in w.items()}
    return matrices, block.adapter >= 0, lora.scale[jnp.maximum(block.adapter, 0)]


def _block_mlp(activation: Activation, x: Array, lora: LayerLora, w: Matrices, adapted: Array, scale: Array) -> Array:
    """x [B, D] -> [B, D]: down(activation(gate x, up x))."""

    def project(name: str, x: Array) -> Array:
        y = _product(x, w[name]).astype(x.dtype)
        if f"{name}_bias" in w:
            y = y + w[f"{name}_bias"]
        if name not in lora:
            return y
        a, b = (m.astype(x.dtype) for m in lora[name])
        delta = _product((_product(x, a) * scale).astype(x.dtype), b)
        return y + jnp.where(adapted, delta, 0).astype(x.dtype)  # a choice, not a product: 0 × NaN is NaN

    return project("down", activation(project("gate", x), project("up", x)))


def _product(x: Array, w: Array) -> Array:
    return jnp.einsum("bd,df->bf", x, w, preferred_element_type=jnp.float32)
