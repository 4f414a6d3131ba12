"""Paged attention of a prefill as one kernel: pages are read where they lie, starts and tables are data.

For a GPU, in Pallas (Triton). A program of the kernel handles a block of one row's queries, of one head, and goes over
the blocks of keys that those queries see (FlashAttention-2, arXiv 2307.08691): neither what comes after them nor what
lies before all their windows is read. `paged_attention.py` computes the same with XLA alone, and this kernel is tested
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tx_async.engine import paged_kernel
from tx_async.engine.paged_kernel import PageEntry, add_block, entry_of
from tx_async.layers.attention import MASKED

BLOCK_QUERIES = 128
"""Queries of a program. Of wide heads half as many, whose blocks fit in the memory of a multiprocessor."""
WIDE = 128


def fits(q: Array, pool: Array, page_size: int, v_features: int = 0) -> bool:
    """Whether the kernel can run these shapes: rows are blocks of queries, whose sides are powers of two. v_features:
    as in `Attend`."""
    length = q.shape[1]
    return paged_kernel.fits(pool, page_size, v_features) and length >= 16 and length & (length - 1) == 0


def attend(
    q: Array,
    pools: Sequence[Array],
    tables: Array,
    starts: Array,
    first_page: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    v_features: int = 0,
    window: int = 0,
    interpret: bool = False,
) -> Array:
    """q [R, L, H, D], pools of keys and values [pages, page_size, Hkv, D] -> [R, L, H, Dv].

    Each row has L consecutive tokens of a sequence, whose own keys are in its pages already. tables int32 [R, n]: its
    pages, counted from `first_page` (a layer's). starts int32 [R]: the position of its first token; -L for a row that
    is not alive, which then sees nothing, and gets zeros. v_features, window, sinks: as in `Attend`; with v_features
    there is the pool of keys alone.
    """
    num_rows, length, num_heads, features = q.shape
    entry, v_features = entry_of(features, v_features), v_features or pools[1].shape[-1]
    block = min(length, BLOCK_QUERIES if features <= WIDE else BLOCK_QUERIES // 2)
    group = num_heads // pools[0].shape[2]
    mine: Any = lambda features: pl.BlockSpec((None, block, None, features), lambda h, i, r: (r, i, h, 0))  # noqa: E731
    pool: Any = lambda x: pl.BlockSpec(  # noqa: E731
        (x.shape[0], x.shape[1], None, x.shape[3]), lambda h, i, r: (0, 0, h // group, 0)
    )
    return pl.pallas_call(
        partial(_kernel, entry=entry, scale=scale, window=window),
        grid=(num_heads, length // block, num_rows),
        in_specs=[
            mine(features),
            *(pool(x) for x in pools),
            pl.BlockSpec((None, tables.shape[1]), lambda h, i, r: (r, 0)),
            pl.BlockSpec((1,), lambda h, i, r: (r,)),
            pl.BlockSpec((1,), lambda h, i, r: (0,)),
            pl.BlockSpec((1,), lambda h, i, r: (h,)),
        ],
        out_specs=mine(v_features),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], v_features), q.dtype),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=8 if block > 32 else 4, num_stages=2),
        interpret=interpret,
        name="paged_prefill",
    )(q, *pools, tables, starts, first_page.reshape(1), _or_none_of(sinks, num_heads))


def _or_none_of(sinks: Array | None, num_heads: int) -> Array:
    """Sinks that take no part where there are none."""
    return jnp.full((num_heads,), MASKED) if sinks is None else sinks


def _kernel(q_ref: Any, *refs: Any, entry: PageEntry, scale: float, window: int) -> None:
    *pools, table_ref, start_ref, first_ref, sink_ref, out_ref = refs
    q, first_page, tokens = entry.read(q_ref, slice(None)), first_ref[0], entry.block_tokens
    num_queries = q_ref.shape[0]
    begin = start_ref[0] + pl.program_id(1) * num_queries
    positions = begin + jnp.arange(num_queries)
    # The last tile of a prompt may go on behind its table: nobody wants what these queries see.
    num_blocks = table_ref.shape[0] * pools[0].shape[1] // tokens
    end = jnp.minimum((begin + num_queries + tokens - 1) // tokens, num_blocks)
    start = jnp.maximum(begin - window + 1, 0) // tokens if window else 0

    def add(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, values = entry.read_block(i, pools, table_ref, first_page)
        places = i * tokens + jnp.arange(tokens)
        seen = places[None, :] <= positions[:, None]
        if window:
            seen &= places[None, :] > positions[:, None] - window
        return add_block(so_far, q, keys, values, seen, scale)

    # A sink is a logit without a value: what a softmax has seen before any key.
    so_far = (jnp.zeros(out_ref.shape, jnp.float32), jnp.full((num_queries,), sink_ref[0]), jnp.ones((num_queries,)))
    out, _, total = jax.lax.fori_loop(start, end, add, so_far)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
