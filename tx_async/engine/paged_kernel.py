"""Paged attention of a decode step as one kernel: pages are read where they lie, lengths and tables are data.

For a GPU, in Pallas (Triton). A program of the kernel handles one row, query heads that share a key head, and one part
of the row's pages; parts are combined afterwards by their log-sum-exp, so that a long row alone keeps the whole device
busy (FlashDecoding). `paged_attention.py` computes the same with XLA alone, and this kernel is tested against it.
`prefill_kernel.py` is the one of a prefill.

Latent attention (`layers/mla.py`) has one pool, whose only head all query heads share and whose first features are the
values: a block of it is read once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tx_async.layers.attention import MASKED, with_sink

GROUP_MIN = 16
"""The fewest rows that a tensor core takes: of fewer query heads of a key head, the last one fills them."""
PROGRAMS = 264
"""Two programs for each multiprocessor of an H100: rows are split until there are about as many."""
SPLITS_MAX = 32


class PageEntry(NamedTuple):
    """What a token has in the pages of one key head, and how many tokens a program reads at once."""

    parts: tuple[int, ...]
    """The features of its key in pieces whose sizes are powers of two, as are the sides of Triton's blocks."""
    v_features: int = 0
    """How many of the first features are its value; 0 = values have a pool of their own."""

    @property
    def block_tokens(self) -> int:
        return 32 if self.v_features else 64

    @property
    def block_heads(self) -> int:
        """The most query heads of a program: sums over wide values fill the registers."""
        return 64 if self.v_features else 256

    def read(self, ref: Any, index: Any) -> list[Array]:
        """ref[index] in pieces of its last axis: [rows, part] each."""
        if len(self.parts) == 1:
            return [_rows(ref[index])]
        middle, starts = (slice(None),) * (len(ref.shape) - 2), (sum(self.parts[:n]) for n in range(len(self.parts)))
        return [_rows(ref[index, *middle, pl.ds(start, n)]) for start, n in zip(starts, self.parts, strict=True)]

    def read_block(
        self, i: Array, pools: Sequence[Any], table_ref: Any, first_page: Array
    ) -> tuple[list[Array], Array]:
        """Block i of a row whose pages stand in table_ref [n]; pools [pages, page_size, D] -> keys in pieces, values
        [block_tokens, D]."""
        pages_at_once = self.block_tokens // pools[0].shape[1]
        pages = table_ref[pl.ds(i * pages_at_once, pages_at_once)] + first_page
        keys = self.read(pools[0], pages)
        return keys, keys[0] if self.v_features else _rows(pools[1][pages])


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def entry_of(features: int, v_features: int) -> PageEntry:
    """features of a key; v_features as in `Attend`."""
    return PageEntry((v_features, features - v_features), v_features) if v_features else PageEntry((features,))


def fits(pool: Array, page_size: int, v_features: int = 0) -> bool:
    """Whether a kernel can read such pages of keys; in fp32 its products would be rounded to tf32. v_features: as in
    `Attend`."""
    entry, widest = entry_of(pool.shape[-1], v_features), 512 if v_features else 256
    return (
        pool.dtype.itemsize == 2
        and all(part & (part - 1) == 0 and 16 <= part <= widest for part in entry.parts)
        and entry.block_tokens % page_size == 0
    )


def add_block(
    so_far: tuple[Array, Array, Array],
    q: Sequence[Array],
    keys: Sequence[Array],
    values: Array,
    seen: Array,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Take a block of keys into an online softmax: (weighted values [n, Dv], largest scores, sums of weights [n]), in
    fp32. q [n, D] and keys [block_tokens, D] in pieces, values [block_tokens, Dv], seen bool [n or 1, block_tokens]."""
    out, top, total = so_far
    products = [plgpu.dot(q_part, k_part.T) for q_part, k_part in zip(q, keys, strict=True)]
    scores = jnp.where(seen, sum(products[1:], products[0]) * scale, MASKED)
    new_top = jnp.maximum(top, scores.max(1))
    weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
    added = plgpu.dot(weights.astype(values.dtype), values)
    return out * shrink[:, None] + added, new_top, total * shrink + weights.sum(1)


def attend(
    q: Array,
    pools: Sequence[Array],
    tables: Array,
    positions: Array,
    first_page: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    v_features: int = 0,
    window: int = 0,
    interpret: bool = False,
) -> Array:
    """q [R, H, D], pools of keys and values [pages, page_size, Hkv, D] -> [R, H, Dv].

    Each row is one token, whose own key is in its page already. tables int32 [R, n]: its pages, counted from
    `first_page` (a layer's). positions int32 [R]: its position. v_features, window, sinks: as in `Attend`; with
    v_features there is the pool of keys alone.
    """
    num_rows, num_heads, features = q.shape
    page_size, kv_heads = pools[0].shape[1:3]
    entry = entry_of(features, v_features)
    group = num_heads // kv_heads
    blocks = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= entry.block_heads)
    grouped = q.reshape(num_rows, kv_heads * blocks, group // blocks, features)
    splits = _splits(num_rows * kv_heads * blocks, tables.shape[1] * page_size // entry.block_tokens)
    kernel = partial(_kernel, entry=entry, scale=scale, window=window, splits=splits)
    where = tables, positions, first_page.reshape(1)
    parts, tops, totals = _parts(kernel, grouped, pools, where, v_features or pools[1].shape[-1], splits, interpret)
    top = tops.max(2)
    share = jnp.exp(tops - top[:, :, None])
    total, out = (totals * share).sum(2), (parts * share[..., None]).sum(2)
    if sinks is not None:
        top, total, out = with_sink(top, total, out, sinks.reshape(grouped.shape[1:3]))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(num_rows, num_heads, -1).astype(q.dtype)


def _splits(num_programs: int, blocks: int) -> int:
    """The parts of a row of so many blocks: a power of two, and no more parts than blocks."""
    wanted = max(1, min(PROGRAMS // num_programs, SPLITS_MAX, blocks))
    return 1 << (wanted.bit_length() - 1)


def _parts(
    kernel: Any,
    q: Array,
    pools: Sequence[Array],
    where: tuple[Array, Array, Array],
    v_features: int,
    splits: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """q [R, N, G, D] in N blocks of heads -> (weighted values [R, N, splits, G, Dv], largest scores and sums of weights
    [R, N, splits, G]), fp32."""
    num_rows, num_blocks, group, features = q.shape
    tables, positions, first_page = where
    each = num_blocks // pools[0].shape[2]
    pool: Any = lambda x: pl.BlockSpec(  # noqa: E731
        (x.shape[0], x.shape[1], None, x.shape[3]), lambda r, h, s: (0, 0, h // each, 0)
    )
    statistic = pl.BlockSpec((None, None, None, group), lambda r, h, s: (r, h, s, 0))
    lead = (num_rows, num_blocks, splits, group)
    return pl.pallas_call(
        kernel,
        grid=lead[:3],
        in_specs=[
            pl.BlockSpec((None, None, group, features), lambda r, h, s: (r, h, 0, 0)),
            *(pool(x) for x in pools),
            pl.BlockSpec((None, tables.shape[1]), lambda r, h, s: (r, 0)),
            pl.BlockSpec((1,), lambda r, h, s: (r,)),
            pl.BlockSpec((1,), lambda r, h, s: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, group, v_features), lambda r, h, s: (r, h, s, 0, 0)),
            statistic,
            statistic,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, v_features), jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=8 if group > 32 else 4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(q, *pools, tables, positions, first_page)


def _kernel(q_ref: Any, *refs: Any, entry: PageEntry, scale: float, window: int, splits: int) -> None:
    *pools, table_ref, position_ref, first_ref, out_ref, top_ref, total_ref = refs
    group = q_ref.shape[0]
    height = max(GROUP_MIN, 1 << (group - 1).bit_length())
    heads = jnp.minimum(jnp.arange(height), group - 1)
    q = entry.read(q_ref, heads)
    position, first_page = position_ref[0], first_ref[0]
    oldest = jnp.maximum(position - window + 1, 0) if window else 0
    first, end = oldest // entry.block_tokens, position // entry.block_tokens + 1
    each = (end - first + splits - 1) // splits
    start = first + pl.program_id(2) * each

    def add(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, values = entry.read_block(i, pools, table_ref, first_page)
        places = i * entry.block_tokens + jnp.arange(entry.block_tokens)
        seen = (places <= position) & (places >= oldest)
        return add_block(so_far, q, keys, values, seen[None, :], scale)

    nothing = (jnp.zeros((height, out_ref.shape[1]), jnp.float32), jnp.full((height,), MASKED), jnp.zeros((height,)))
    out, top, total = jax.lax.fori_loop(start, jnp.minimum(start + each, end), add, nothing)
    out_ref[heads], top_ref[heads], total_ref[heads] = out, top, total
