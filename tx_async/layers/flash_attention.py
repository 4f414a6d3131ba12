"""Attention of packed rows as kernels for a GPU, in Pallas (Triton): what `packed_attention` computes, block by block.

It is FlashAttention-2 (arXiv 2307.08691) with two numbers for each block of a row: the first block of keys that its
queries need, and the last block of queries that needs its keys. Both are data, so one program serves every packing, and
blocks that join different segments, or lie outside of a layer's window, are neither read nor computed. Every sum has a
fixed order, so gradients are deterministic. Scores never leave a kernel. A key's gradients come out per query head and
are summed afterwards; of long rows, for some key heads at a time. `flash_kernels.py` has what a block computes.
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
from tx_async.layers.flash_kernels import BLOCK, LEAST_PART, dkv_kernel, dq_kernel, forward_kernel
from tx_async.layers.residuals import keep
from tx_async.layers.sharding import row_axis

WIDEST = 256
"""The most features of a head: of wider ones, blocks do not fit in a multiprocessor's shared memory."""
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
    """Whether the kernels can run: heads are cut into parts whose sizes are powers of two, as the sides of Triton's
    blocks are; in fp32 its products would be rounded to tf32. On a mesh every device has as many key heads as
    another."""
    return (
        q.dtype.itemsize == 2
        and all(LEAST_PART <= x.shape[-1] <= WIDEST and x.shape[-1] % LEAST_PART == 0 for x in (q, v))
        and q.shape[1] % BLOCK == 0
        and (mesh is None or v.shape[2] % mesh.shape["tensor"] == 0)
    )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    positions: Array,
    segment_ids: Array,
    scale: float,
    window: int,
    interpret: bool = False,
    mesh: Mesh | None = None,
) -> Array:
    """q [R, L, H, Dk], k [R, L, Hkv, Dk], v [R, L, Hkv, Dv], sinks fp32 [H], frozen -> [R, L, H, Dv]; positions (0, 1,
    … in each segment), segment_ids int32 [R, L], 0 = padding. L is a multiple of BLOCK. On a mesh each device computes
    its own rows and heads."""
    return _forward(q, k, v, sinks, positions, segment_ids, scale, window, interpret, mesh)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    positions: Array,
    segment_ids: Array,
    scale: float,
    window: int,
    interpret: bool,
    mesh: Mesh | None,
) -> tuple[Array, Any]:
    row = _row(positions, segment_ids, window)
    run, cuts = partial(_forward_here, scale, window, interpret), _MeshCuts(mesh, q.shape[0])
    # A sink is a logit without a value: where there is none, one that takes no part.
    sinks = jnp.full(q.shape[2], MASKED) if sinks is None else sinks.astype(jnp.float32)
    inputs = (*3 * (cuts.heads,), cuts.sinks)
    out, lse = keep(cuts.on_mesh(run, inputs, (cuts.heads, cuts.statistic))(row, q, k, v, sinks))
    return out, (q, k, v, row, out, lse)


def _backward(
    scale: float, window: int, interpret: bool, mesh: Mesh | None, saved: Any, dout: Array
) -> tuple[Array | None, ...]:
    q, k, v, row, out, lse = saved
    run, cuts = partial(_backward_here, scale, window, interpret), _MeshCuts(mesh, q.shape[0])
    specs = (*5 * (cuts.heads,), cuts.statistic)
    return *cuts.on_mesh(run, specs, 3 * (cuts.heads,))(row, q, k, v, dout, out, lse), None, None, None


flash_attention.defvjp(_forward, _backward)


class _MeshCuts:
    """How arrays lie on a mesh: rows and heads are cut."""

    def __init__(self, mesh: Mesh | None, num_rows: int):
        self.mesh, self.rows = mesh, row_axis(mesh, num_rows) if mesh else None
        self.heads = PartitionSpec(self.rows, None, "tensor")
        self.statistic = PartitionSpec(self.rows, "tensor")
        self.sinks = PartitionSpec("tensor")

    def on_mesh(self, run: Any, inputs: tuple[PartitionSpec, ...], outputs: tuple[PartitionSpec, ...]) -> Any:
        """run(row, *inputs) -> outputs, on each device for its part."""
        if self.mesh is None:
            return run
        specs = (PartitionSpec(self.rows), *inputs)
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=outputs, check_vma=False)


def _forward_here(
    scale: float, window: int, interpret: bool, row: _PackedRows, q: Array, k: Array, v: Array, sinks: Array
) -> tuple[Array, Array]:
    specs = _Specs(q, k)
    features, values = q.shape[-1], v.shape[-1]
    out, lse = pl.pallas_call(
        partial(forward_kernel, scale=scale, window=window),
        grid=specs.grid,
        in_specs=[specs.mine(features), specs.keys(features), specs.keys(values), specs.sink, *specs.row],
        out_specs=[specs.mine(values), specs.statistic],
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:-1], values), v.dtype), specs.statistic_shape],
        name="flash_attention",
        **_how(interpret, max(features, values)),
    )(q, k, v, sinks, *row)
    return out, lse


def _backward_here(
    scale: float,
    window: int,
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
    features, values = q.shape[-1], v.shape[-1]
    how = {"scale": scale, "window": window}, _how(interpret, max(features, values))
    delta = jnp.einsum("rlhd,rlhd->rhl", dout.astype(jnp.float32), out.astype(jnp.float32))
    inputs = (q, k, v, dout, lse, delta, *row)
    keys = specs.keys(features), specs.keys(values)
    dq = pl.pallas_call(
        partial(dq_kernel, **how[0]),
        grid=specs.grid,
        in_specs=[specs.mine(features), *keys, specs.mine(values), *2 * [specs.statistic], *specs.row],
        out_specs=specs.mine(features),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_dq",
        **how[1],
    )(*inputs)
    num_parts = _parts(q, v)
    parts = [_key_gradients(_Specs(q, k, part, num_parts), how, inputs) for part in range(num_parts)]
    dk, dv = parts[0] if num_parts == 1 else (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _parts(q: Array, v: Array) -> int:
    """In how many parts of its key heads gradients of keys are computed."""
    heads, num_bytes = v.shape[2], 4 * q.size // q.shape[-1] * max(q.shape[-1], v.shape[-1])
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (num_bytes // n <= PART_BYTES or n == heads))


def _key_gradients(
    specs: _Specs, how: tuple[dict[str, Any], dict[str, Any]], inputs: tuple[Array, ...]
) -> tuple[Array, Array]:
    """dk, dv [R, L, key heads of the part, ·] in k's dtype. how: the options of the kernel, of its call."""
    _, k, v, *_ = inputs
    num_rows, length, _, features = k.shape
    values = v.shape[-1]
    wide = [jax.ShapeDtypeStruct((num_rows, length, specs.grid[2], n), jnp.float32) for n in (features, values)]
    dk, dv = pl.pallas_call(
        partial(dkv_kernel, **how[0]),
        grid=specs.grid,
        in_specs=[
            specs.queries(features),
            specs.key(features),
            specs.key(values),
            specs.queries(values),
            *2 * [specs.statistics],
            *specs.row,
        ],
        out_specs=[specs.own(features), specs.own(values)],
        out_shape=wide,
        name="flash_attention_dkv",
        **how[1],
    )(*inputs)
    of_group = lambda x: x.reshape(num_rows, length, -1, specs.group, x.shape[-1]).sum(3).astype(k.dtype)  # noqa: E731
    return of_group(dk), of_group(dv)


def _how(interpret: bool, widest: int) -> dict[str, Any]:
    """Of wide heads a block's sums would not fit in the registers of 4 warps."""
    warps = 4 if widest <= 128 else 8
    return {
        "interpret": interpret,
        "compiler_params": None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=2),
    }


def _row(positions: Array, segment_ids: Array, window: int) -> _PackedRows:
    length = positions.shape[1]
    numbers = jnp.arange(length // BLOCK, dtype=jnp.int32)
    # Positions count from the start of their segment. Those behind a block's first query reach no further back.
    reach = positions[:, ::BLOCK]
    reach = jnp.minimum(reach, window - 1) if window else reach
    first = jnp.maximum(numbers - -(-reach // BLOCK), 0)
    last = (first[:, None, :] <= numbers[:, None]).sum(2, dtype=jnp.int32) - 1
    segments = jnp.where(segment_ids > 0, segment_ids, -1 - jnp.repeat(numbers, BLOCK))
    return _PackedRows(positions, segments, first, last)


class _Specs:
    """The blocks of the arrays, of so many features: a program handles one block of one row and one query head, of
    those of a part."""

    def __init__(self, q: Array, k: Array, part: int = 0, num_parts: int = 1):
        num_rows, length, heads, _ = q.shape
        self.group, self.length = heads // k.shape[2], length
        here, first = heads // num_parts, part * heads // num_parts
        self.first = first
        self.grid = (length // BLOCK, num_rows, here)
        self.sink = pl.BlockSpec((1,), lambda i, r, h: (first + h,))
        self.statistic = pl.BlockSpec((None, None, BLOCK), lambda i, r, h: (r, first + h, i))
        self.statistics = pl.BlockSpec((None, None, length), lambda i, r, h: (r, first + h, 0))
        self.statistic_shape = jax.ShapeDtypeStruct((num_rows, heads, length), jnp.float32)
        whole = pl.BlockSpec((None, length), lambda i, r, h: (r, 0))
        one = pl.BlockSpec((None, 1), lambda i, r, h: (r, i))
        self.row = (whole, whole, one, one)

    def own(self, features: int) -> pl.BlockSpec:
        """This program's block of an array that has the part's heads alone."""
        return pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, h, 0))

    def mine(self, features: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, self.first + h, 0))

    def queries(self, features: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.length, None, features), lambda i, r, h: (r, 0, self.first + h, 0))

    def key(self, features: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, BLOCK, None, features), lambda i, r, h: (r, i, (self.first + h) // self.group, 0))

    def keys(self, features: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, self.length, None, features), lambda i, r, h: (r, 0, (self.first + h) // self.group, 0)
        )
