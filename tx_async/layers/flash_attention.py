"""Attention of packed rows as kernels for a GPU, in Pallas (Triton): what `packed_attention` computes, block by block.

It is FlashAttention-2 (arXiv 2307.08691) with two numbers for each block of a row: the first block of keys that its
queries need, and the last block of queries that needs its keys. Both are data, so one program serves every packing, and
blocks that join different segments are neither read nor computed. Every sum has a fixed order, so gradients are
deterministic. Scores never leave a kernel. A key's gradients come out per query head and are summed afterwards; of long
rows, for some key heads at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, PartitionSpec

from tx_async.layers.attention import MASKED
from tx_async.layers.residuals import keep
from tx_async.layers.sharding import row_axis

BLOCK = 64
PART_BYTES = 256 * 2**20
"""The most that the gradients of keys, or of values, may take before they are summed over the query heads."""


class _PackedRows(NamedTuple):
    """What the kernels know about a packing; int32."""

    positions: Array
    """[R, L]"""
    segments: Array
    """[R, L]: padding sees only the padding of its own block."""
    first: Array
    """[R, n]: the first key block of each query block."""
    last: Array
    """[R, n]: the last query block of each key block."""


def fits(q: Array, v: Array, mesh: Mesh | None = None) -> bool:
    """Whether the kernels can run: the sides of Triton's blocks are powers of two; in fp32 its products would be
    rounded to tf32. On a mesh every device has as many key heads as another."""
    features = q.shape[-1]
    return (
        q.dtype.itemsize == 2
        and features == v.shape[-1]
        and features & (features - 1) == 0
        and 16 <= features <= 128
        and q.shape[1] % BLOCK == 0
        and (mesh is None or v.shape[2] % mesh.shape["tensor"] == 0)
    )


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array,
    scale: float,
    interpret: bool = False,
    mesh: Mesh | None = None,
) -> Array:
    """q [R, L, H, D], k, v [R, L, Hkv, D] -> [R, L, H, D]; positions (0, 1, … in each segment), segment_ids int32
    [R, L], 0 = padding. L is a multiple of BLOCK. On a mesh each device computes its own rows and heads."""
    return _forward(q, k, v, positions, segment_ids, scale, interpret, mesh)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array,
    scale: float,
    interpret: bool,
    mesh: Mesh | None,
) -> tuple[Array, Any]:
    row = _row(positions, segment_ids)
    run, cuts = partial(_forward_here, scale, interpret), _MeshCuts(mesh, q.shape[0])
    out, lse = keep(cuts.on_mesh(run, 3 * (cuts.heads,), (cuts.heads, cuts.statistic))(row, q, k, v))
    return out, (q, k, v, row, out, lse)


def _backward(scale: float, interpret: bool, mesh: Mesh | None, saved: Any, dout: Array) -> tuple[Array | None, ...]:
    q, k, v, row, out, lse = saved
    run, cuts = partial(_backward_here, scale, interpret), _MeshCuts(mesh, q.shape[0])
    specs = (*5 * (cuts.heads,), cuts.statistic)
    return *cuts.on_mesh(run, specs, 3 * (cuts.heads,))(row, q, k, v, dout, out, lse), None, None


flash_attention.defvjp(_forward, _backward)


class _MeshCuts:
    """How arrays lie on a mesh: rows and heads are cut."""

    def __init__(self, mesh: Mesh | None, num_rows: int):
        self.mesh, self.rows = mesh, row_axis(mesh, num_rows) if mesh else None
        self.heads = PartitionSpec(self.rows, None, "tensor")
        self.statistic = PartitionSpec(self.rows, "tensor")

    def on_mesh(self, run: Any, inputs: tuple[PartitionSpec, ...], outputs: tuple[PartitionSpec, ...]) -> Any:
        """run(row, *inputs) -> outputs, on each device for its part."""
        if self.mesh is None:
            return run
        specs = (PartitionSpec(self.rows), *inputs)
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=outputs, check_vma=False)


def _forward_here(scale: float, interpret: bool, row: _PackedRows, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    specs = _Specs(q, k)
    out, lse = pl.pallas_call(
        partial(_forward_kernel, scale=scale),
        grid=specs.grid,
        in_specs=[specs.mine, specs.keys, specs.keys, *specs.row],
        out_specs=[specs.mine, specs.statistic],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), specs.statistic_shape],
        name="flash_attention",
        **_how(interpret),
    )(q, k, v, *row)
    return out, lse


def _backward_here(
    scale: float,
    interpret: bool,
    row: _PackedRows,
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    out: Array,
    lse: Array,
) -> tuple[Array, Array, Array]:
    specs = _Specs(q, k)
    delta = jnp.einsum("rlhd,rlhd->rhl", dout.astype(jnp.float32), out.astype(jnp.float32))
    inputs = (q, k, v, dout, lse, delta, *row)
    dq = pl.pallas_call(
        partial(_dq_kernel, scale=scale),
        grid=specs.grid,
        in_specs=[specs.mine, specs.keys, specs.keys, specs.mine, specs.statistic, specs.statistic, *specs.row],
        out_specs=specs.mine,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_dq",
        **_how(interpret),
    )(*inputs)
    num_parts = _parts(q, k)
    parts = [_key_gradients(_Specs(q, k, part, num_parts), scale, interpret, inputs, k) for part in range(num_parts)]
    dk, dv = parts[0] if num_parts == 1 else (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _parts(q: Array, k: Array) -> int:
    """In how many parts of its key heads gradients of keys are computed."""
    heads = k.shape[2]
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (4 * q.size // n <= PART_BYTES or n == heads))


def _key_gradients(
    specs: _Specs, scale: float, interpret: bool, inputs: tuple[Array, ...], k: Array
) -> tuple[Array, Array]:
    """dk, dv [R, L, key heads of the part, D] in k's dtype."""
    num_rows, length, _, features = k.shape
    wide = jax.ShapeDtypeStruct((num_rows, length, specs.grid[2], features), jnp.float32)
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, scale=scale),
        grid=specs.grid,
        in_specs=[specs.queries, specs.key, specs.key, specs.queries, *[specs.statistics] * 2, *specs.row],
        out_specs=[specs.own, specs.own],
        out_shape=[wide, wide],
        name="flash_attention_dkv",
        **_how(interpret),
    )(*inputs)
    of_group = lambda x: x.reshape(num_rows, length, -1, specs.group, features).sum(3).astype(k.dtype)  # noqa: E731
    return of_group(dk), of_group(dv)


def _how(interpret: bool) -> dict[str, Any]:
    return {
        "interpret": interpret,
        "compiler_params": None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=2),
    }


def _row(positions: Array, segment_ids: Array) -> _PackedRows:
    length = positions.shape[1]
    numbers = jnp.arange(length // BLOCK, dtype=jnp.int32)
    # Positions count from the start of their segment.
    first = jnp.maximum(numbers - -(-positions[:, ::BLOCK] // BLOCK), 0)
    last = (first[:, None, :] <= numbers[:, None]).sum(2, dtype=jnp.int32) - 1
    segments = jnp.where(segment_ids > 0, segment_ids, -1 - jnp.repeat(numbers, BLOCK))
    return _PackedRows(positions, segments, first, last)


class _Specs:
    """The blocks of the arrays: a program handles one block of one row and one query head, of those of a part."""

    def __init__(self, q: Array, k: Array, part: int = 0, num_parts: int = 1):
        num_rows, length, heads, features = q.shape
        self.group = group = heads // k.shape[2]
        here, first = heads // num_parts, part * heads // num_parts
        self.grid = (length // BLOCK, num_rows, here)
        self.own = pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, h, 0))
        self.mine = pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, first + h, 0))
        self.queries = pl.BlockSpec((None, length, None, features), lambda i, r, h: (r, 0, first + h, 0))
        self.key = pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, (first + h) // group, 0))
        self.keys = pl.BlockSpec((None, length, None, features), lambda i, r, h: (r, 0, (first + h) // group, 0))
        self.statistic = pl.BlockSpec((None, None, BLOCK), lambda i, r, h: (r, first + h, i))
        self.statistics = pl.BlockSpec((None, None, length), lambda i, r, h: (r, first + h, 0))
        self.statistic_shape = jax.ShapeDtypeStruct((num_rows, heads, length), jnp.float32)
        whole = pl.BlockSpec((None, length), lambda i, r, h: (r, 0))
        one = pl.BlockSpec((None, 1), lambda i, r, h: (r, i))
        self.row = (whole, whole, one, one)


def _block(i: Array) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def _seen(positions_ref: Any, segments_ref: Any, queries: Array, keys: Array) -> Array:
    """[queries, keys] of two blocks: whether a query sees a key."""
    same = segments_ref[_block(queries)][:, None] == segments_ref[_block(keys)][None, :]
    return same & (positions_ref[_block(queries)][:, None] >= positions_ref[_block(keys)][None, :])


def _gradients_of_scores(
    seen: Array, q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, scale: float
) -> tuple[Array, Array]:
    """Recompute the weights of a block of queries and one of keys; -> (weights, gradients of the scores), [queries,
    keys]."""
    scores = jnp.where(seen, plgpu.dot(q, k.T) * scale, MASKED)
    weights = jnp.exp(scores - lse[:, None])
    return weights, weights * (plgpu.dot(dout, v.T) - delta[:, None]) * scale


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
) -> None:
    i, q = pl.program_id(0), q_ref[...]

    def add(step: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = so_far
        j = i - step  # the diagonal block first: there every query sees at least itself
        k, v = k_ref[_block(j), :], v_ref[_block(j), :]
        scores = jnp.where(_seen(positions_ref, segments_ref, i, j), plgpu.dot(q, k.T) * scale, MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        return out * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v), new_top, total * shrink + weights.sum(1)

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full((BLOCK,), MASKED), jnp.zeros((BLOCK,)))
    out, top, total = jax.lax.fori_loop(0, i - first_ref[0] + 1, add, nothing)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
) -> None:
    i, q, dout = pl.program_id(0), q_ref[...], dout_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def add(step: Array, dq: Array) -> Array:
        j = i - step
        k, v = k_ref[_block(j), :], v_ref[_block(j), :]
        seen = _seen(positions_ref, segments_ref, i, j)
        _, dscores = _gradients_of_scores(seen, q, k, v, dout, lse, delta, scale)
        return dq + plgpu.dot(dscores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, i - first_ref[0] + 1, add, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scale: float,
) -> None:
    j, k, v = pl.program_id(0), k_ref[...], v_ref[...]

    def add(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = so_far
        q, dout = q_ref[_block(i), :], dout_ref[_block(i), :]
        lse, delta = lse_ref[_block(i)], delta_ref[_block(i)]
        seen = _seen(positions_ref, segments_ref, i, j)
        weights, dscores = _gradients_of_scores(seen, q, k, v, dout, lse, delta, scale)
        dk = dk + plgpu.dot(dscores.astype(q.dtype).T, q)
        return dk, dv + plgpu.dot(weights.astype(dout.dtype).T, dout)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = jax.lax.fori_loop(j, last_ref[0] + 1, add, (zeros, zeros))
