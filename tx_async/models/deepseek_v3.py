"""DeepSeek V3 (`DeepseekV3ForCausalLM`) and its kin (`Glm4MoeLiteForCausalLM`): latent attention, dense first layers,
then sigmoid-routed experts chosen from the best groups, beside shared experts."""

from __future__ import annotations

from typing import Any

from tx_async.errors import BaseModelError
from tx_async.layers import rope
from tx_async.layers.block import Layer
from tx_async.layers.mla import LatentAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import SigmoidRouter
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder


def from_hf(config: dict[str, Any]) -> Decoder:
    hf_config.only(config, "scoring_func", "sigmoid")
    hf_config.only(config, "topk_method", "noaux_tc")
    hf_config.only(config, "moe_layer_freq", 1)
    hf_config.only(config, "hidden_act", "silu", "swish")
    hf_config.no_windows(config)
    hidden, count, norms = (
        hf_config.need(config, "hidden_size"),
        hf_config.num_layers(config),
        hf_config.pre_norm(config),
    )
    attention = _attention(config, hidden, hf_config.need(config, "qk_rope_head_dim"))
    dense = GatedMlp(hidden, hf_config.need(config, "intermediate_size"))
    layers = {
        "dense": Layer("dense", attention, dense, norms),
        "moe": Layer("moe", attention, sigmoid_routed(config, hidden), norms),
    }
    return Decoder(
        **hf_config.common(config),
        layers=tuple(layers[kind] for kind in _kinds(config, count)),
        skipped=extra_layers(config, count),
    )


def extra_layers(config: dict[str, Any], num_layers: int) -> tuple[str, ...]:
    """Layers past the last one do multi-token prediction."""
    extra = max(config.get("num_nextn_predict_layers") or 0, 1)
    return tuple(f"model.layers.{num_layers + i}." for i in range(extra))


def _attention(config: dict[str, Any], hidden: int, rope_dim: int) -> LatentAttention:
    nope_dim = hf_config.need(config, "qk_nope_head_dim")
    return LatentAttention(
        hidden_size=hidden,
        num_heads=hf_config.need(config, "num_attention_heads"),
        q_lora_rank=config.get("q_lora_rank") or 0,
        kv_lora_rank=hf_config.need(config, "kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=hf_config.need(config, "v_head_dim"),
        rope=rope.from_hf(config, rope_dim),
        scale=(nope_dim + rope_dim) ** -0.5 * _mscale(rope.parameters(config)) ** 2,
        interleaved=bool(config.get("rope_interleave", True)),
        bias=bool(config.get("attention_bias")),
    )


def _mscale(parameters: dict[str, Any]) -> float:
    """Scaled ropes also change the softmax's scale, by `mscale_all_dim`."""
    if parameters["rope_type"] == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    return rope.yarn_mscale(parameters["factor"], parameters["mscale_all_dim"])


def sigmoid_routed(config: dict[str, Any], hidden: int) -> MoeMlp:
    inner, num_shared = hf_config.need(config, "moe_intermediate_size"), hf_config.need(config, "n_shared_experts")
    router = SigmoidRouter(
        hidden_size=hidden,
        num_experts=config.get("n_routed_experts") or hf_config.need(config, "num_local_experts"),
        num_experts_per_tok=hf_config.need(config, "num_experts_per_tok"),
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        num_groups=hf_config.need(config, "n_group"),
        topk_group=hf_config.need(config, "topk_group"),
        scaling_factor=float(hf_config.need(config, "routed_scaling_factor")),
    )
    shared = GatedMlp(hidden, inner * num_shared, prefix="shared_", module="mlp.shared_experts") if num_shared else None
    return MoeMlp(hidden, inner, router, shared)


def _kinds(config: dict[str, Any], num_layers: int) -> tuple[str, ...]:
    """`first_k_dense_replace` (DeepSeek), or a list of "dense" and "sparse" (GLM, by default dense in the first
    layer)."""
    types = config.get("mlp_layer_types")
    if types is None:
        dense = config.get("first_k_dense_replace", 1 if config.get("model_type") == "glm4_moe_lite" else 3)
        types = ["dense"] * dense + ["sparse"] * (num_layers - dense)
    if len(types) < num_layers or set(types) - {"dense", "sparse"}:
        raise BaseModelError(f"mlp_layer_types {types} is not supported.")
    return tuple("moe" if kind == "sparse" else "dense" for kind in types[:num_layers])
