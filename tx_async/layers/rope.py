"""Rotary position embeddings (RoFormer, arXiv 2104.09864) with the scalings of the supported models.

Frequencies are computed once, in float32 like transformers' `modeling_rope_utils`, and are static: they are part of a
model's identity, not of its parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tx_async.errors import BaseModelError


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: the angle of a pair of features is its frequency times the position."""

    frequencies: tuple[float, ...]
    """Radians per position, for each pair of features."""
    attention_factor: float = 1.0
    """Multiplies cos and sin, hence scores by its square (YaRN)."""

    def __call__(self, positions: Array) -> tuple[Array, Array]:
        """positions int32 [R, L] -> cos, sin fp32 [R, L, D/2]."""
        angles = positions[..., None].astype(jnp.float32) * jnp.array(self.frequencies, jnp.float32)
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [R, L, H, D] with cos, sin [R, L, d/2] in fp32: pairs are (i, i + d/2) (Llama, Qwen). Only the first d features
    are rotated; in most families those are all."""
    turning, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = _turn(first, second, cos, sin).astype(x.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


def rotate_interleaved(x: Array, cos: Array, sin: Array) -> Array:
    """Like `rotate`, but pairs are (2i, 2i + 1) (DeepSeek). The result is in `rotate`'s order, which changes no dot
    product."""
    wide = x.astype(jnp.float32)
    return _turn(wide[..., 0::2], wide[..., 1::2], cos, sin).astype(x.dtype)


def _turn(first: Array, second: Array, cos: Array, sin: Array) -> Array:
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters in the spelling of transformers 5, from either spelling of `config.json`."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or config.get("default_rope_theta") or 10_000.0)
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    return rope | {key: config.get(key) for key in ("max_position_embeddings", "served_context_length")}


def of_kind(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """`config` with the rope parameters of one kind of layer, where `rope_parameters` has them by kind."""
    found = config.get("rope_parameters") or {}
    return config | {"rope_parameters": found[kind] or {}} if kind in found else config


def partial_rotary_factor(config: dict[str, Any]) -> float:
    """`rope_parameters` wins over the top level, as in transformers."""
    found = parameters(config).get("partial_rotary_factor")
    found = config.get("partial_rotary_factor") if found is None else found
    return 1.0 if found is None else float(found)


def from_hf(config: dict[str, Any], dim: int, partial: bool = False) -> Rope:
    """dim: a head's features. partial: the family knows `partial_rotary_factor`. Raises `BaseModelError` naming a rope
    type that is not implemented."""
    rope, factor = parameters(config), partial_rotary_factor(config)
    if factor != 1.0 and not partial:
        raise BaseModelError(f"partial_rotary_factor {factor} is not supported; only 1.0 is.")
    kinds = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
    if rope["rope_type"] not in kinds:
        raise BaseModelError(f"rope_type {rope['rope_type']!r} is not supported; known: {', '.join(kinds)}.")
    try:
        frequencies, attention_factor = kinds[rope["rope_type"]](rope, int(dim * factor))
    except KeyError as error:
        raise BaseModelError(f"rope_type {rope['rope_type']!r} lacks {error}.") from error
    return Rope(tuple(float(f) for f in frequencies), attention_factor)


def _default(rope: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    return 1 / _periods(rope, dim), 1.0


def _periods(rope: dict[str, Any], dim: int) -> np.ndarray:
    return np.float32(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def _linear(rope: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    return 1 / _periods(rope, dim) / np.float32(rope["factor"]), 1.0


def _llama3(rope: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    frequencies = 1 / _periods(rope, dim)
    turns = rope["original_max_position_embeddings"] * frequencies / np.float32(2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) / rope["factor"] + keep) * frequencies, 1.0


def _yarn(rope: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071), by parts: dimensions of high frequency are kept, those of low frequency are
    interpolated."""
    original, theta, factor = rope["original_max_position_embeddings"], rope["rope_theta"], rope["factor"]

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    interpolate = np.clip(ramp, 0, 1)
    frequencies = 1 / _periods(rope, dim)
    return frequencies / factor * interpolate + frequencies * (1 - interpolate), _yarn_attention_factor(rope)


def _longrope(rope: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753). All calls use one set of factors: the long ones where the served context exceeds the
    original one."""
    original = rope["original_max_position_embeddings"]
    context = rope["max_position_embeddings"]
    served = min(rope.get("served_context_length") or context, context)
    factors = np.array(rope["long_factor" if served > original else "short_factor"], np.float32)
    if len(factors) != dim // 2:
        raise BaseModelError(f"rope_type 'longrope' has {len(factors)} factors, not {dim // 2}.")
    return 1 / (factors * _periods(rope, dim)), _longrope_attention_factor(rope, context / original)


def _longrope_attention_factor(rope: dict[str, Any], stretch: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    stretch = rope.get("factor") or stretch
    return math.sqrt(1 + math.log(stretch) / math.log(rope["original_max_position_embeddings"])) if stretch > 1 else 1.0


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(rope["factor"], rope["mscale"]) / yarn_mscale(rope["factor"], rope["mscale_all_dim"])
    return yarn_mscale(rope["factor"], 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of the softmax's temperature: 0.1 · mscale · ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
