"""Matrix products in which each block of rows picks its own matrix: the arithmetic of experts.

A row of the batch is dispatched by itself: its tokens are sorted by expert and padded to whole blocks, so a block holds
tokens of one row and one expert, has a fixed shape, and its bits depend on nothing else. Blocks that stay empty cost
nothing. Every rearrangement is a gather in both directions (each is the other's inverse): no scatter, so gradients are
deterministic, and no product with a mask, so a NaN stays in its row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

BLOCK_MAX = 128


class Dispatch(NamedTuple):
    """Where the A = L · k assignments of each row go: M slots in N blocks."""

    slot: Array
    """int32 [R, A]: slot of an assignment; M where its expert is not here."""
    source: Array
    """int32 [R, M]: assignment of a slot; A where it is empty."""
    expert: Array
    """int32 [R, N]: expert of a block."""
    used: Array
    """bool [R, N]."""


def block_shape(num_assignments: int, num_experts: int) -> tuple[int, int]:
    """(blocks, rows of a block) that hold a row's assignments however they fall: a function of the shapes alone."""
    even = max(1, num_assignments // num_experts)
    size = min(BLOCK_MAX, 1 << (even - 1).bit_length())
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
    expert = jnp.minimum(jnp.searchsorted(ends, block, side="right"), num_experts - 1).astype(jnp.int32)
    return Dispatch(slot, source, expert, block < ends[-1])


@jax.custom_vjp
def rearrange(x: Array, index: Array, inverse: Array) -> Array:
    """x [R, A, D] -> [R, M, D] with row m = x[index[m]], zeros where the index is A. `inverse` leads back."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


rearrange.defvjp(
    lambda x, index, inverse: (rearrange(x, index, inverse), (index, inverse)),
    lambda indices, dy: (rearrange(dy, indices[1], indices[0]), None, None),
)


@jax.custom_vjp
def grouped_matmul(x: Array, group: Array, used: Array, w: Array) -> Array:
    """x [N, B, D], group int32 [N], used bool [N], w [G, D, F] -> [N, B, F]: x[n] @ w[group[n]], zeros where not used."""
    return _blocks(x, group, used, w, w.shape[2], _forward)


@jax.custom_vjp
def frozen_grouped_matmul(x: Array, group: Array, used: Array, w: Array) -> Array:
    """As `grouped_matmul`, without a gradient for w."""
    return _blocks(x, group, used, w, w.shape[2], _forward)


def _blocks(x: Array, group: Array, used: Array, w: Array, features: int, product: Any) -> Array:
    def one(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        x, group, used = block
        zeros = jnp.zeros_like(x, shape=(x.shape[0], features))
        return None, jax.lax.cond(used, lambda: product(x, w[group]).astype(x.dtype), lambda: zeros)

    return jax.lax.scan(one, None, (x, group, used))[1]


def _forward(x: Array, w: Array) -> Array:
    return jnp.einsum("bd,df->bf", x, w, preferred_element_type=jnp.float32)


def _backward(dy: Array, w: Array) -> Array:
    return jnp.einsum("bf,df->bd", dy, w, preferred_element_type=jnp.float32)


def _weight_gradient(x: Array, group: Array, used: Array, w: Array, dy: Array) -> Array:
    """Blocks add up in their order: the sum of a group is a function of its own blocks."""

    def add(total: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
        x, dy, group, used = block
        product = lambda: total.at[group].add(jnp.einsum("bd,bf->df", x, dy, preferred_element_type=total.dtype))  # noqa: E731
        return jax.lax.cond(used, product, lambda: total), None

    zeros = jnp.zeros_like(w, jnp.float32)
    return jax.lax.scan(add, zeros, (x, dy, group, used))[0].astype(w.dtype)


def _keep(x: Array, group: Array, used: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    return _blocks(x, group, used, w, w.shape[2], _forward), (x, group, used, w)


def _gradients(kept: tuple[Array, ...], dy: Array) -> tuple[Any, ...]:
    x, group, used, w = kept
    return _blocks(dy, group, used, w, w.shape[1], _backward), None, None, _weight_gradient(x, group, used, w, dy)


def _keep_frozen(x: Array, group: Array, used: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    return _blocks(x, group, used, w, w.shape[2], _forward), (group, used, w)


def _gradient_frozen(kept: tuple[Array, ...], dy: Array) -> tuple[Any, ...]:
    group, used, w = kept
    return _blocks(dy, group, used, w, w.shape[1], _backward), None, None, None


grouped_matmul.defvjp(_keep, _gradients)
frozen_grouped_matmul.defvjp(_keep_frozen, _gradient_frozen)
