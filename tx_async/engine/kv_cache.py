"""The paged KV cache on the device.

A pool holds the keys (or values, or MLA's latents) of all layers: [page_layers * pages, page_size, heads, features];
page p's part of the l-th layer in it is row `l * num_pages + p`. A sequence has a list of page numbers for each of its
page tables (`paging.py`): one for all layers, unless some see only a window; its token at position i lies in the page
i // page_size of each. Page 0 is the null page: unused rows write there and nobody reads it unmasked.
`paged_attention.py` reads the pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.engine import platform
from tx_async.engine.allocation import Allocate, on_device
from tx_async.engine.paging import ONE_TABLE, Paging
from tx_async.engine.platform import Platform
from tx_async.wire.worker import EngineConfig

Pools = dict[str, Array]
NULL_PAGE = 0
CACHE_PART = 4
"""The KV cache takes one part in CACHE_PART of a device's memory."""
MIN_STATES = 4
"""How many sequences of a recurrent model may always run at once."""


class CachedModel(Protocol):
    """What the cache must know about a model."""

    @property
    def window_layers(self) -> dict[int, int]: ...

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]: ...

    @property
    def state_layers(self) -> int: ...

    @property
    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]: ...


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of the cache, fixed at start."""

    num_pages: int
    page_size: int
    table_pages: int
    """Width of a page table: pages of the longest context, rounded up to whole chunks."""
    chunk_pages: int
    num_slots: int = 0
    """Slots of recurrent state, the null slot included."""
    decodes_in_place: bool = False
    """How a decode step reads pages (`page_products.py`) and writes states."""
    paging: Paging = ONE_TABLE

    @classmethod
    def plan(
        cls,
        cache_tokens: int,
        page_size: int,
        max_context_length: int,
        platform: Platform = platform.CPU,
        paging: Paging = ONE_TABLE,
        ahead: int = 0,
    ) -> CacheLayout:
        """Plan a cache of `cache_tokens`, in pages of `page_size` tokens; at least one sequence of the longest context
        always fits. ahead: tokens of one quantum, as for `Paging.at_once`."""
        chunk_pages = max(1, platform.cache_chunk_tokens // page_size)
        context_pages = -(-max_context_length // page_size)
        longest = sum(-(-tokens // page_size) for tokens in paging.at_once(max_context_length, ahead))
        return cls(
            num_pages=1 + max(-(-cache_tokens // page_size) * paging.num_tables, longest),
            page_size=page_size,
            table_pages=-(-context_pages // chunk_pages) * chunk_pages,
            chunk_pages=chunk_pages,
            decodes_in_place=platform.decodes_in_place,
            paging=paging,
        )

    @property
    def cache_tokens(self) -> int:
        """How many tokens have room in all tables."""
        return self.tokens_in(self.num_pages - 1)

    def tokens_in(self, num_pages: int) -> int:
        return num_pages * self.page_size // self.paging.num_tables

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def new_pools(
        self,
        model: CachedModel,
        dtype: Any,
        shardings: dict[str, NamedSharding] | None = None,
        allocate: Allocate = on_device,
    ) -> Pools:
        """Pools of zeros: of pages in `dtype`, and of recurrent state, whose `wide` parts are fp32."""
        lead = (self.paging.page_layers * self.num_pages, self.page_size)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for name, shape in model.cache_shapes.items():
            shapes[name] = ((*lead, *shape), dtype)
        for name, (shape, wide) in model.state_shapes.items():
            shapes[name] = ((model.state_layers * self.num_slots, *shape), jnp.float32 if wide else dtype)
        return allocate(lambda: {name: jnp.zeros(*shape) for name, shape in shapes.items()}, shardings)


def pool_shardings(model: CachedModel, mesh: Mesh) -> dict[str, NamedSharding]:
    """Heads are cut over the tensor axis, as the projections that make them; they stay whole where the axis does not
    divide their number."""

    def of(heads: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None, None, None if heads % mesh.shape["tensor"] else "tensor"))

    def of_state(shape: tuple[int, ...], wide: bool) -> NamedSharding:
        axis = "tensor" if _is_cut(shape, wide, mesh.shape["tensor"]) else None
        return NamedSharding(mesh, PartitionSpec(None, axis))

    states = {name: of_state(*state) for name, state in model.state_shapes.items()}
    return {name: of(heads) for name, (heads, _) in model.cache_shapes.items()} | states


def token_bytes(model: CachedModel, dtype: Any) -> int:
    """Bytes that one token occupies while all layers see it."""
    features = sum(heads * width for heads, width in model.cache_shapes.values())
    paging = Paging.of(model.window_layers)
    return paging.num_tables * paging.page_layers * features * jnp.dtype(dtype).itemsize


def state_bytes(model: CachedModel, dtype: Any, tensor: int = 1) -> int:
    """Bytes that the recurrent state of one sequence occupies over all layers, on one device of a mesh that cuts it
    into `tensor` pieces."""

    def of(shape: tuple[int, ...], wide: bool) -> int:
        whole = int(np.prod(shape)) * (4 if wide else jnp.dtype(dtype).itemsize)
        return whole // tensor if _is_cut(shape, wide, tensor) else whole

    return model.state_layers * sum(of(*state) for state in model.state_shapes.values())


def _is_cut(shape: tuple[int, ...], wide: bool, tensor: int) -> bool:
    """Only the fp32 part, which is by heads, is cut; the convolution's part stays whole."""
    return wide and shape[0] % tensor == 0


def state_slots(model: CachedModel, dtype: Any, config: EngineConfig, cache_bytes: int) -> tuple[int, int]:
    """(slots of running sequences, slots of snapshots): as many as may run, and as many again, while each of the two
    takes no more than a quarter of what the KV cache may take. A model without recurrent layers has none."""
    if not model.state_layers:
        return 0, 0
    fit = max(MIN_STATES, cache_bytes // 4 // state_bytes(model, dtype))
    count = min(config.sample_max_num_sequences, fit)
    return count, count if config.prefix_cache else 0


def copy_pages(pools: Pools, sources: Array, targets: Array, num_pages: int, names: tuple[str, ...] = ()) -> Pools:
    """Copy pages (or slots), every layer's part, in the pools called `names`, or in all pools without names. sources,
    targets int32 [n]; unused entries are 0 -> 0."""

    def copy(pool: Array) -> Array:
        layers = jnp.arange(pool.shape[0] // num_pages)[:, None] * num_pages
        return pool.at[layers + targets].set(pool[layers + sources])

    return {name: copy(pool) if not names or name in names else pool for name, pool in pools.items()}
