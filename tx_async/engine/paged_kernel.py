"""Paged attention of a decode step as one kernel: pages are read where they lie, lengths and tables are data.

For a GPU, in Pallas (Triton). A program of the kernel handles one row, one key head with its query heads, and one part
of the row's pages; parts are combined afterwards by their log-sum-exp, so that a long row alone keeps the whole device
busy (FlashDecoding). `paged_attention.py` computes the same with XLA alone, and this kernel is tested against it.
`prefill_kernel.py` is the one of a prefill.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tx_async.layers.attention import MASKED

BLOCK_TOKENS = 64
"""How many keys a program reads at once."""
GROUP_MIN = 16
"""The fewest rows that a tensor core takes: fewer query heads of a key head are padded with zeros."""
PROGRAMS = 264
"""Two programs for each multiprocessor of an H100: rows are split until there are about as many."""
SPLITS_MAX = 32


def fits(pool: Array, page_size: int) -> bool:
    """Whether a kernel can read such pages: the sides of Triton's blocks are powers of two; in fp32 its products would
    be rounded to tf32."""
    features = pool.shape[-1]
    return (
        pool.dtype.itemsize == 2
        and features & (features - 1) == 0
        and 16 <= features <= 256
        and BLOCK_TOKENS % page_size == 0
    )


def read_block(i: Array, keys_ref: Any, values_ref: Any, table_ref: Any, first_page: Array) -> tuple[Array, Array]:
    """Block i of a row whose pages stand in table_ref [n]; pools [pages, page_size, D] -> keys, values [BLOCK_TOKENS,
    D]."""
    pages_at_once = BLOCK_TOKENS // keys_ref.shape[1]
    pages = table_ref[pl.ds(i * pages_at_once, pages_at_once)] + first_page
    return keys_ref[pages].reshape(BLOCK_TOKENS, -1), values_ref[pages].reshape(BLOCK_TOKENS, -1)


def add_block(
    so_far: tuple[Array, Array, Array], q: Array, keys: Array, values: Array, seen: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Take a block of keys into an online softmax: (weighted values [n, D], largest scores, sums of weights [n]), fp32.
    q [n, D], keys, values [BLOCK_TOKENS, D], seen bool [n or 1, BLOCK_TOKENS]."""
    out, top, total = so_far
    scores = jnp.where(seen, plgpu.dot(q, keys.T) * scale, MASKED)
    new_top = jnp.maximum(top, scores.max(1))
    weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
    added = plgpu.dot(weights.astype(values.dtype), values)
    return out * shrink[:, None] + added, new_top, total * shrink + weights.sum(1)


def attend(
    q: Array,
    keys: Array,
    values: Array,
    tables: Array,
    positions: Array,
    first_page: Array,
    scale: float,
    window: int = 0,
    interpret: bool = False,
) -> Array:
    """q [R, H, D], keys, values [pages, page_size, Hkv, D] -> [R, H, D].

    Each row is one token, whose own key is in its page already. tables int32 [R, n]: its pages, counted from
    `first_page` (a layer's). positions int32 [R]: its position. window: how many keys it sees, its own included; 0 =
    all.
    """
    num_rows, num_heads, features = q.shape
    page_size, kv_heads = keys.shape[1:3]
    group = num_heads // kv_heads
    grouped = _padded(q.reshape(num_rows, kv_heads, group, features), GROUP_MIN)
    splits = _splits(num_rows * kv_heads, tables.shape[1] * page_size)
    out, top, total = _parts(grouped, keys, values, tables, positions, first_page, scale, window, splits, interpret)
    share = jnp.exp(top - top.max(2, keepdims=True)) * jnp.ones_like(total)
    whole = (out * share[..., None]).sum(2) / jnp.maximum((total * share).sum(2), 1e-30)[..., None]
    return whole[:, :, :group].reshape(num_rows, num_heads, -1).astype(q.dtype)


def _splits(num_programs: int, tokens: int) -> int:
    """The parts of a row: a power of two, and no more parts than blocks."""
    wanted = max(1, min(PROGRAMS // num_programs, SPLITS_MAX, tokens // BLOCK_TOKENS))
    return 1 << (wanted.bit_length() - 1)


def _padded(q: Array, least: int) -> Array:
    group = max(least, 1 << (q.shape[2] - 1).bit_length())
    return jnp.pad(q, ((0, 0), (0, 0), (0, group - q.shape[2]), (0, 0)))


def _parts(
    q: Array,
    keys: Array,
    values: Array,
    tables: Array,
    positions: Array,
    first_page: Array,
    scale: float,
    window: int,
    splits: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """-> (weighted values [R, Hkv, splits, G, D], largest scores and sums of weights [R, Hkv, splits, G]), fp32."""
    num_rows, kv_heads, group, features = q.shape
    out_features = values.shape[-1]
    of_row: Any = pl.BlockSpec((None, tables.shape[1]), lambda r, h, s: (r, 0))
    one: Any = lambda x: pl.BlockSpec(x.shape, lambda r, h, s: (0,) * x.ndim)  # noqa: E731
    pool: Any = lambda x: pl.BlockSpec(  # noqa: E731
        (x.shape[0], x.shape[1], None, x.shape[3]), lambda r, h, s: (0, 0, h, 0)
    )
    statistic = pl.BlockSpec((None, None, None, group), lambda r, h, s: (r, h, s, 0))
    lead = (num_rows, kv_heads, splits, group)
    return pl.pallas_call(
        partial(_kernel, scale=scale, window=window, splits=splits),
        grid=(num_rows, kv_heads, splits),
        in_specs=[
            pl.BlockSpec((None, None, group, features), lambda r, h, s: (r, h, 0, 0)),
            pool(keys),
            pool(values),
            of_row,
            pl.BlockSpec((1,), lambda r, h, s: (r,)),
            one(first_page.reshape(1)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, group, out_features), lambda r, h, s: (r, h, s, 0, 0)),
            statistic,
            statistic,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, out_features), jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(q, keys, values, tables, positions, first_page.reshape(1))


def _kernel(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    table_ref: Any,
    position_ref: Any,
    first_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    scale: float,
    window: int,
    splits: int,
) -> None:
    q, position, first_page = q_ref[...], position_ref[0], first_ref[0]
    oldest = jnp.maximum(position - window + 1, 0) if window else 0
    first, end = oldest // BLOCK_TOKENS, position // BLOCK_TOKENS + 1
    each = (end - first + splits - 1) // splits
    start = first + pl.program_id(2) * each

    def add(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, values = read_block(i, keys_ref, values_ref, table_ref, first_page)
        places = i * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS)
        seen = (places <= position) & (places >= oldest)
        return add_block(so_far, q, keys, values, seen[None, :], scale)

    group = q.shape[0]
    nothing = (jnp.zeros(out_ref.shape, jnp.float32), jnp.full((group,), MASKED), jnp.zeros((group,)))
    out, top, total = jax.lax.fori_loop(start, jnp.minimum(start + each, end), add, nothing)
    out_ref[...], top_ref[...], total_ref[...] = out, top, total
