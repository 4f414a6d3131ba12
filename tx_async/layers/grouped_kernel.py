"""The products of experts as kernels for a GPU, in Pallas (Triton): every block of tokens meets its own matrix in one
launch, however many experts there are.

`grouped.py` cuts the tokens in blocks and says what is computed; here a program of the kernel takes one block and a
strip of its matrix's columns. Matrices are read where they lie, and blocks run in the order of their experts, so that
those that share one find it in the device's cache. Blocks that stay empty read nothing. Every sum has a fixed order:
gradients are deterministic.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tx_async.layers.grouped import Activation, Matrices, RowBlocks
from tx_async.layers.lora import ExpertLora

ROWS_MIN = 16
"""The fewest rows that a tensor core takes, and the least rank: thinner matrices are padded with zeros."""
STRIP = 64
"""The most columns of a program, and the most features that it reads at once; fewer where that does not divide them."""


class Groups(NamedTuple):
    """Which matrix each of the N blocks meets."""

    matrix: Array
    """int32 [N]"""
    used: Array
    """bool [N]: others give zeros."""
    order: Array
    """int32 [N]: the order in which blocks run."""
    factor: Array | None = None
    """fp32 [N]: multiplies each block's product before it is rounded."""


def fits(x: Array, w: Matrices) -> bool:
    """Whether the kernels can run: in fp32 Triton's products would be rounded to tf32."""
    return x.dtype.itemsize == 2 and all(_strip(size) >= ROWS_MIN for size in w["gate"].shape[1:])


def experts_mlp(
    activation: Activation, x: Array, blocks: RowBlocks, w: Matrices, lora: ExpertLora, interpret: bool = False
) -> Array:
    """`grouped.experts_mlp` for x [N, B, D] of 16 bits, B at least ROWS_MIN; lora may hold every layer."""
    num_experts = w["gate"].shape[0]
    order = jnp.argsort(jnp.where(blocks.used, blocks.expert, num_experts)).astype(jnp.int32)
    base = Groups(blocks.expert, blocks.used, order)
    adapter = jnp.maximum(blocks.adapter, 0)
    first = 0 if lora.layer is None else lora.layer * lora.scale.shape[0]
    own = Groups((first + adapter) * num_experts + blocks.expert, blocks.used & (blocks.adapter >= 0), order)
    scaled = own._replace(factor=lora.scale[adapter])
    multiply: Any = product

    def project(name: str, x: Array) -> Array:
        y = multiply(x, w[name], base, False, interpret)
        if f"{name}_bias" in w:
            y = y + w[f"{name}_bias"][blocks.expert][:, None]
        if name not in lora.weights:
            return y
        a, b = (m.reshape(-1, *m.shape[-2:]) for m in lora.weights[name])
        a, b = _padded(a, 2), _padded(b, 1)
        low = multiply(x, a, scaled, True, interpret)
        return y + multiply(low, b, own, True, interpret)

    out = project("down", activation(project("gate", x), project("up", x)))
    return jnp.where(blocks.used[:, None, None], out, 0)


def _padded(x: Array, axis: int) -> Array:
    """The sides of Triton's blocks are powers of two."""
    size = x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(ROWS_MIN, 1 << (size - 1).bit_length()) - size)
    return jnp.pad(x, widths) if widths[axis][1] else x


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: Array, w: Array, groups: Groups, trains: bool, interpret: bool) -> Array:
    """x [N, B, D], w [G, D, F] -> [N, B, F]: each block times its matrix and factor. trains: w has a gradient, and the
    blocks of a matrix stand one after another."""
    return _multiply(x, w, groups, False, interpret)


def _keep(x: Array, w: Array, groups: Groups, trains: bool, interpret: bool) -> tuple[Array, Any]:
    return _multiply(x, w, groups, False, interpret), (x, w, groups)


def _gradients(trains: bool, interpret: bool, kept: Any, dy: Array) -> tuple[Array | None, ...]:
    x, w, groups = kept
    dx = _multiply(dy, w, groups, True, interpret)
    if not trains:
        return dx, None, None
    if groups.factor is not None:
        dy = (dy * groups.factor[:, None, None]).astype(dy.dtype)
    if w.shape[1] < w.shape[2]:
        return dx, _outer(dy, x, groups, w.shape[0], interpret).swapaxes(1, 2).astype(w.dtype), None
    return dx, _outer(x, dy, groups, w.shape[0], interpret).astype(w.dtype), None


product.defvjp(_keep, _gradients)


def _multiply(x: Array, w: Array, groups: Groups, transposed: bool, interpret: bool) -> Array:
    num_blocks, rows, inner = x.shape
    outer = w.shape[1] if transposed else w.shape[2]
    at_once, strip = _strip(inner), _strip(outer)
    numbers = [groups.matrix, groups.used.astype(jnp.int32), groups.order]
    numbers += [] if groups.factor is None else [groups.factor]
    return pl.pallas_call(
        partial(_multiply_kernel, transposed=transposed, at_once=at_once, strip=strip),
        grid=(num_blocks, outer // strip),
        in_specs=[_whole(x), _whole(w), *map(_whole, numbers)],
        out_specs=pl.BlockSpec((num_blocks, rows, outer), lambda n, f: (0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((num_blocks, rows, outer), x.dtype),
        name="grouped_product",
        **_how(interpret),
    )(x, w, *numbers)


def _multiply_kernel(
    x_ref: Any,
    w_ref: Any,
    matrix_ref: Any,
    used_ref: Any,
    order_ref: Any,
    *factor_and_out: Any,
    transposed: bool,
    at_once: int,
    strip: int,
) -> None:
    *factor_ref, out_ref = factor_and_out
    block = order_ref[pl.program_id(0)]
    matrix, columns = matrix_ref[block], pl.ds(pl.program_id(1) * strip, strip)

    def add(k: Array, total: Array) -> Array:
        features = pl.ds(k * at_once, at_once)
        x = x_ref[block, :, features]
        w = w_ref[matrix, columns, features].T if transposed else w_ref[matrix, features, columns]
        return total + plgpu.dot(x, w.astype(x.dtype))

    steps = used_ref[block] * (x_ref.shape[2] // at_once)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((x_ref.shape[1], strip), jnp.float32))
    for factor in factor_ref:
        total = total * factor[block]
    out_ref[block, :, columns] = total.astype(out_ref.dtype)


def _outer(x: Array, y: Array, groups: Groups, num_matrices: int, interpret: bool) -> Array:
    """x [N, B, D], y [N, B, K] -> fp32 [G, D, K]: for each matrix the sum of xᵀ y over its blocks, in their order."""
    strip, thin = _strip(x.shape[2]), y.shape[2]
    mine = (groups.matrix == jnp.arange(num_matrices)[:, None]) & groups.used
    first, count = jnp.argmax(mine, 1).astype(jnp.int32), mine.sum(1, dtype=jnp.int32)
    return pl.pallas_call(
        partial(_outer_kernel, strip=strip),
        grid=(num_matrices, x.shape[2] // strip),
        in_specs=[_whole(x), _whole(y), _whole(first), _whole(count)],
        out_specs=pl.BlockSpec((None, strip, thin), lambda g, d: (g, d, 0)),
        out_shape=jax.ShapeDtypeStruct((num_matrices, x.shape[2], thin), jnp.float32),
        name="grouped_outer",
        **_how(interpret),
    )(x, y, first, count)


def _outer_kernel(x_ref: Any, y_ref: Any, first_ref: Any, count_ref: Any, out_ref: Any, *, strip: int) -> None:
    group, columns = pl.program_id(0), pl.ds(pl.program_id(1) * strip, strip)
    first = first_ref[group]

    def add(i: Array, total: Array) -> Array:
        return total + plgpu.dot(x_ref[first + i, :, columns].T, y_ref[first + i])

    zeros = jnp.zeros((strip, y_ref.shape[2]), jnp.float32)
    out_ref[...] = jax.lax.fori_loop(0, count_ref[group], add, zeros)


def _strip(size: int) -> int:
    """The largest power of two that divides it, STRIP at most."""
    return min(STRIP, size & -size)


def _whole(x: Array) -> Any:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _how(interpret: bool) -> dict[str, Any]:
    return {
        "interpret": interpret,
        "compiler_params": None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=3),
    }
