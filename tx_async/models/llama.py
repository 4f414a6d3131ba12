"""Llama 3 (`LlamaForCausalLM`): grouped-query attention, gated SiLU MLP, llama3 rope scaling, tied heads in the small
ones."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.no_windows(config)
    head_dim, bias = hf_config.head_dim(config), bool(config.get("attention_bias"))
    attention = GroupedQueryAttention(
        **hf_config.heads(config, head_dim), rope=rope.from_hf(config, head_dim), bias=bias, out_bias=bias
    )
    mlp = hf_config.gated_mlp(config, bias=bool(config.get("mlp_bias")))
    layer = Layer("layers", attention, mlp, hf_config.pre_norm(config))
    return Decoder(**hf_config.common(config), layers=(layer,) * hf_config.num_layers(config))
