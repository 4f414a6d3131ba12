"""Reading `config.json`: what changes the numbers and is not implemented is refused by name, never ignored."""

from __future__ import annotations

from typing import Any

from tx_async.errors import BaseModelError
from tx_async.layers import rope
from tx_async.model_folder import context_length

Config = dict[str, Any]


def only(config: Config, key: str, *allowed: Any) -> None:
    """The first of `allowed` is the value of an absent key."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        known = ", ".join(repr(a) for a in allowed)
        raise BaseModelError(f"{key} {value!r} in config.json is not supported; only {known}.")


def need(config: Config, key: str) -> Any:
    if config.get(key) is None:
        raise BaseModelError(f"config.json lacks {key}.")
    return config[key]


def common(config: Config, rope_dim: int) -> dict[str, Any]:
    """Fields of `Decoder` that all families spell alike, after the checks that all share."""
    only(config, "hidden_act", "silu", "swish")
    only(config, "use_sliding_window", False, None)
    only(config, "is_decoder", True, None, False)
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise BaseModelError(f"layer_types {sorted(layer_types)} in config.json: only full_attention is supported.")
    check_quantization(config)
    return {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": need(config, "hidden_size"),
        "num_layers": need(config, "num_hidden_layers"),
        "max_position_embeddings": need(config, "max_position_embeddings") and context_length(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "rope": rope.from_hf(config, rope_dim),
    }


def head_dim(config: Config, default: int | None = None) -> int:
    """`default` is for an absent key; a null one means an even share of the hidden size."""
    if default and "head_dim" not in config:
        return default
    return config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")


def num_kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or need(config, "num_attention_heads")


def check_quantization(config: Config) -> None:
    """fp8 in blocks (DeepSeek) is dequantised while loading; every other quantisation is refused."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method, blocks = quantization.get("quant_method"), quantization.get("weight_block_size") or ()
    known = method == "fp8" and quantization.get("fmt", "e4m3") == "e4m3"
    if not known or len(blocks) != 2 or any(size & (size - 1) for size in blocks):
        raise BaseModelError(
            f"quantization_config {method!r} in config.json is not supported; only fp8 (e4m3) with a weight_block_size "
            "of powers of two is."
        )
