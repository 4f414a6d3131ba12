"""Tiny random models in Hugging Face format, made on the spot: a config, random weights, a byte-level tokenizer. No network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

QWEN3_TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "eos_token_id": 256,
    "torch_dtype": "float32",
}


def make_qwen3(folder: str | Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random Qwen3 (QWEN3_TINY with `overrides`) and a tokenizer into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = QWEN3_TINY | overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_qwen3_weights(config, np.random.default_rng(seed)), folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        make_byte_tokenizer(folder)
    return folder


def _qwen3_weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    Q, KV = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))

    def matrix(out_features: int, in_features: int) -> np.ndarray:
        return rng.standard_normal((out_features, in_features), np.float32) * np.float32(in_features**-0.5)

    def norm(features: int) -> np.ndarray:
        return 1 + rng.standard_normal(features, np.float32) * np.float32(0.1)

    weights = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": norm(D)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(V, D)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(D),
            "post_attention_layernorm": norm(D),
            "self_attn.q_proj": matrix(Q, D),
            "self_attn.k_proj": matrix(KV, D),
            "self_attn.v_proj": matrix(KV, D),
            "self_attn.o_proj": matrix(D, Q),
            "self_attn.q_norm": norm(config["head_dim"]),
            "self_attn.k_norm": norm(config["head_dim"]),
            "mlp.gate_proj": matrix(F, D),
            "mlp.up_proj": matrix(F, D),
            "mlp.down_proj": matrix(D, F),
        }
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return weights


def make_byte_tokenizer(folder: str | Path) -> None:
    """A tokenizer of 256 byte tokens and `<|endoftext|>` (id 256), loadable by transformers' AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
