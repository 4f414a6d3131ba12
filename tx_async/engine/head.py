"""Unembedding, log-probabilities, loss and their gradients, chunk by chunk: `[tokens, vocab]` of a whole row never
exists.

Every loss but one is pointwise, so a chunk's derivative by its logits is known as soon as its logits are known: the
pass that computes the loss also computes the gradients with respect to hidden states and adapter. Nothing is computed
twice, nothing of the size of the vocabulary is kept. gspo needs a mean over its sequence first: rows that use it get
one more pass, which computes log-probabilities only.

Where the rows of a batch are divided among devices (`row_shards`: how many) each works on chunks of its own rows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.engine.batch import RowBatch
from tx_async.engine.losses import GSPO, LossInputs, log_sequence_ratios, loss_terms

CHUNK_TOKENS = 512
"""Positions of a chunk, on each device."""


class Unembedding(NamedTuple):
    """The frozen head with each row's adapter."""

    head: Array
    """[V, D], frozen, in the model's dtype."""
    a: Array
    """[R, D, rank] fp32: each row's adapter."""
    b: Array
    """[R, rank, V] fp32."""
    scale: Array
    """[R] fp32."""


class HeadGradients(NamedTuple):
    """Gradients of the sum of the losses by what the head reads; a and b as in `Unembedding`."""

    hidden: Array
    """[R, L, D] in the dtype of the hidden states."""
    a: Array
    b: Array


class _VocabularyInputs(NamedTuple):
    """What the pass over the vocabulary needs to know of C positions."""

    hidden: Array
    """[R, C, D]"""
    targets: Array
    """[R, C, K]"""
    inputs: LossInputs
    """[R, C]"""


def forward(hidden: Array, w: Unembedding, batch: RowBatch, row_shards: int = 1) -> tuple[Array, Array]:
    """hidden [R, L, D] -> (logprobs [R, L, K], losses [R, L]), fp32, zero at padding."""
    logprobs = _logprobs(row_shards, hidden, w, batch)
    ratios = log_sequence_ratios(logprobs[..., 0], batch.logprobs, batch.sequence_ratio_mask, batch.segment_ids)
    losses, _ = loss_terms(logprobs, _loss_inputs(batch, ratios))
    return logprobs, losses


def forward_backward(
    hidden: Array, w: Unembedding, batch: RowBatch, row_shards: int = 1
) -> tuple[Array, Array, HeadGradients]:
    """-> (logprobs [R, L, K], losses [R, L], gradients of the sum of the losses, adapters' per row)."""
    needed, unneeded = partial(_ratios, row_shards), lambda *_: jnp.zeros_like(batch.logprobs)
    ratios = jax.lax.cond(jnp.any(batch.loss_fn == GSPO), needed, unneeded, hidden, w, batch)
    chunks = _split(row_shards, _VocabularyInputs(hidden, batch.target_tokens, _loss_inputs(batch, ratios)))

    def step(carry: tuple[Array, Array], chunk: _VocabularyInputs):
        logits, low = _logits(chunk.hidden, w)
        logprobs, lse = _target_logprobs(logits, chunk.targets)
        losses, slopes = loss_terms(logprobs, chunk.inputs)
        dhidden, da, db = _backward(chunk, w, logits, lse, low, slopes)
        valid = chunk.inputs.valid[..., None]
        return (carry[0] + da, carry[1] + db), (jnp.where(valid, logprobs, 0.0), losses, dhidden)

    (da, db), outputs = jax.lax.scan(step, (jnp.zeros_like(w.a), jnp.zeros_like(w.b)), chunks)
    logprobs, losses, dhidden = _join(outputs, hidden.shape[1])
    return logprobs, losses, HeadGradients(dhidden, da, db)


def _ratios(row_shards: int, hidden: Array, w: Unembedding, batch: RowBatch) -> Array:
    logprobs = _logprobs(row_shards, hidden, w, batch)[..., 0]
    return log_sequence_ratios(logprobs, batch.logprobs, batch.sequence_ratio_mask, batch.segment_ids)


def _logprobs(row_shards: int, hidden: Array, w: Unembedding, batch: RowBatch) -> Array:
    """[R, L, K], zero at padding."""

    def step(_, chunk: tuple[Array, Array]):
        return None, _target_logprobs(_logits(chunk[0], w)[0], chunk[1])[0]

    _, logprobs = jax.lax.scan(step, None, _split(row_shards, (hidden, batch.target_tokens)))
    return jnp.where(batch.segment_ids[..., None] > 0, _join(logprobs, hidden.shape[1]), 0.0)


def _logits(hidden: Array, w: Unembedding) -> tuple[Array, Array]:
    """-> (logits [R, C, V] fp32, the adapter's hidden [R, C, rank], scaled)."""
    low = jnp.einsum("rcd,rdk->rck", hidden.astype(jnp.float32), w.a) * w.scale[:, None, None]
    logits = jnp.einsum("rcd,vd->rcv", hidden, w.head, preferred_element_type=jnp.float32)
    return logits + jnp.einsum("rck,rkv->rcv", low, w.b), low


def _target_logprobs(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-> (log-probabilities of the targets [R, C, K], logsumexp [R, C])."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets, axis=-1) - lse[..., None], lse


def _backward(chunk: _VocabularyInputs, w: Unembedding, logits: Array, lse: Array, low: Array, slopes: Array):
    """slopes = d loss / d logprobs [R, C, K] -> gradients by hidden [R, C, D] and, per row, A and B."""
    dlogits = _dlogits(logits, lse, chunk.targets, slopes)
    dlow = jnp.einsum("rcv,rkv->rck", dlogits, w.b) * w.scale[:, None, None]
    dhidden = jnp.einsum("rcv,vd->rcd", dlogits.astype(w.head.dtype), w.head, preferred_element_type=jnp.float32)
    dhidden = (dhidden + jnp.einsum("rck,rdk->rcd", dlow, w.a)).astype(chunk.hidden.dtype)
    da = jnp.einsum("rcd,rck->rdk", chunk.hidden.astype(jnp.float32), dlow)
    return dhidden, da, jnp.einsum("rck,rcv->rkv", low, dlogits)


def _dlogits(logits: Array, lse: Array, targets: Array, slopes: Array) -> Array:
    """Σ_k slope_k (onehot(target_k) - p)"""
    spread = jnp.exp(logits - lse[..., None]) * -jnp.sum(slopes, -1, keepdims=True)
    if targets.shape[-1] == 1:  # a comparison fuses into the elementwise pass; a scatter would be one of its own
        hit = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets
        return spread + jnp.where(hit, slopes, 0.0)
    rows, columns = (jnp.arange(n) for n in targets.shape[:2])
    return spread.at[rows[:, None, None], columns[None, :, None], targets].add(slopes)


def _loss_inputs(batch: RowBatch, log_sequence_ratio: Array) -> LossInputs:
    return LossInputs(
        loss_fn=batch.loss_fn,
        valid=batch.segment_ids > 0,
        weights=batch.weights,
        logprobs=batch.logprobs,
        advantages=batch.advantages,
        clip_low_threshold=batch.clip_low_threshold,
        clip_high_threshold=batch.clip_high_threshold,
        beta=batch.beta,
        log_sequence_ratio=log_sequence_ratio,
    )


def _split(row_shards: int, tree):
    """[R, L, ...] leaves -> [chunks, R, C, ...]; the last chunk is padded with zeros, which are not valid."""

    def split(x: Array) -> Array:
        rows, length = x.shape[:2]
        num_chunks, size = _chunks(rows // row_shards, length)
        x = jnp.pad(x, [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, num_chunks, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree, length: int):
    def join(x: Array) -> Array:
        num_chunks, rows, size = x.shape[:3]
        return jnp.moveaxis(x, 0, 1).reshape(rows, num_chunks * size, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)


def _chunks(rows: int, length: int) -> tuple[int, int]:
    """-> (number of chunks, positions of each row in one)."""
    num_chunks = -(-length * rows // CHUNK_TOKENS)
    size = -(-length // min(num_chunks, length))
    return -(-length // size), size
