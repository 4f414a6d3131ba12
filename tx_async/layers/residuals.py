"""What a training pass keeps for its backward pass, and what it computes again.

A layer keeps the outputs of its large products; all between them is recomputed. Elementwise work is cheap to repeat,
but its results are as large as those of the products: without this choice a layer keeps twice as much memory, and
moving it costs more than recomputing it. Long rows keep less (`Recompute`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
KEPT_ONLY = jax.checkpoint_policies.save_only_these_names(NAME)
"""Policy of `jax.checkpoint`."""

BlockFunction = Callable[[Any, Any, Array], Array]
"""(adapters, what is frozen, x [R, L, D]) -> [R, L, D], which works on each token alone."""


class Recompute(NamedTuple):
    """How much of a forward pass the backward pass computes again."""

    layers: int = 0
    """Of every so many layers only what enters them is kept. More than one: they are computed again together, and then
    each alone, which makes three forward passes. 0: each layer keeps the outputs of its products."""
    block_tokens: int = 0
    """An MLP works on at most so many tokens at once, whose inner features it makes again; 0 = on all."""
    keeping: int = 0
    """Of the last so many layers the outputs of products are kept all the same (with `layers` 1). The last ones are the
    first that the backward pass is done with."""


NOTHING = Recompute()


def keep(x: Any) -> Any:
    """Mark arrays that are worth their memory."""
    return checkpoint_name(x, NAME)


def in_blocks(run: BlockFunction, adapters: Any, frozen: Any, x: Array, tokens: int) -> Array:
    """run(adapters, frozen, x) of x [R, L, D], on at most `tokens` of all rows at once. What it makes of a block inside
    is made again in the backward pass, which gives gradients by the adapters and by x."""
    rows, length, _ = x.shape
    number = -(-length // max(1, tokens // rows))
    size = -(-length // number)
    padded = jnp.pad(x, ((0, 0), (0, number * size - length), (0, 0)))
    made: Any = _in_blocks(run, size, adapters, frozen, padded)
    return made[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(run: BlockFunction, size: int, adapters: Any, frozen: Any, x: Array) -> Array:
    # In place, block after block: the stacked results of a scan begin as zeros, which XLA makes for all layers at the
    # program's start and then holds.
    def step(i: Array, x: Array) -> Array:
        made = run(adapters, frozen, jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(x, made, i * size, axis=1)

    return jax.lax.fori_loop(0, x.shape[1] // size, step, x)


def _forward(run: BlockFunction, size: int, adapters: Any, frozen: Any, x: Array) -> tuple[Array, Any]:
    return _in_blocks(run, size, adapters, frozen, x), (adapters, frozen, x)


def _backward(run: BlockFunction, size: int, saved: Any, gradient: Array) -> tuple[Any, None, Array]:
    adapters, frozen, x = saved

    def step(i: Array, so_far: tuple[Array, Any]) -> tuple[Array, Any]:
        gradient, of_adapters = so_far
        block, direction = (jax.lax.dynamic_slice_in_dim(y, i * size, size, axis=1) for y in (x, gradient))
        _, back = jax.vjp(lambda adapters, block: run(adapters, frozen, block), adapters, block)
        further, of_block = back(direction)
        gradient = jax.lax.dynamic_update_slice_in_dim(gradient, of_block, i * size, axis=1)
        return gradient, jax.tree.map(jnp.add, of_adapters, further)

    zeros = jax.tree.map(jnp.zeros_like, adapters)
    gradient, of_adapters = jax.lax.fori_loop(0, x.shape[1] // size, step, (gradient, zeros))
    return of_adapters, None, gradient


_in_blocks.defvjp(_forward, _backward)
