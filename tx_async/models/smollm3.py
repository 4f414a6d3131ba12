"""SmolLM3 (`SmolLM3ForCausalLM`): a Llama in which some layers have no rope."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    config = {"default_rope_theta": 2_000_000.0} | config
    head_dim, bias = hf_config.head_dim(config), bool(config.get("attention_bias"))
    mlp, norms = hf_config.gated_mlp(config, bias=bool(config.get("mlp_bias"))), hf_config.pre_norm(config)
    kinds = _kinds(config)
    made = {}
    for with_rope, kind in dict.fromkeys(kinds):
        attention = GroupedQueryAttention(
            **hf_config.heads(config, head_dim),
            rope=rope.from_hf(config, head_dim) if with_rope else None,
            bias=bias,
            out_bias=bias,
            window=hf_config.window(config, kind) if config.get("use_sliding_window") else 0,
        )
        name = ("rope" if with_rope else "no_rope") + ("_sliding" if attention.window else "")
        made[with_rope, kind] = Layer(name, attention, mlp, norms)
    return Decoder(**hf_config.common(config, tied=True), layers=tuple(made[kind] for kind in kinds))


def _kinds(config: dict[str, Any]) -> list[tuple[bool, str]]:
    """(has rope, kind of attention) of each layer. In `no_rope_layers` a 1 means that the layer has rope."""
    count, every = hf_config.num_layers(config), config.get("no_rope_layer_interval", 4)
    listed = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    windows = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    default = [hf_config.SLIDING if windows and not has_rope else hf_config.FULL for has_rope in listed]
    types = hf_config.layer_types(config, default[:count])
    return [(bool(has_rope), kind) for has_rope, kind in zip(listed, types, strict=False)]
