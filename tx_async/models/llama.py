"""Llama 3 (`LlamaForCausalLM`): grouped-query attention, gated SiLU MLP, llama3 rope scaling, tied heads in the small
ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.weights import Stack
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


@dataclass(frozen=True)
class Llama(Decoder):
    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Llama:
        head_dim = hf_config.head_dim(config)
        common = hf_config.common(config, head_dim)
        hidden, inner = common["hidden_size"], hf_config.need(config, "intermediate_size")
        return cls(
            **common,
            attention=GroupedQueryAttention(
                hidden_size=hidden,
                num_heads=hf_config.need(config, "num_attention_heads"),
                num_kv_heads=hf_config.num_kv_heads(config),
                head_dim=head_dim,
                bias=bool(config.get("attention_bias")),
            ),
            mlps=(("dense", GatedMlp(hidden, inner, bias=bool(config.get("mlp_bias")))),),
            segments=((Stack("layers", tuple(range(common["num_layers"]))),),),
        )
