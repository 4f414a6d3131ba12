"""OLMo 3 (`Olmo3ForCausalLM`): norms after the mixer and after the MLP, norms of queries and keys over the whole
projection; windows in three of four layers. Only full-attention layers have scaled rope (YaRN), as in training."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Norms
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    config = {"default_rope_theta": 500_000.0, "sliding_window": 4096} | config
    head_dim, bias = hf_config.head_dim(config), bool(config.get("attention_bias"))
    count, norm = hf_config.num_layers(config), hf_config.rms_norm(config)
    default = [hf_config.FULL if (i + 1) % 4 == 0 else hf_config.SLIDING for i in range(count)]
    types = hf_config.layer_types(config, default)
    attention = {
        kind: GroupedQueryAttention(
            **hf_config.heads(config, head_dim),
            rope=rope.from_hf(_rope_of(config, kind), head_dim),
            bias=bias,
            out_bias=bias,
            head_norm=norm,
            norms_whole=True,
            window=hf_config.window(config, kind),
        )
        for kind in dict.fromkeys(types)
    }
    norms = Norms(norm, "", "post_attention_layernorm", "", "post_feedforward_layernorm")
    layers = hf_config.dense_layers(types, attention, hf_config.gated_mlp(config), norms)
    return Decoder(**hf_config.common(config), layers=layers)


def _rope_of(config: dict[str, Any], kind: str) -> dict[str, Any]:
    parameters = config.get("rope_parameters") or {}
    if not {hf_config.FULL, hf_config.SLIDING} & set(parameters) and kind == hf_config.SLIDING:
        theta = rope.parameters(config)["rope_theta"]
        return config | {"rope_scaling": None, "rope_parameters": {"rope_theta": theta}}
    return rope.of_kind(config, kind)
