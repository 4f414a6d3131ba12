"""Reads a base model's folder for both sides: the server, which never imports JAX, and the loader.

Whatever is wrong with a file is reported in one line that names the file and the field. Neither this module nor its
callers ever meet a value of an unexpected type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tx_async.errors import BaseModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "max_window_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
NUMBERS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "partial_rotary_factor")
ROPE_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
)
TRUTHS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "rope_interleave", "use_sliding_window"),
    "is_decoder",
)
STRINGS = ("model_type", "hidden_act", "hidden_activation")
LISTS = ("architectures", "layer_types", "mlp_layer_types", "mlp_only_layers")
OBJECTS = ("text_config", "quantization_config", "rope_scaling", "rope_parameters")


# ---- config.json


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`; every known field has the type that it has in transformers. Raises `BaseModelError`."""
    path = folder / CONFIG
    config = read_json(path)
    if config is None:
        raise BaseModelError(f"{folder} has no {CONFIG}: it is not the folder of a Hugging Face model.")
    check_fields(path, config)
    return config


def check_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Check the types of known fields. Null counts as absent."""
    _check_each(path, config, INTEGERS, "a whole number, not negative", _is_count)
    _check_each(path, config, NUMBERS, "a number", _is_number)
    _check_each(path, config, TRUTHS, "true or false", lambda value: isinstance(value, bool))
    _check_each(path, config, STRINGS, "text", lambda value: isinstance(value, str))
    _check_each(path, config, LISTS, "a list", lambda value: isinstance(value, list))
    _check_each(path, config, OBJECTS, "an object", lambda value: isinstance(value, dict))
    _check_each(path, config, ("eos_token_id",), "a whole number or a list of them", _are_tokens)
    for name in config.get("architectures") or ():
        if not isinstance(name, str):
            raise BaseModelError(f"{path}: architectures is {config['architectures']!r}; it must list names.")
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(path, key, config.get(key) or {})
    if config.get("text_config"):
        check_fields(path, config["text_config"])


def need(path: Path, config: Mapping[str, Any], key: str) -> Any:
    """A field that must be there: sizes have no defaults."""
    if config.get(key) is None:
        raise BaseModelError(f"{path} lacks {key}.")
    return config[key]


def context_length(config: Mapping[str, Any]) -> int:
    """Positions that the model takes: `max_position_embeddings`, or with YaRN `factor` times the original ones, as in
    vLLM. The config must have been checked."""
    positions = config["max_position_embeddings"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "yarn" or not rope.get("factor"):
        return positions
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(rope["factor"] * (original or positions))


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence tokens. generation_config.json wins, as in transformers' `generate`."""
    path = folder / "generation_config.json"
    generation = read_json(path) or {}
    _check_each(path, generation, ("eos_token_id",), "a whole number or a list of them", _are_tokens)
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None without a file. Raises `BaseModelError`."""
    try:
        content = path.read_bytes()
        check_no_pointer(path, content)
        value = json.loads(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path} holds {_kind(value)}, not an object.")
    return value


def check_no_pointer(path: Path, head: bytes) -> None:
    if head.startswith(LFS_POINTER):
        raise BaseModelError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder.")


def _check_each(
    path: Path, config: Mapping[str, Any], keys: tuple[str, ...], what: str, fits: Callable[[Any], bool]
) -> None:
    for key in keys:
        if config.get(key) is not None and not fits(config[key]):
            raise BaseModelError(f"{path}: {key} is {_shown(config[key])}; it must be {what}.")


def _check_rope(path: Path, key: str, rope: Mapping[str, Any]) -> None:
    """Check rope's fields; `rope_parameters` may hold one object for each kind of layer."""
    for field, value in rope.items():
        if isinstance(value, dict):
            _check_rope(path, f"{key}.{field}", value)
        elif field in ROPE_NUMBERS and value is not None and not _is_number(value):
            raise BaseModelError(f"{path}: {key}.{field} is {_shown(value)}; it must be a number.")
        elif field in ("rope_type", "type") and not isinstance(value, str):
            raise BaseModelError(f"{path}: {key}.{field} is {_shown(value)}; it must be text.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return all(map(_is_count, value)) if isinstance(value, list) else _is_count(value)


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "null"}.get(type(value), "a number or a truth value")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# ---- weights


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: those in `model.safetensors.index.json` if there is one, which must then be
    complete.

    Raises `BaseModelError`.
    """
    path = folder / INDEX
    index = read_json(path)
    if index is None:
        return ["model.safetensors"]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(f"{path}: weight_map is {_shown(weight_map)}; it must give a file for each tensor.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file:
            raise BaseModelError(f"{path}: weight_map has {_shown(file)} for {tensor}; it must be a file's name.")
    return sorted(set(weight_map.values()))
