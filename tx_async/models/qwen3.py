"""Qwen3, dense (`Qwen3ForCausalLM`): grouped-query attention with RMSNorm on queries and keys, gated SiLU MLP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.attention import Attend, Cache
from tx_async.layers.lora import LayerLora, Lora, LoraTarget
from tx_async.layers.norm import rms_norm
from tx_async.layers.rope import rotate

Params = dict[str, Any]


@dataclass(frozen=True)
class Qwen3:
    """Parameters: embed [V, D], norm [D], head [D, V], layers: a dict of arrays stacked over the layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3:
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope_theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
            rms_norm_eps=config["rms_norm_eps"],
        )

    @property
    def cache_layers(self) -> int:
        return self.num_layers

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]:
        """What one token of one layer stores: name -> (heads, features)."""
        return {"k": (self.num_kv_heads, self.head_dim), "v": (self.num_kv_heads, self.head_dim)}

    def lora_targets(self) -> dict[str, dict[str, LoraTarget]]:
        D, F, Q, KV = (
            self.hidden_size,
            self.intermediate_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )

        def target(group, path: str, in_features: int, out_features: int) -> LoraTarget:
            names = tuple(f"model.layers.{i}.{path}" for i in range(self.num_layers))
            return LoraTarget(group, in_features, out_features, names)

        return {
            "layers": {
                "q": target("attn", "self_attn.q_proj", D, Q),
                "k": target("attn", "self_attn.k_proj", D, KV),
                "v": target("attn", "self_attn.v_proj", D, KV),
                "o": target("attn", "self_attn.o_proj", Q, D),
                "gate": target("mlp", "mlp.gate_proj", D, F),
                "up": target("mlp", "mlp.up_proj", D, F),
                "down": target("mlp", "mlp.down_proj", F, D),
            },
            "head": {"head": LoraTarget("unembed", D, self.vocab_size, ("lm_head",))},
        }

    def forward(
        self,
        params: Params,
        lora: Lora,
        tokens: Array,
        positions: Array,
        attend: Attend,
        cache: Cache = (),
        remat: bool = False,
    ) -> tuple[Array, Cache]:
        """tokens, positions int32 [R, L] -> (hidden [R, L, D] after the final norm, cache)."""
        x = params["embed"][tokens]
        cos, sin = self.rope(positions)

        def body(carry, layer):
            x, cache = carry
            index, weights, adapters = layer
            return self.layer(index, weights, adapters, lora, x, cos, sin, attend, cache), None

        layers = (jnp.arange(self.num_layers), params["layers"], lora.weights["layers"])
        (x, cache), _ = jax.lax.scan(jax.checkpoint(body) if remat else body, (x, cache), layers)
        return rms_norm(x, params["norm"], self.rms_norm_eps), cache

    def layer(
        self,
        index: Array,
        w: Params,
        adapters: LayerLora,
        lora: Lora,
        x: Array,
        cos: Array,
        sin: Array,
        attend: Attend,
        cache: Cache,
    ) -> tuple[Array, Cache]:
        heads = partial(_heads, features=self.head_dim)
        h = rms_norm(x, w["input_norm"], self.rms_norm_eps)
        dq, dk, dv = lora.deltas(adapters, ("q", "k", "v"), h)
        q = rotate(rms_norm(heads(h @ w["q"] + dq), w["q_norm"], self.rms_norm_eps), cos, sin)
        k = rotate(rms_norm(heads(h @ w["k"] + dk), w["k_norm"], self.rms_norm_eps), cos, sin)
        out, cache = attend(cache, index, q, k, heads(h @ w["v"] + dv), self.head_dim**-0.5)
        out = out.reshape(*x.shape[:2], -1)
        x = x + out @ w["o"] + lora.deltas(adapters, ("o",), out)[0]
        h = rms_norm(x, w["post_norm"], self.rms_norm_eps)
        dgate, dup = lora.deltas(adapters, ("gate", "up"), h)
        h = jax.nn.silu(h @ w["gate"] + dgate) * (h @ w["up"] + dup)
        return x + h @ w["down"] + lora.deltas(adapters, ("down",), h)[0], cache

    def rope(self, positions: Array) -> tuple[Array, Array]:
        frequencies = self.rope_theta ** -(jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)


def _heads(x: Array, features: int) -> Array:
    return x.reshape(*x.shape[:2], -1, features)
