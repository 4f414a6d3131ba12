"""Reads `config.json`. A setting that changes results and is not implemented is refused by name, never ignored."""

from __future__ import annotations

from typing import Any

from tx_async.errors import BaseModelError
from tx_async.layers.block import Layer, Norms
from tx_async.layers.gqa import GroupedQueryAttention
from tx_async.layers.mlp import ACTIVATIONS, GatedMlp
from tx_async.layers.norm import RmsNorm
from tx_async.model_folder import context_length
from tx_async.models.quantization import check_quantization

Config = dict[str, Any]


def only(config: Config, key: str, *allowed: Any) -> None:
    """Raises `BaseModelError` for any value but those `allowed`; the first of them is the value of an absent key."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        known = ", ".join(repr(a) for a in allowed)
        raise BaseModelError(f"{key} {value!r} is not supported; only {known}.")


def need(config: Config, key: str) -> Any:
    """The value of a key. Raises `BaseModelError` where it is absent or null."""
    if config.get(key) is None:
        raise BaseModelError(f"{key} is missing.")
    return config[key]


def common(config: Config, norm: RmsNorm | None = None, tied: bool = False) -> dict[str, Any]:
    """The fields of `Decoder` that all families spell alike, after the checks that they share. tied: what an absent key
    means."""
    only(config, "is_decoder", True, None, False)
    check_quantization(config)
    return {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": need(config, "hidden_size"),
        "max_position_embeddings": need(config, "max_position_embeddings") and context_length(config),
        "norm": norm or rms_norm(config),
        "tied": bool(config.get("tie_word_embeddings", tied)),
    }


def rms_norm(config: Config, adds_one: bool = False) -> RmsNorm:
    return RmsNorm(config.get("rms_norm_eps", 1e-6), adds_one)


def num_layers(config: Config) -> int:
    return need(config, "num_hidden_layers")


def heads(config: Config, head_dim: int) -> dict[str, Any]:
    """The fields of `GroupedQueryAttention` that all families spell alike."""
    return {
        "hidden_size": need(config, "hidden_size"),
        "num_heads": need(config, "num_attention_heads"),
        "num_kv_heads": num_kv_heads(config),
        "head_dim": head_dim,
    }


def gated_mlp(config: Config, key: str = "hidden_act", bias: bool = False, fused: bool = False) -> GatedMlp:
    """The dense MLP. key: where the family names its activation."""
    only(config, key, *ACTIVATIONS)
    hidden, inner = need(config, "hidden_size"), need(config, "intermediate_size")
    return GatedMlp(hidden, inner, bias, activation=config.get(key, "silu"), fused=fused)


def pre_norm(config: Config) -> Norms:
    """A norm before the mixer and one before the MLP, as most families have them."""
    return Norms(rms_norm(config))


def head_dim(config: Config, default: int | None = None) -> int:
    """`default` is for an absent key; null means an even share of the hidden size."""
    if default and "head_dim" not in config:
        return default
    return config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")


def num_kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or need(config, "num_attention_heads")


# ---- kinds of layers

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(
    config: Config, default: list[str] | None = None, known: tuple[str, ...] = (FULL, SLIDING)
) -> list[str]:
    """The type of each layer; `default` where the file lists none."""
    count = num_layers(config)
    types = config.get("layer_types") or default or [FULL] * count
    unknown = sorted(set(types) - set(known))
    if unknown or len(types) < count:
        raise BaseModelError(
            f"layer_types {unknown or types}: only {' and '.join(known)} are supported, one per layer."
        )
    return types[:count]


def window(config: Config, kind: str) -> int:
    """How many tokens a layer of this kind sees; 0 = all."""
    return need(config, "sliding_window") if kind == SLIDING else 0


def no_windows(config: Config) -> None:
    """Raises `BaseModelError` for sliding windows, for families that have none."""
    only(config, "use_sliding_window", False, None)
    layer_types(config, known=(FULL,))


def switched_layer_types(config: Config) -> list[str]:
    """Qwen: `use_sliding_window` puts windows into the layers from `max_window_layers` on, or where `layer_types`
    says."""
    if not config.get("use_sliding_window"):
        return layer_types(config, known=(FULL,))
    count, first = num_layers(config), config.get("max_window_layers", 28)
    return layer_types(config, [SLIDING if i >= first else FULL for i in range(count)])


def name_of(kind: str, types: list[str]) -> str:
    """The name of a layer's stack: one name where all layers are equal."""
    return "layers" if len(set(types)) == 1 else kind.removesuffix("_attention")


def dense_layers(types: list[str], attention: dict[str, GroupedQueryAttention], mlp: GatedMlp, norms: Norms) -> tuple:
    """Layers that differ only in their attention."""
    made = {kind: Layer(name_of(kind, types), mixer, mlp, norms) for kind, mixer in attention.items()}
    return tuple(made[kind] for kind in types)
