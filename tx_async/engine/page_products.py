"""Products of a chunk of pages with queries and with weights, in the forms that an accelerator or a CPU does best.

`PLAIN` serves any number of tokens per row. With one token per row (decoding) there is little arithmetic, and the cost
is moving keys and values about:

- `IN_PLACE` goes over the pages once for each query head of a key head and stores nothing that it has read: a CPU's
  choice while few query heads share a key head;
- `BLOCK_DIAGONAL` makes one product for all heads: a query is laid into its key head's part of a column of zeros and
  meets the keys as they lie in the page. The products with zeros are worth it while there are few key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers import cpu

BLOCK_DIAGONAL_HEADS_MAX = 8
"""Up to this many key heads, the products with zeros cost less than laying each head's keys together."""
IN_PLACE_GROUP_MAX = 2
"""Up to this many query heads of a key head, a CPU reads the pages again for each rather than storing what it read."""


class Products(NamedTuple):
    """pool [pages, page_size, Hkv, D]; pages [R, n] hold the C tokens of each row's chunk."""

    scores: Callable[[Array, Array, Array], Array]
    """(q [R, L, Hkv, G, D], pool, pages) -> [R, Hkv, L, G, C] fp32."""
    weighted: Callable[[Array, Array, Array], Array]
    """(weights [R, Hkv, L, G, C], pool, pages) -> [R, Hkv, L, G, D] fp32."""


def of_one_token(pool: Array, group: int, in_place: bool) -> Products:
    """For rows of one token (L = 1). group: query heads that share a key head; in_place: whether `IN_PLACE` may be
    used."""
    num_heads, features = pool.shape[2:]
    if in_place and group <= IN_PLACE_GROUP_MAX and features % cpu.LANES == 0:
        return IN_PLACE
    return BLOCK_DIAGONAL if 1 < num_heads <= BLOCK_DIAGONAL_HEADS_MAX else PLAIN


def _scores(q: Array, pool: Array, pages: Array) -> Array:
    return jnp.einsum("rlhgd,rchd->rhlgc", q, _read(pool, pages), preferred_element_type=jnp.float32)


def _weighted(weights: Array, pool: Array, pages: Array) -> Array:
    weights = weights.astype(pool.dtype)
    return jnp.einsum("rhlgc,rchd->rhlgd", weights, _read(pool, pages), preferred_element_type=jnp.float32)


PLAIN = Products(_scores, _weighted)


IN_PLACE = Products(
    lambda q, pool, pages: cpu.scores_in_place(q, partial(_read_anew, pool, pages)),
    lambda weights, pool, pages: cpu.weighted_in_place(weights, partial(_read_anew, pool, pages)),
)


def _scores_block_diagonal(q: Array, pool: Array, pages: Array) -> Array:
    R, _, Hkv, G, D = q.shape
    columns = q.reshape(R, Hkv, G, D).transpose(0, 1, 3, 2)
    own = jnp.eye(Hkv, dtype=bool)[:, None, :, None]
    wide = jnp.where(own, columns[:, :, :, None], 0).reshape(R, Hkv * D, Hkv * G)
    flat = _read(pool, pages).reshape(R, -1, Hkv * D)
    scores = jnp.einsum("rcf,rfn->rcn", flat, wide, preferred_element_type=jnp.float32)
    return scores.reshape(R, -1, Hkv, G).transpose(0, 2, 3, 1)[:, :, None]


def _weighted_block_diagonal(weights: Array, pool: Array, pages: Array) -> Array:
    R, Hkv, _, G, C = weights.shape
    flat = _read(pool, pages).reshape(R, C, -1)
    columns = weights.astype(pool.dtype).reshape(R, Hkv * G, C)
    wide = jnp.einsum("rnc,rcf->rnf", columns, flat, preferred_element_type=jnp.float32)
    own = jnp.eye(Hkv, dtype=bool)[:, None, :, None]
    return jnp.where(own, wide.reshape(R, Hkv, G, Hkv, -1), 0.0).sum(3)[:, :, None]


BLOCK_DIAGONAL = Products(_scores_block_diagonal, _weighted_block_diagonal)


def _read_anew(pool: Array, pages: Array, number: int) -> Array:
    """Like `_read`, in fp32, within the pass that uses it: one read for two passes would be stored."""
    pages, _ = jax.lax.optimization_barrier((pages, jnp.int32(number)))
    return _read(pool, pages).astype(jnp.float32)


def _read(pool: Array, pages: Array) -> Array:
    """The tokens of a chunk: [R, C, heads, features]."""
    return pool[pages].reshape(pages.shape[0], -1, *pool.shape[2:])
