"""Mistral (`MistralForCausalLM`), Ministral 3 (`Ministral3ForCausalLM`), and the text model of vision models
(`Mistral3ForConditionalGeneration`): no biases, windows in all layers or in some, queries that grow with the position
(Ministral 3)."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.gqa import GroupedQueryAttention, QueryScaling
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder

MISTRAL_WINDOW = 4096
"""The window where `config.json` names none: transformers' default for Mistral; Ministral 3 has no default."""


def from_hf(config: dict[str, Any]) -> Decoder:
    if "Mistral3ForConditionalGeneration" in (config.get("architectures") or ()):
        config = config | {"sliding_window": config.get("sliding_window")}
    return _decoder({"sliding_window": MISTRAL_WINDOW} | config)


def ministral3(config: dict[str, Any]) -> Decoder:
    return _decoder(config)


def _decoder(config: dict[str, Any]) -> Decoder:
    head_dim = hf_config.head_dim(config)
    default = hf_config.SLIDING if config.get("sliding_window") else hf_config.FULL
    types = hf_config.layer_types(config, [default] * hf_config.num_layers(config))
    attention = {
        kind: GroupedQueryAttention(
            **hf_config.heads(config, head_dim),
            rope=rope.from_hf(config, head_dim),
            window=hf_config.window(config, kind),
            query_scaling=_query_scaling(config),
        )
        for kind in dict.fromkeys(types)
    }
    mlp, norms = hf_config.gated_mlp(config), hf_config.pre_norm(config)
    return Decoder(**hf_config.common(config), layers=hf_config.dense_layers(types, attention, mlp, norms))


def _query_scaling(config: dict[str, Any]) -> QueryScaling | None:
    parameters = rope.parameters(config)
    beta = parameters.get("llama_4_scaling_beta")
    return QueryScaling(float(beta), parameters["original_max_position_embeddings"]) if beta else None
