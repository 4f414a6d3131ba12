"""Qwen2 and 2.5 (`Qwen2ForCausalLM`): biases only on queries, keys and values; gated SiLU MLP."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    head_dim = hf_config.head_dim(config)
    types = hf_config.switched_layer_types(config)
    attention = {
        kind: GroupedQueryAttention(
            **hf_config.heads(config, head_dim),
            rope=rope.from_hf(config, head_dim),
            bias=True,
            window=hf_config.window(config, kind),
        )
        for kind in dict.fromkeys(types)
    }
    mlp, norms = hf_config.gated_mlp(config), hf_config.pre_norm(config)
    return Decoder(**hf_config.common(config), layers=hf_config.dense_layers(types, attention, mlp, norms))
