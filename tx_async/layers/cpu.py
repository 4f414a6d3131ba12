"""Arithmetic in forms that only a CPU wants, apart from the code that every platform shares.

Each of these computes what its plain counterpart does, in a form that suits a CPU's memory; `engine/platform.py` says
which of them run. A reader who wants to understand a model can pass over them.

- `OutFirst`: a matrix stored as [out, in], for products with few rows (decoding).
- `joined`: W and B of a row that is alone, joined in one product (training).
- `OwnRankActive`: adapters in wider slots, read at the class of their own rank (sampling).
- `scores_in_place`, `weighted_in_place`: pages that are read again for each query head rather than stored.
- `written_row_by_row`: recurrent states that go from the arithmetic to their slots without a copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from tx_async.layers.lora import LoraActive, PairOfLayer
from tx_async.layers.norm import row_sums

LANES = 8


class OutFirst(NamedTuple):
    """A matrix stored as [out, in], for products with few rows on a CPU: it is read along its rows, as it lies, while
    x's rows stay in the cache. Stored as [in, out] it would be rearranged at every product, which costs more than the
    product.
    """

    matrix: Array

    def product(self, x: Array, dtype: Any = None) -> Array:
        """x [..., in] -> [..., out] in `dtype`, by default x's own."""
        # Without the barriers the compiler rewrites the product as x Wᵀ again.
        rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        out = jax.lax.dot_general(self.matrix, rows, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)


# ---- training


@jax.custom_vjp
def joined(x: Array, low: Array, w: Array, b: Array) -> Array:
    """x [L, in], low [L, rank], W [in, out], B [rank, out] -> x W + low B = [x | low] [W ; B]; W is frozen.

    On a CPU the thin products of an adapter cost many times their arithmetic, and a few more rows of a wide product
    cost next to nothing: this saves two of six products, and W is copied out of its stack anyway.
    """
    return jnp.concatenate([x, low], axis=1) @ jnp.concatenate([w, b])


def _forward(x: Array, low: Array, w: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return joined(x, low, w, b), (low, w, b)


def _backward(saved: tuple[Array, Array, Array], dout: Array) -> tuple[Array, Array, None, Array]:
    low, w, b = saved
    both = dout @ jnp.concatenate([w, b]).T
    return both[:, : len(w)], both[:, len(w) :], None, low.T @ dout


joined.defvjp(_forward, _backward)


# ---- sampling


@struct.dataclass
class OwnRankActive(LoraActive):
    """Reads only the first columns of an adapter's slot, as many as the class of its rank has."""

    rank_class: Array = None  # type: ignore[assignment]
    """[adapters] int32: which of `ranks` holds its rank."""
    ranks: tuple[int, ...] = struct.field(pytree_node=False, default=())
    """Ascending; the last one is the slots' own."""

    def _deltas(self, pairs: list[PairOfLayer], adapter: Array, x: Array) -> list[Array]:
        if len(self.ranks) == 1:
            return super()._deltas(pairs, adapter, x)
        branches = [partial(self._deltas_of_rank, pairs, adapter, x, rank) for rank in self.ranks]
        return jax.lax.switch(self.rank_class[adapter], branches)


def scores_in_place(q: Array, read: Any) -> Array:
    """q [R, 1, Hkv, G, D]; read(g) -> the chunk's keys [R, C, Hkv, D], read again for each g -> [R, Hkv, 1, G, C]
    fp32."""
    heads = [_scores_of_head(q[:, 0, :, g], read(g)) for g in range(q.shape[3])]
    return jnp.stack(heads, axis=2)[:, :, None]


def weighted_in_place(weights: Array, read: Any) -> Array:
    """weights [R, Hkv, 1, G, C] -> [R, Hkv, 1, G, D] fp32."""
    heads = [_weighted_of_head(weights[:, :, 0, g], read(g)) for g in range(weights.shape[3])]
    return jnp.stack(heads, axis=2)[:, :, None]


def _scores_of_head(q: Array, keys: Array) -> Array:
    """q [R, Hkv, D], one query head of each key head, keys [R, C, Hkv, D] -> [R, Hkv, C] fp32. The sum goes over all
    but the last lanes first, which a CPU does in its registers, then over those lanes."""
    *lead, Hkv, D = keys.shape
    split = (Hkv, D // LANES, LANES)
    lanes = (keys.reshape(*lead, *split) * q.astype(jnp.float32).reshape(-1, 1, *split)).sum(3)
    return row_sums(lanes)[..., 0].transpose(0, 2, 1)


def _weighted_of_head(weights: Array, values: Array) -> Array:
    """weights [R, Hkv, C] of one query head of each key head, values [R, C, Hkv, D] -> [R, Hkv, D] fp32."""
    return (values * weights.transpose(0, 2, 1)[..., None]).sum(1)


def written_row_by_row(pool: Array, slots: Array, write: Any, states: Array) -> Array:
    """pool [slots, …], states [R, …] -> the pool, where slots[r] holds `write` of row r and its state; a slot that
    several rows name gets the last one's. One scatter of all rows would first store all that it writes, and what
    `write` is made of would be computed again for each element of a state."""

    def one(pool: Array, row: Any) -> tuple[Array, None]:
        slot, write, state = row
        return jax.lax.dynamic_update_index_in_dim(pool, write(state), slot, 0), None

    return jax.lax.scan(one, pool, (slots, write, states))[0]
