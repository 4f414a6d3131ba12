"""Attention for packed rows: plain softmax attention, fp32 statistics, never across segments.

Models call an `Attend`; they do not know whether keys come from the same row (training, `packed`) or from a paged cache
(sampling, `engine/kv_cache.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

Cache = Any
"""A pytree that the layer scan carries: () in training, the page pools in sampling."""


class Attend(Protocol):
    def __call__(
        self, cache: Cache, layer: Array, q: Array, k: Array, v: Array | None, scale: float, v_features: int = 0
    ) -> tuple[Array, Cache]:
        """q [R, L, H, Dk], k [R, L, Hkv, Dk], v [R, L, Hkv, Dv] -> ([R, L, H, Dv], cache).

        `layer` is the layer's index in the cache. With v None the values are the first `v_features` of each key (MLA's
        latent cache with absorbed projections).
        """
        ...


class PackedAttention:
    """Causal attention inside each segment of a row; needs no cache."""

    def __init__(self, positions: Array, segment_ids: Array):
        """positions, segment_ids: int32 [R, L]; segment 0 is padding."""
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        self.mask = same & (positions[:, :, None] >= positions[:, None, :])  # (R, L, L)

    def __call__(
        self, cache: Cache, layer: Array, q: Array, k: Array, v: Array | None, scale: float, v_features: int = 0
    ) -> tuple[Array, Cache]:
        v = k[..., :v_features] if v is None else v
        R, L, H, D = q.shape
        groups = H // k.shape[2]
        q = q.reshape(R, L, k.shape[2], groups, D)
        scores = jnp.einsum("rlhgd,rmhd->rhglm", q, k, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(self.mask[:, None, None], scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(v.dtype)
        out = jnp.einsum("rhglm,rmhd->rlhgd", weights, v)
        return out.reshape(R, L, H, v.shape[-1]), cache
