"""Qwen3, dense (`Qwen3ForCausalLM`): grouped-query attention with RMSNorm on queries and keys, gated SiLU MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.weights import Stack
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


@dataclass(frozen=True)
class Qwen3(Decoder):
    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3:
        head_dim = hf_config.head_dim(config, default=128)  # as in transformers: 128 whatever the hidden size
        common = hf_config.common(config, head_dim)
        hidden = common["hidden_size"]
        return cls(
            **common,
            attention=GroupedQueryAttention(
                hidden_size=hidden,
                num_heads=hf_config.need(config, "num_attention_heads"),
                num_kv_heads=hf_config.num_kv_heads(config),
                head_dim=head_dim,
                bias=bool(config.get("attention_bias")),
                head_norm_eps=common["rms_norm_eps"],
            ),
            mlps=(("dense", GatedMlp(hidden, hf_config.need(config, "intermediate_size"))),),
            segments=((Stack("layers", tuple(range(common["num_layers"]))),),),
        )
