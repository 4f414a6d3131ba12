"""One training micro-batch: forward, loss, backward, and its gradients added to the adapters of its rows, in one
program. Rows stay apart from the first layer to the sums of their slots (`adapter_rows.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.engine import head
from tx_async.engine.adapter_rows import add_rows, of_rows
from tx_async.engine.batch import RowBatch
from tx_async.engine.kernels import Kernels
from tx_async.engine.platform import Platform
from tx_async.layers.attention import PackedAttention
from tx_async.layers.delta_rule import Chunks
from tx_async.layers.lora import LoraRows, LoraWeights, by_path, layer_slice
from tx_async.layers.residuals import NOTHING, Recompute

HEAD = "head"
"""The stack of the unembedding, applied by `head.py`; all others belong to the model's forward."""


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
    rows = of_rows(model, weights, batch.slots, rank)
    hidden = _trunk(platform, kernels, model, params, rows, batch, NOTHING)
    return head.forward(hidden, _unembedding(model, params, rows, batch), batch, _row_shards(model))


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
    rows = of_rows(model, weights, batch.slots, rank)
    hidden, pullback = jax.vjp(
        lambda rows: _trunk(platform, kernels, model, params, rows, batch, recompute), _like_params(rows, params)
    )
    read = _unembedding(model, params, rows, batch)
    logprobs, losses, of_head = head.forward_backward(hidden, read, batch, _row_shards(model))
    found = by_path(lambda _, ab: tuple(map(_stacked, ab)), pullback(of_head.hidden)[0])
    found[HEAD] = {HEAD: (of_head.a[None], of_head.b[None])}
    return add_rows(model, gradients, found, batch.slots), logprobs, losses


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


def _unembedding(model: Any, params: Any, rows: LoraWeights, batch: RowBatch) -> head.Unembedding:
    a, b = layer_slice(rows[HEAD])[HEAD]
    return head.Unembedding(model.whole_unembedding(params), a, b, batch.scale)


def _row_shards(model: Any) -> int:
    """How many devices have rows of their own."""
    return model.mesh.shape["fsdp"] if model.mesh else 1
