"""Attention over the paged KV cache (`kv_cache.py`).

It reads a sequence's pages in chunks at absolute positions and combines them by an online softmax in fp32. The number
of chunks is data, so context length is never a shape; a chunk that lies wholly behind a row's end changes none of its
bits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.engine import page_products
from tx_async.engine.kv_cache import NULL_PAGE, CacheLayout, Pools
from tx_async.engine.page_products import Products
from tx_async.layers.attention import MASKED


class PagedAttention:
    """`Attend` of a prefill: each row has tokens from a page boundary on; several rows may belong to one sequence."""

    def __init__(self, layout: CacheLayout, tables: Array, positions: Array, alive: Array):
        """tables int32 [R, table_pages], positions int32 [R, L], alive bool [R]: rows that may write."""
        self.layout = layout
        self.tables = tables
        self.positions = positions
        self.alive = alive
        chunk_tokens = layout.chunk_pages * layout.page_size
        self.num_chunks = jnp.max(jnp.where(alive, positions[:, -1], 0)) // chunk_tokens + 1

    def __call__(
        self, cache: Pools, layer: Array, q: Array, k: Array, v: Array | None, scale: float, v_features: int = 0
    ) -> tuple[Array, Pools]:
        new = {"k": k} if v is None else {"k": k, "v": v}
        cache = {name: self.write(cache[name], layer, new[key]) for name, key in zip(cache, new, strict=True)}
        return self.attend(list(cache.values()), layer, q, scale, v_features), cache

    def write(self, pool: Array, layer: Array, new: Array) -> Array:
        """Whole pages: what stands behind a row's last token is overwritten before anything unmasks it."""
        L = new.shape[1]
        page_size = self.layout.page_size
        first = self.positions[:, 0] // page_size
        columns = first[:, None] + jnp.arange(L // page_size)
        pages = jnp.take_along_axis(self.tables, columns, axis=1, mode="clip")
        pages = jnp.where(self.alive[:, None], pages, NULL_PAGE) + layer * self.layout.num_pages
        return pool.at[pages.reshape(-1)].set(_finite(new).reshape(-1, page_size, *new.shape[2:]))

    def attend(self, pools: list[Array], layer: Array, q: Array, scale: float, v_features: int) -> Array:
        R, L, H, D = q.shape
        kv_heads = pools[0].shape[2]
        q = q.reshape(R, L, kv_heads, H // kv_heads, D)
        chunk = partial(self._chunk, pools, layer, q, scale)
        features = v_features or pools[1].shape[3]
        shape = (R, kv_heads, L, H // kv_heads)
        start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, features)))
        _, total, out = jax.lax.fori_loop(0, self.num_chunks, chunk, start)
        out = out / jnp.maximum(total, 1e-30)[..., None]
        return out.transpose(0, 2, 1, 3, 4).reshape(R, L, H, features).astype(q.dtype)

    def _chunk(self, pools: list[Array], layer: Array, q: Array, scale: float, c: Array, carry):
        top, total, out = carry
        width, group = self.layout.chunk_pages, q.shape[3]
        pages = jax.lax.dynamic_slice_in_dim(self.tables, c * width, width, axis=1) + layer * self.layout.num_pages
        scores = self._products(pools[0], group).scores(q, pools[0], pages) * scale
        positions = c * scores.shape[-1] + jnp.arange(scores.shape[-1])
        seen = (positions <= self.positions[..., None])[:, None, :, None]  # (R, 1, L, 1, C)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        added = self._products(pools[-1], group).weighted(weights, pools[-1], pages)[..., : out.shape[-1]]
        return new_top, total * keep + weights.sum(-1), out * keep[..., None] + added

    def _products(self, pool: Array, group: int) -> Products:
        """group: query heads that share a key head."""
        return page_products.PLAIN


class DecodeAttention(PagedAttention):
    """`Attend` of a decode step: one token per row, anywhere in its page."""

    def write(self, pool: Array, layer: Array, new: Array) -> Array:
        page_size = self.layout.page_size
        position = self.positions[:, 0]
        pages = jnp.take_along_axis(self.tables, position[:, None] // page_size, axis=1, mode="clip")[:, 0]
        pages = jnp.where(self.alive, pages, NULL_PAGE) + layer * self.layout.num_pages
        return pool.at[pages, position % page_size].set(_finite(new[:, 0]))

    def _products(self, pool: Array, group: int) -> Products:
        return page_products.of_one_token(pool, group)


def _finite(x: Array) -> Array:
    """A masked weight is an exact zero, but 0 × NaN is NaN: what one tenant leaves in a page must never be that."""
    return jnp.nan_to_num(x)
