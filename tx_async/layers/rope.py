"""Rotary position embeddings, half-split layout (Llama, Qwen)."""

import jax.numpy as jnp
from jax import Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [R, L, H, D] with cos, sin [R, L, D/2] in fp32: pairs are (i, i + D/2)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
