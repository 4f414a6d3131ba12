"""One training micro-batch: forward, loss, backward, and its gradients added to the adapters of its rows, in one
program.

Rows bring their adapters with them: A and B are gathered per row, gradients come out per row, and row after row is
added to its slot's sum. No product with a mask ever joins two rows, so what is in one (NaN included) cannot reach
another.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.engine import head
from tx_async.engine.adapter_slots import at
from tx_async.engine.batch import RowBatch
from tx_async.engine.kernels import Kernels
from tx_async.engine.platform import Platform
from tx_async.layers.attention import PackedAttention
from tx_async.layers.delta_rule import Chunks
from tx_async.layers.lora import LoraRows, LoraWeights, by_path, layer_slice
from tx_async.layers.residuals import NOTHING, Recompute
from tx_async.models.decoder import unembedding

HEAD = "head"
"""The stack of the unembedding, applied by `head.py`; all others belong to the model's forward."""
UNROLLED_ROWS_MAX = 4
"""So many rows are added to their sums without a loop, whose turns the host of a GPU would wait for."""


def forward(
    platform: Platform,
    kernels: Kernels,
    model: Any,
    rank: int,
    params: Any,
    weights: LoraWeights,
    batch: RowBatch,
) -> tuple[Array, Array]:
    """-> (logprobs [R, L, K], losses [R, L]); changes no state. rank: no adapter of the batch has a higher one."""
    rows = _gather(weights, batch.slots, rank)
    hidden = _trunk(platform, kernels, model, params, rows, batch, NOTHING)
    return head.forward(hidden, _unembedding(params, rows, batch), batch)


def forward_backward(
    platform: Platform,
    kernels: Kernels,
    model: Any,
    rank: int,
    recompute: Recompute,
    params: Any,
    weights: LoraWeights,
    gradients: LoraWeights,
    batch: RowBatch,
) -> tuple[LoraWeights, Array, Array]:
    """-> (gradients with this batch's added, logprobs [R, L, K], losses [R, L])."""
    rows = _gather(weights, batch.slots, rank)
    hidden, pullback = jax.vjp(
        lambda rows: _trunk(platform, kernels, model, params, rows, batch, recompute), _like_params(rows, params)
    )
    logprobs, losses, of_head = head.forward_backward(hidden, _unembedding(params, rows, batch), batch)
    of_rows = by_path(lambda _, ab: tuple(map(_stacked, ab)), pullback(of_head.hidden)[0])
    of_rows[HEAD] = {HEAD: (of_head.a[None], of_head.b[None])}
    return _accumulate(gradients, of_rows, batch.slots), logprobs, losses


def _gather(weights: LoraWeights, slots: Array, rank: int) -> LoraWeights:
    """[layers, slots, ...] -> [layers, R, ...], without the padding above `rank`."""

    return by_path(lambda _, ab: (ab[0][..., :rank][:, slots], ab[1][..., :rank, :][:, slots]), weights)


def _like_params(rows: LoraWeights, params: Any) -> Any:
    """Rows as a list of layers where the weights are such a list: else each layer's gradient would be as wide as all
    layers'."""

    def split(path: tuple[str, str], ab: tuple[Array, Array]) -> Any:
        return tuple(list(x) for x in ab) if isinstance(params.get(path[0]), list) else ab

    return by_path(split, rows)


def _stacked(x: Any) -> Array:
    return jnp.stack(x) if isinstance(x, list) else x


def _trunk(
    platform: Platform,
    kernels: Kernels,
    model: Any,
    params: Any,
    rows: LoraWeights,
    batch: RowBatch,
    recompute: Recompute,
) -> Array:
    length = batch.tokens.shape[1]
    block, chunks = platform.attention_block(length), Chunks(*platform.rule_chunks(length))
    attend = PackedAttention(batch.positions, batch.segment_ids, block, kernels.flash_attention, model.mesh, chunks)
    # Only for a row that is alone: with several, each would need its own copy of W.
    joined = platform.joins_lora and batch.slots.shape[0] == 1 and model.mesh is None
    lora = LoraRows(rows, batch.scale, joined)
    inputs = params, lora, batch.tokens, batch.positions, attend
    return model.forward(*inputs, recompute=recompute, grouped_kernel=kernels.grouped_product)[0]


def _unembedding(params: Any, rows: LoraWeights, batch: RowBatch) -> head.Unembedding:
    a, b = layer_slice(rows[HEAD])[HEAD]
    return head.Unembedding(unembedding(params), a, b, batch.scale)


def _accumulate(gradients: LoraWeights, of_rows: LoraWeights, slots: Array) -> LoraWeights:
    """Add row after row: rows of one adapter in a fixed order, unused rows into the scratch slot that nobody reads."""

    def add_row(r: Array | int, total: Array, rows: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(rows, r, 1, axis=1)
        place = at(slots[r], total)
        mine = jax.lax.dynamic_slice(total, place, row.shape)
        return jax.lax.dynamic_update_slice(total, mine + row, place)

    def add_all(r: Array | int, totals: LoraWeights) -> LoraWeights:
        return jax.tree.map(lambda total, rows: add_row(r, total, rows), totals, of_rows)

    num_rows = slots.shape[0]
    if num_rows == 1:
        return add_all(0, gradients)
    return jax.lax.fori_loop(0, num_rows, add_all, gradients, unroll=num_rows <= UNROLLED_ROWS_MAX)
