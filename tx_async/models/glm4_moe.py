"""GLM 4.5 to 4.7 (`Glm4MoeForCausalLM`): grouped-query attention with partial rope, dense first layers, then DeepSeek's
router and shared experts."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder
from tx_async.models.deepseek_v3 import extra_layers, sigmoid_routed

DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def from_hf(config: dict[str, Any]) -> Decoder:
    config = DEFAULTS | config
    hf_config.only(config, "scoring_func", "sigmoid")
    hf_config.only(config, "hidden_act", "silu", "swish")
    hf_config.no_windows(config)
    head_dim, count, norms = hf_config.head_dim(config), hf_config.num_layers(config), hf_config.pre_norm(config)
    hidden, num_dense = hf_config.need(config, "hidden_size"), config["first_k_dense_replace"]
    attention = GroupedQueryAttention(
        **hf_config.heads(config, head_dim),
        rope=rope.from_hf(config, head_dim, partial=True),
        bias=bool(config.get("attention_bias")),
        head_norm=hf_config.rms_norm(config) if config.get("use_qk_norm") else None,
    )
    dense = Layer("dense", attention, GatedMlp(hidden, hf_config.need(config, "intermediate_size")), norms)
    sparse = Layer("moe", attention, sigmoid_routed(config, hidden), norms)
    return Decoder(
        **hf_config.common(config),
        layers=tuple(dense if i < num_dense else sparse for i in range(count)),
        skipped=extra_layers(config, count),
    )
