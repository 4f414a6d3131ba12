"""Phi 3 and 4 (`Phi3ForCausalLM`): fused projections, partial rope in some, LongRoPE in those with long contexts."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.layer_types(config, known=(hf_config.FULL,))
    head_dim = hf_config.head_dim(config)
    attention = GroupedQueryAttention(
        **hf_config.heads(config, head_dim),
        rope=rope.from_hf(_long(config), head_dim, partial=True),
        window=config.get("sliding_window") or 0,
        fused=True,
    )
    layer = Layer("layers", attention, hf_config.gated_mlp(config, fused=True), hf_config.pre_norm(config))
    return Decoder(**hf_config.common(config), layers=(layer,) * hf_config.num_layers(config))


def _long(config: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters with LongRoPE's old names replaced."""
    found = rope.parameters(config)
    if found["rope_type"] in ("su", "yarn"):
        found["rope_type"] = "longrope"
    return config | {"rope_scaling": None, "rope_parameters": found}
