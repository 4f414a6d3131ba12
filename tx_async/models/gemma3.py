"""Gemma 3 (`Gemma3ForCausalLM`, and the text of `Gemma3ForConditionalGeneration`): norms of 1 + w around the mixer and
around the MLP, scaled embeddings, windows in five of six layers, and a rope for each kind of layer."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Norms
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        hf_config.only(config, key, None)
    hf_config.only(config, "use_bidirectional_attention", False, None)
    config = {"sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh"} | config
    head_dim, bias = hf_config.head_dim(config, default=256), bool(config.get("attention_bias"))
    norm, types = hf_config.rms_norm(config, adds_one=True), _layer_types(config)
    attention = {
        kind: GroupedQueryAttention(
            **hf_config.heads(config, head_dim),
            rope=rope.from_hf(_rope_of(config, kind), head_dim),
            bias=bias,
            out_bias=bias,
            head_norm=norm,
            scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            window=hf_config.window(config, kind),
        )
        for kind in dict.fromkeys(types)
    }
    norms = Norms(
        norm, "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )
    common = hf_config.common(config, norm, tied=True)
    layers = hf_config.dense_layers(types, attention, hf_config.gated_mlp(config, "hidden_activation"), norms)
    return Decoder(**common, layers=layers, embed_scale=common["hidden_size"] ** 0.5)


def _layer_types(config: dict[str, Any]) -> list[str]:
    every, count = config.get("sliding_window_pattern", 6), hf_config.num_layers(config)
    return hf_config.layer_types(
        config, [hf_config.SLIDING if (i + 1) % every else hf_config.FULL for i in range(count)]
    )


def _rope_of(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The rope of a kind of layer, given by kind, or in the old keys: `rope_theta` and `rope_scaling` of full
    attention, `rope_local_base_freq` of windows."""
    if {hf_config.FULL, hf_config.SLIDING} & set(config.get("rope_parameters") or {}):
        return rope.of_kind(config, kind)
    if kind == hf_config.FULL:
        return {"default_rope_theta": 1_000_000.0} | config
    local = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    return config | {"rope_scaling": None, "rope_parameters": local}
