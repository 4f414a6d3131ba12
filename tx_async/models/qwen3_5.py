"""Qwen3.5 (`Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM`, the text model of their `…ForConditionalGeneration`) and
Qwen3-Next (`Qwen3NextForCausalLM`): gated delta rule in most layers, gated attention with partial rope in the others,
norms of 1 + w; a dense MLP, or experts beside a shared one with a gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tx_async.layers import rope
from tx_async.layers.block import Layer, Mixer, Mlp, Norms
from tx_async.layers.delta_net import GatedDeltaNet
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import GatedMlp
from tx_async.layers.moe import MoeMlp
from tx_async.layers.router import SoftmaxRouter
from tx_async.models import hf_config
from tx_async.models.decoder import Decoder

LINEAR = "linear_attention"


def dense(config: dict[str, Any]) -> Decoder:
    return _decoder(config, {"": hf_config.gated_mlp(config)}, [""] * hf_config.num_layers(config), False)


def moe(config: dict[str, Any]) -> Decoder:
    experts = _experts(config, norm_topk_prob=True)  # this router always renormalises
    made = _decoder(config, {"": experts}, [""] * hf_config.num_layers(config), False)
    return replace(made, peft_knows_experts=False)


def next_moe(config: dict[str, Any]) -> Decoder:
    every, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    count = hf_config.num_layers(config)
    kinds = ["" if (i + 1) % every == 0 and i not in listed else "_dense" for i in range(count)]
    mlps: dict[str, Mlp] = {"": _experts(config, bool(config.get("norm_topk_prob", True)))}
    if "_dense" in kinds:
        mlps["_dense"] = hf_config.gated_mlp(config)
    return _decoder(config, mlps, kinds, True)


def _decoder(config: dict[str, Any], mlps: dict[str, Mlp], mlp_kinds: list[str], interleaved: bool) -> Decoder:
    hf_config.only(config, "hidden_act", "silu", "swish")
    norm, count = hf_config.rms_norm(config, adds_one=True), hf_config.num_layers(config)
    every = config.get("full_attention_interval", 4)
    default = [LINEAR if (i + 1) % every else hf_config.FULL for i in range(count)]
    types = hf_config.layer_types(config, default, known=(hf_config.FULL, LINEAR))
    mixers: dict[str, Mixer] = {hf_config.FULL: _attention(config), LINEAR: _delta_net(config, interleaved)}
    names = {hf_config.FULL: "full", LINEAR: "linear"}
    layers = tuple(
        Layer(names[kind] + mlp_kind, mixers[kind], mlps[mlp_kind], Norms(norm))
        for kind, mlp_kind in zip(types, mlp_kinds, strict=True)
    )
    return Decoder(**hf_config.common(config, norm), layers=layers, skipped=("mtp.",))


def _attention(config: dict[str, Any]) -> GroupedQueryAttention:
    head_dim, bias = hf_config.head_dim(config, default=256), bool(config.get("attention_bias"))
    return GroupedQueryAttention(
        **hf_config.heads(config, head_dim),
        rope=rope.from_hf({"partial_rotary_factor": 0.25} | config, head_dim, partial=True),
        bias=bias,
        out_bias=bias,
        head_norm=hf_config.rms_norm(config, adds_one=True),
        gated=True,
    )


def _delta_net(config: dict[str, Any], interleaved: bool) -> GatedDeltaNet:
    return GatedDeltaNet(
        hidden_size=hf_config.need(config, "hidden_size"),
        num_key_heads=hf_config.need(config, "linear_num_key_heads"),
        num_value_heads=hf_config.need(config, "linear_num_value_heads"),
        key_dim=hf_config.need(config, "linear_key_head_dim"),
        value_dim=hf_config.need(config, "linear_value_head_dim"),
        kernel=config.get("linear_conv_kernel_dim", 4),
        eps=hf_config.need(config, "rms_norm_eps"),
        interleaved=interleaved,
    )


def _experts(config: dict[str, Any], norm_topk_prob: bool) -> MoeMlp:
    hidden = hf_config.need(config, "hidden_size")
    router = SoftmaxRouter(
        hidden_size=hidden,
        num_experts=hf_config.need(config, "num_experts"),
        num_experts_per_tok=hf_config.need(config, "num_experts_per_tok"),
        norm_topk_prob=norm_topk_prob,
    )
    inner = hf_config.need(config, "shared_expert_intermediate_size")
    shared = GatedMlp(hidden, inner, prefix="shared_", module="mlp.shared_expert")
    return MoeMlp(hidden, hf_config.need(config, "moe_intermediate_size"), router, shared, shared_gate=True)
