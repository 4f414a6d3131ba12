"""gpt-oss (`GptOssForCausalLM`): attention with sinks and biases, windows in every other layer, YaRN; experts with
biases and a clamped swiglu, of MXFP4 or bf16 files."""

from __future__ import annotations

from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import ClampedSwiglu
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import ChosenSoftmaxRouter
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.only(config, "hidden_act", "silu", "swish")
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        config = config | {"rope_parameters": ROPE}
    config = {"default_rope_theta": 150_000.0, "sliding_window": 128} | config
    head_dim, bias = hf_config.head_dim(config, default=64), bool(config.get("attention_bias", True))
    default = [hf_config.FULL if i % 2 else hf_config.SLIDING for i in range(hf_config.num_layers(config))]
    types, experts, norms = hf_config.layer_types(config, default), _experts(config), hf_config.pre_norm(config)
    layers = {
        kind: Layer(
            hf_config.name_of(kind, types),
            GroupedQueryAttention(
                **hf_config.heads(config, head_dim),
                rope=rope.from_hf(config, head_dim),
                bias=bias,
                out_bias=bias,
                window=hf_config.window(config, kind),
                sinks=True,
            ),
            experts,
            norms,
        )
        for kind in dict.fromkeys(types)
    }
    return Decoder(**hf_config.common(config), layers=tuple(layers[kind] for kind in types), interleaved_experts=True)


def _experts(config: dict[str, Any]) -> MoeMlp:
    hidden = hf_config.need(config, "hidden_size")
    chosen = config.get("num_experts_per_tok") or hf_config.need(config, "experts_per_token")
    count = config.get("num_local_experts") or hf_config.need(config, "num_experts")
    activation = ClampedSwiglu(config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0))
    router = ChosenSoftmaxRouter(hidden, count, chosen)
    return MoeMlp(hidden, hf_config.need(config, "intermediate_size"), router, bias=True, activation=activation)
