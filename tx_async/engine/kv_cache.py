"""The paged KV cache on the device, and attention over it.

A pool holds the keys (or values, or MLA's latents) of every layer: [layers * pages, page_size, heads, features]; page
p of layer l is row `l * num_pages + p`. A sequence owns a list of page numbers, the same in every layer; its token at
position i lies in its page i // page_size. Page 0 is the null page: unused rows write there and nobody reads it
unmasked.

Attention reads a sequence's pages in chunks at absolute positions and combines them by an online softmax in fp32. The
number of chunks is data, so context length is never a shape; a chunk that lies wholly behind a row's end changes none
of its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.layers.attention import MASKED
from tx_async.layers.norm import row_sums

Pools = dict[str, Array]
NULL_PAGE = 0
CHUNK_TOKENS = {"cpu": 64, "gpu": 512, "tpu": 512}
"""Keys of each row that one turn of the attention loop reads: few enough for a CPU's cache, many for an accelerator."""
BLOCK_DIAGONAL_HEADS_MAX = 8
"""Up to here the products with zeros cost less than laying each head's keys together."""
IN_PLACE_GROUP_MAX = 2
"""Query heads of a key head up to which a CPU rather reads the pages again for each than stores what it read."""
LANES = 8


class CachedModel(Protocol):
    """What the cache must know of a model."""

    @property
    def cache_layers(self) -> int: ...

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of the cache, fixed at start."""

    num_pages: int
    page_size: int
    table_pages: int
    """Width of a page table: pages of the longest context, rounded up to whole chunks."""
    chunk_pages: int

    @classmethod
    def plan(cls, cache_tokens: int, page_size: int, max_context_length: int, platform: str = "cpu") -> CacheLayout:
        """At least one sequence of the longest context always fits."""
        chunk_pages = max(1, CHUNK_TOKENS.get(platform, 512) // page_size)
        context_pages = -(-max_context_length // page_size)
        return cls(
            num_pages=1 + max(-(-cache_tokens // page_size), context_pages),
            page_size=page_size,
            table_pages=-(-context_pages // chunk_pages) * chunk_pages,
            chunk_pages=chunk_pages,
        )

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def new_pools(self, model: CachedModel, dtype: Any, shardings: dict[str, NamedSharding] | None = None) -> Pools:
        lead = (model.cache_layers * self.num_pages, self.page_size)
        return {
            name: jnp.zeros((*lead, *shape), dtype, device=shardings[name] if shardings else None)
            for name, shape in model.cache_shapes.items()
        }


def pool_shardings(model: CachedModel, mesh: Mesh) -> dict[str, NamedSharding]:
    """Heads over the tensor axis, as the projections that make them; whole where their number does not divide."""

    def of(heads: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None, None, None if heads % mesh.shape["tensor"] else "tensor"))

    return {name: of(heads) for name, (heads, _) in model.cache_shapes.items()}


def token_bytes(model: CachedModel, dtype: Any) -> int:
    """Bytes that one token occupies over all layers."""
    features = sum(heads * width for heads, width in model.cache_shapes.values())
    return model.cache_layers * features * jnp.dtype(dtype).itemsize


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
        width = self.layout.chunk_pages
        pages = jax.lax.dynamic_slice_in_dim(self.tables, c * width, width, axis=1) + layer * self.layout.num_pages
        scores = self._scores(q, pools[0], pages) * scale
        positions = c * scores.shape[-1] + jnp.arange(scores.shape[-1])
        seen = (positions <= self.positions[..., None])[:, None, :, None]  # (R, 1, L, 1, C)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        added = self._weighted(weights, pools[-1], pages)[..., : out.shape[-1]]
        return new_top, total * keep + weights.sum(-1), out * keep[..., None] + added

    def _scores(self, q: Array, pool: Array, pages: Array) -> Array:
        """q [R, L, Hkv, G, D], keys on pages [R, n] -> [R, Hkv, L, G, C] fp32."""
        return jnp.einsum("rlhgd,rchd->rhlgc", q, _read(pool, pages), preferred_element_type=jnp.float32)

    def _weighted(self, weights: Array, pool: Array, pages: Array) -> Array:
        """weights [R, Hkv, L, G, C], values on pages [R, n] -> [R, Hkv, L, G, D] fp32."""
        weights = weights.astype(pool.dtype)
        return jnp.einsum("rhlgc,rchd->rhlgd", weights, _read(pool, pages), preferred_element_type=jnp.float32)


class DecodeAttention(PagedAttention):
    """`Attend` of a decode step: one token per row, anywhere in its page. What costs is moving keys and values about.

    Where few query heads share a key head a CPU goes over the pages once for each of them and stores nothing of what it
    read. Otherwise, with few key heads, all heads' products are one: a query is laid into its key head's part of a
    column of zeros and meets the keys as they lie in the page.
    """

    def write(self, pool: Array, layer: Array, new: Array) -> Array:
        page_size = self.layout.page_size
        position = self.positions[:, 0]
        pages = jnp.take_along_axis(self.tables, position[:, None] // page_size, axis=1, mode="clip")[:, 0]
        pages = jnp.where(self.alive, pages, NULL_PAGE) + layer * self.layout.num_pages
        return pool.at[pages, position % page_size].set(_finite(new[:, 0]))

    def _scores(self, q: Array, pool: Array, pages: Array) -> Array:
        R, _, Hkv, G, D = q.shape
        if _in_place(G, D):
            heads = [_scores_in_place(q[:, 0, :, g], _read_anew(pool, pages, g)) for g in range(G)]
            return jnp.stack(heads, axis=2)[:, :, None]
        if not 1 < Hkv <= BLOCK_DIAGONAL_HEADS_MAX:
            return super()._scores(q, pool, pages)
        columns = q.reshape(R, Hkv, G, D).transpose(0, 1, 3, 2)
        own = jnp.eye(Hkv, dtype=bool)[:, None, :, None]
        wide = jnp.where(own, columns[:, :, :, None], 0).reshape(R, Hkv * D, Hkv * G)
        flat = _read(pool, pages).reshape(R, -1, Hkv * D)
        scores = jnp.einsum("rcf,rfn->rcn", flat, wide, preferred_element_type=jnp.float32)
        return scores.reshape(R, -1, Hkv, G).transpose(0, 2, 3, 1)[:, :, None]

    def _weighted(self, weights: Array, pool: Array, pages: Array) -> Array:
        R, Hkv, _, G, C = weights.shape
        if _in_place(G, pool.shape[-1]):
            heads = [_weighted_in_place(weights[:, :, 0, g], _read_anew(pool, pages, g)) for g in range(G)]
            return jnp.stack(heads, axis=2)[:, :, None]
        if not 1 < Hkv <= BLOCK_DIAGONAL_HEADS_MAX:
            return super()._weighted(weights, pool, pages)
        flat = _read(pool, pages).reshape(R, C, -1)
        columns = weights.astype(pool.dtype).reshape(R, Hkv * G, C)
        wide = jnp.einsum("rnc,rcf->rnf", columns, flat, preferred_element_type=jnp.float32)
        own = jnp.eye(Hkv, dtype=bool)[:, None, :, None]
        return jnp.where(own, wide.reshape(R, Hkv, G, Hkv, -1), 0.0).sum(3)[:, :, None]


def _in_place(group: int, features: int) -> bool:
    return jax.default_backend() == "cpu" and group <= IN_PLACE_GROUP_MAX and features % LANES == 0


def _scores_in_place(q: Array, keys: Array) -> Array:
    """q [R, Hkv, D], one query head of each key head, keys [R, C, Hkv, D] -> [R, Hkv, C] fp32. Summed over all but the
    last lanes, which a CPU does in its registers, then over those."""
    *lead, Hkv, D = keys.shape
    split = (Hkv, D // LANES, LANES)
    lanes = (keys.reshape(*lead, *split) * q.astype(jnp.float32).reshape(-1, 1, *split)).sum(3)
    return row_sums(lanes)[..., 0].transpose(0, 2, 1)


def _weighted_in_place(weights: Array, values: Array) -> Array:
    """weights [R, Hkv, C] of one query head of each key head, values [R, C, Hkv, D] -> [R, Hkv, D] fp32."""
    return (values * weights.transpose(0, 2, 1)[..., None]).sum(1)


def _read_anew(pool: Array, pages: Array, number: int) -> Array:
    """As `_read`, in fp32, within the pass that uses it: were it the same for two passes, it would be stored."""
    pages, _ = jax.lax.optimization_barrier((pages, jnp.int32(number)))
    return _read(pool, pages).astype(jnp.float32)


def _read(pool: Array, pages: Array) -> Array:
    """Tokens of a chunk: [R, C, heads, features]."""
    return pool[pages].reshape(pages.shape[0], -1, *pool.shape[2:])


def _finite(x: Array) -> Array:
    """A masked weight is an exact zero, but 0 × NaN is NaN: what one tenant leaves in a page must never be that."""
    return jnp.nan_to_num(x)


def copy_pages(pools: Pools, sources: Array, targets: Array, num_pages: int) -> Pools:
    """Copy pages in every layer. sources, targets int32 [n]; unused entries are 0 -> 0."""

    def copy(pool: Array) -> Array:
        layers = jnp.arange(pool.shape[0] // num_pages)[:, None] * num_pages
        return pool.at[layers + targets].set(pool[layers + sources])

    return {name: copy(pool) for name, pool in pools.items()}
