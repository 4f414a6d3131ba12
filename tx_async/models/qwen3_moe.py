"""Qwen3 MoE (`Qwen3MoeForCausalLM`): Qwen3 attention; a softmax router over gated SiLU experts in the sparse layers."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import SoftmaxRouter
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.only(config, "hidden_act", "silu", "swish")
    hf_config.layer_types(config, known=(hf_config.FULL,))
    head_dim, bias = hf_config.head_dim(config), bool(config.get("attention_bias"))
    hidden, norms = hf_config.need(config, "hidden_size"), hf_config.pre_norm(config)
    attention = GroupedQueryAttention(
        **hf_config.heads(config, head_dim),
        rope=rope.from_hf(config, head_dim),
        bias=bias,
        out_bias=bias,
        head_norm=hf_config.rms_norm(config),
        window=hf_config.need(config, "sliding_window") if config.get("use_sliding_window") else 0,
    )
    layers = {
        "dense": Layer("dense", attention, GatedMlp(hidden, config.get("intermediate_size", 0)), norms),
        "moe": Layer("moe", attention, _experts(config, hidden), norms),
    }
    kinds = (_kind(config, i) for i in range(hf_config.num_layers(config)))
    return Decoder(**hf_config.common(config), layers=tuple(layers[kind] for kind in kinds))


def _experts(config: dict[str, Any], hidden: int) -> MoeMlp:
    router = SoftmaxRouter(
        hidden_size=hidden,
        num_experts=config.get("num_experts") or hf_config.need(config, "num_local_experts"),
        num_experts_per_tok=hf_config.need(config, "num_experts_per_tok"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
    )
    return MoeMlp(hidden, hf_config.need(config, "moe_intermediate_size"), router)


def _kind(config: dict[str, Any], layer: int) -> str:
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    return "moe" if sparse and layer not in (config.get("mlp_only_layers") or ()) else "dense"
