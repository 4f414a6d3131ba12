"""Seed-OSS (`SeedOssForCausalLM`): a Llama with biases on queries, keys and values, and one on the output if its config
says so."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.no_windows(config)
    head_dim = hf_config.head_dim(config, default=128)
    attention = GroupedQueryAttention(
        **hf_config.heads(config, head_dim),
        rope=rope.from_hf(config, head_dim),
        bias=bool(config.get("attention_bias", True)),
        out_bias=bool(config.get("attention_out_bias")),
    )
    mlp = hf_config.gated_mlp(config, bias=bool(config.get("mlp_bias")))
    layer = Layer("layers", attention, mlp, hf_config.pre_norm(config))
    return Decoder(**hf_config.common(config), layers=(layer,) * hf_config.num_layers(config))
