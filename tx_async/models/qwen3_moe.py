"""Qwen3 MoE (`Qwen3MoeForCausalLM`): Qwen3 attention; a softmax router over gated SiLU experts in the sparse layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import SoftmaxRouter
from tx_async.layers.weights import stacks_of
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


@dataclass(frozen=True)
class Qwen3Moe(Decoder):
    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3Moe:
        head_dim = hf_config.head_dim(config)
        common = hf_config.common(config, head_dim)
        hidden = common["hidden_size"]
        router = SoftmaxRouter(
            hidden_size=hidden,
            num_experts=config.get("num_experts") or hf_config.need(config, "num_local_experts"),
            num_experts_per_tok=hf_config.need(config, "num_experts_per_tok"),
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        )
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
            mlps=(
                ("dense", GatedMlp(hidden, config.get("intermediate_size", 0))),
                ("moe", MoeMlp(hidden, hf_config.need(config, "moe_intermediate_size"), router)),
            ),
            segments=stacks_of(tuple(_kind(config, i) for i in range(common["num_layers"]))),
        )


def _kind(config: dict[str, Any], layer: int) -> str:
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    return "moe" if sparse and layer not in (config.get("mlp_only_layers") or ()) else "dense"
