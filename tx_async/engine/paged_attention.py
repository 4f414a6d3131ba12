"""Attention over the paged KV cache (`kv_cache.py`).

It reads a sequence's pages in chunks at absolute positions and combines them by an online softmax in fp32. The number
of chunks is data, so the context length is never a shape; a chunk wholly past a row's end changes none of the row's
bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.engine import page_products
from tx_async.engine.kv_cache import NULL_PAGE, CacheLayout, Pools
from tx_async.engine.page_products import Products
from tx_async.engine.state_slots import NULL_SLOT
from tx_async.layers.attention import MASKED, with_sink
from tx_async.layers.cpu import written_row_by_row
from tx_async.layers.sharding import row_axis


class TileStates(NamedTuple):
    """What the rows of a prefill do to recurrent states; int32 [R]. Slot 0 is the null slot."""

    count: Any
    """How many tokens of a row are real."""
    load: Any
    """Slot of the state before a row's first token; at position 0 it is zeros."""
    store: Any
    """The slot that gets the state after its last token."""
    save: Any
    """A second such slot: a snapshot."""
    continues: Any
    """bool: whether the row before it ends where it begins."""


class PagedAttention:
    """`Attend` of a prefill: each row has tokens from a page boundary on; several rows may belong to one sequence."""

    def __init__(
        self,
        layout: CacheLayout,
        tables: Array,
        positions: Array,
        alive: Array,
        states: Any = None,
        kernel: bool = False,
        mesh: Mesh | None = None,
    ):
        """tables int32 [R, table_pages] or, where layers see different windows, one for each of the layout's tables:
        [tables, R, table_pages]; positions int32 [R, L], alive bool [R]: rows that may write. states: for
        recurrent layers, `TileStates`; in a decode step, the slot of each row. kernel: whether a kernel computes it
        where it can; on a mesh, each device for its own heads."""
        self.layout = layout
        self.states = states
        self.tables = tables
        self.positions = positions
        self.alive = alive
        self.kernel, self.mesh = kernel, mesh
        chunk_tokens = layout.chunk_pages * layout.page_size
        self.num_chunks = jnp.max(jnp.where(alive, positions[:, -1], 0)) // chunk_tokens + 1

    def __call__(
        self,
        cache: Pools,
        layer: Array,
        q: Array,
        k: Array,
        v: Array | None,
        scale: float,
        v_features: int = 0,
        window: int = 0,
        sinks: Array | None = None,
    ) -> tuple[Array, Pools]:
        new = {"k": k} if v is None else {"k": k, "v": v}
        written = {name: self.write(cache[name], layer, x, window) for name, x in new.items()}
        pools = list(written.values())
        out = None
        if self.kernel and self._divides_heads(q.shape[2] if v_features else k.shape[2]):
            out = self.in_kernel(pools, layer, q, scale, v_features, window, sinks)
        if out is None:
            out = self.attend(pools, layer, q, scale, v_features, window, sinks)
        return out, cache | written

    def place(self, layer: Array, window: int) -> tuple[Array, Array]:
        """Where the layer is, of those of its window: (its rows' page tables [R, table_pages], its place in a page)."""
        paging = self.layout.paging
        if paging.num_tables == 1:
            return self.tables, layer
        tables = paging.tables_of(window)
        if len(tables) == 1:
            return self.tables[tables.start], layer
        return self.tables[tables.start + layer // paging.page_layers], layer % paging.page_layers

    def recur(self, cache: Pools, layer: Array, rule: Any, x: Any) -> tuple[Array, Pools]:
        """Rows run one after another: a state may come from the row before, and only one is held."""
        states, first = self.states, layer * self.layout.num_slots
        begins = self.positions[:, 0] == 0
        loaded = jnp.where(begins[:, None, None], 0, cache["conv"][first + states.load])
        width = loaded.shape[1]
        before = jnp.roll(x.qkv[:, -width:], 1, axis=0)
        before = jnp.where(states.continues[:, None, None], before, loaded)
        after = rule.history(x, before, states.count)
        conv = cache["conv"].at[first + states.store].set(after).at[first + states.save].set(after)

        def one(carry: tuple[Array, Array], row: Any) -> tuple[tuple[Array, Array], Array]:
            held, pool = carry
            chunk, begins, states = row
            loaded = jnp.where(begins, 0, pool[first + states.load])
            held = jnp.where(states.continues, held, loaded)
            (held,), (out,) = jax.tree.map(lambda y: y[None], chunk)(held[None])
            pool = pool.at[first + states.store].set(held).at[first + states.save].set(held)
            return (held, pool), out

        rows = rule.chunk(x, before, states.count), begins, states
        (_, state), out = jax.lax.scan(one, (jnp.zeros_like(cache["state"][0]), cache["state"]), rows)
        return out, cache | {"conv": conv, "state": state}

    def write(self, pool: Array, layer: Array, new: Array, window: int) -> Array:
        """Write whole pages: what stands after a row's last token is overwritten before anything unmasks it. Pages past
        the sequence's last one are null."""
        L = new.shape[1]
        page_size = self.layout.page_size
        tables, layer = self.place(layer, window)
        first = self.positions[:, 0] // page_size
        columns = first[:, None] + jnp.arange(L // page_size)
        pages = jnp.take_along_axis(tables, columns, axis=1, mode="clip")
        is_there = self.alive[:, None] & (columns < tables.shape[1])
        pages = jnp.where(is_there, pages, NULL_PAGE) + layer * self.layout.num_pages
        return pool.at[pages.reshape(-1)].set(_finite(new).reshape(-1, page_size, *new.shape[2:]))

    def in_kernel(
        self,
        pools: list[Array],
        layer: Array,
        q: Array,
        scale: float,
        v_features: int,
        window: int,
        sinks: Array | None,
    ) -> Array | None:
        """`attend` as one kernel for a GPU; None where the kernel cannot run these shapes."""
        found = self._kernel(q, pools[0], v_features)
        if found is None:
            return None
        attend, queries, at = found
        run = partial(attend, scale=scale, v_features=v_features, window=window)
        tables, layer = self.place(layer, window)
        out = self._for_own_heads(run, queries, pools, tables, at, layer * self.layout.num_pages, sinks)
        return out.reshape(*q.shape[:3], -1)

    def _kernel(self, q: Array, keys: Array, v_features: int) -> tuple[Any, Array, Array] | None:
        """(the kernel, queries and positions as it takes them); None where it cannot run these shapes."""
        # Here, because a CPU that never needs Pallas should not wait for its import.
        from tx_async.engine import prefill_kernel

        if not prefill_kernel.fits(q, keys, self.layout.page_size, v_features):
            return None
        return prefill_kernel.attend, q, jnp.where(self.alive, self.positions[:, 0], -q.shape[1])

    def _divides_heads(self, num_heads: int) -> bool:
        """num_heads: key heads, or where one serves all, query heads."""
        return self.mesh is None or num_heads % self.mesh.shape["tensor"] == 0

    def _for_own_heads(
        self, run: Any, q: Array, pools: list[Array], tables: Array, at: Array, first_page: Array, sinks: Array | None
    ) -> Array:
        """run(q [R, …, H, D], pools, tables, positions, first page, sinks) -> [R, …, H, Dv]; on a mesh, on each device
        for its rows and heads. A pool of latents is whole on every device."""
        inputs = q, pools, tables, at, first_page, sinks
        if self.mesh is None:
            return run(*inputs)
        rows, pool = row_axis(self.mesh, q.shape[0]), PartitionSpec(None, None, "tensor" if len(pools) > 1 else None)
        mine, of_row = PartitionSpec(rows, *[None] * (q.ndim - 3), "tensor"), PartitionSpec(rows)
        specs = mine, pool, of_row, of_row, PartitionSpec(), PartitionSpec("tensor")
        # Rows come apart here and no earlier: the product that made them is a sum over `fsdp`, which then is all that
        # is exchanged. With its rows apart the compiler would gather the matrix.
        whole = NamedSharding(self.mesh, PartitionSpec(None, *mine[1:]))
        inputs = jax.lax.with_sharding_constraint(q, whole), *inputs[1:]
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=mine, check_vma=False)(*inputs)

    def attend(
        self,
        pools: list[Array],
        layer: Array,
        q: Array,
        scale: float,
        v_features: int,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """q [R, L, H, D], pools of keys and values [pages, page_size, Hkv, D] (with one pool, values are the first
        `v_features` of its keys) -> [R, L, H, Dv]. window, sinks: as in `Attend`."""
        R, L, H, D = q.shape
        kv_heads = pools[0].shape[2]
        q = q.reshape(R, L, kv_heads, H // kv_heads, D)
        chunk = partial(self._chunk, pools, self.place(layer, window), q, scale, window)
        features = v_features or pools[1].shape[3]
        shape = (R, kv_heads, L, H // kv_heads)
        start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, features)))
        top, total, out = jax.lax.fori_loop(self._first_chunk(window), self.num_chunks, chunk, start)
        if sinks is not None:
            top, total, out = with_sink(top, total, out, sinks.reshape(kv_heads, 1, -1))
        out = out / jnp.maximum(total, 1e-30)[..., None]
        return out.transpose(0, 2, 1, 3, 4).reshape(R, L, H, features).astype(q.dtype)

    def _first_chunk(self, window: int) -> Array | int:
        """The first chunk that is read: what lies before every row's window is skipped."""
        if not window:
            return 0
        oldest = jnp.where(self.alive, self.positions[:, 0], jnp.iinfo(jnp.int32).max)
        chunk_tokens = self.layout.chunk_pages * self.layout.page_size
        return jnp.minimum(jnp.maximum(jnp.min(oldest) - window + 1, 0) // chunk_tokens, self.num_chunks)

    def _chunk(
        self, pools: list[Array], place: tuple[Array, Array], q: Array, scale: float, window: int, c: Array, carry
    ):
        (top, total, out), (tables, layer) = carry, place
        width, group = self.layout.chunk_pages, q.shape[3]
        pages = jax.lax.dynamic_slice_in_dim(tables, c * width, width, axis=1) + layer * self.layout.num_pages
        scores = self._products(pools[0], group).scores(q, pools[0], pages) * scale
        positions = c * scores.shape[-1] + jnp.arange(scores.shape[-1])
        seen = positions <= self.positions[..., None]
        if window:
            seen &= positions > self.positions[..., None] - window
        seen = seen[:, None, :, None]  # (R, 1, L, 1, C)
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

    def _kernel(self, q: Array, keys: Array, v_features: int) -> tuple[Any, Array, Array] | None:
        from tx_async.engine import paged_kernel

        if not paged_kernel.fits(keys, self.layout.page_size, v_features):
            return None
        return paged_kernel.attend, q[:, 0], self.positions[:, 0]

    def recur(self, cache: Pools, layer: Array, rule: Any, x: Any) -> tuple[Array, Pools]:
        slots = layer * self.layout.num_slots + jnp.where(self.alive, self.states, NULL_SLOT)
        begins = self.positions[:, :1] == 0  # a prompt of one token has no prefill
        before = jnp.where(begins[..., None], 0, cache["conv"][slots])
        held = jnp.where(begins[..., None, None], 0, cache["state"][slots])
        write, out = rule.step(x, before, held)
        after = rule.history(x, before, jnp.ones(len(slots), jnp.int32))
        if self.layout.decodes_in_place and self.mesh is None:
            states = written_row_by_row(cache["state"], slots, write, held)
        else:
            states = cache["state"].at[slots].set(write(held))
        return out, cache | {"conv": cache["conv"].at[slots].set(after), "state": states}

    def write(self, pool: Array, layer: Array, new: Array, window: int) -> Array:
        page_size = self.layout.page_size
        tables, layer = self.place(layer, window)
        position = self.positions[:, 0]
        pages = jnp.take_along_axis(tables, position[:, None] // page_size, axis=1, mode="clip")[:, 0]
        pages = jnp.where(self.alive, pages, NULL_PAGE) + layer * self.layout.num_pages
        return pool.at[pages, position % page_size].set(_finite(new[:, 0]))

    def _products(self, pool: Array, group: int) -> Products:
        return page_products.of_one_token(pool, group, self.layout.decodes_in_place)


def _finite(x: Array) -> Array:
    """A masked weight is an exact zero, but 0 × NaN is NaN: no tenant may ever leave a NaN in a page."""
    return jnp.nan_to_num(x)
