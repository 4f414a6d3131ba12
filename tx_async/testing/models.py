"""Tiny random models in Hugging Face format, made on the spot: a config, random weights, a byte-level tokenizer. No
network."""

from __future__ import annotations

import json
import zlib
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


LLAMA_TINY: dict[str, Any] = QWEN3_TINY | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "mlp_bias": False,
}

QWEN3_MOE_TINY: dict[str, Any] = QWEN3_TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

DEEPSEEK_V3_TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "eos_token_id": 256,
    "torch_dtype": "float32",
}


QWEN3_5_TINY: dict[str, Any] = QWEN3_TINY | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-4,  # where the rule's output is near 0, its norm amplifies rounding
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

QWEN3_5_MOE_TINY: dict[str, Any] = QWEN3_5_TINY | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


GPT_OSS_TINY: dict[str, Any] = QWEN3_TINY | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "sliding_window": 16,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}


def make_qwen3(folder: str | Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random Qwen3 (QWEN3_TINY with `overrides`) and a tokenizer into `folder`."""
    return make_model(folder, QWEN3_TINY | overrides, seed, tokenizer)


def make_llama(folder: str | Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random Llama (LLAMA_TINY with `overrides`) and a tokenizer into `folder`."""
    return make_model(folder, LLAMA_TINY | overrides, seed, tokenizer)


def make_qwen3_moe(folder: str | Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random Qwen3 MoE (QWEN3_MOE_TINY with `overrides`) and a tokenizer into `folder`."""
    return make_model(folder, QWEN3_MOE_TINY | overrides, seed, tokenizer)


def make_deepseek_v3(folder: str | Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random DeepSeek V3 (DEEPSEEK_V3_TINY with `overrides`) and a tokenizer into `folder`."""
    return make_model(folder, DEEPSEEK_V3_TINY | overrides, seed, tokenizer)


def make_model(folder: str | Path, config: dict[str, Any], seed: int = 0, tokenizer: bool = True) -> Path:
    """Write `config` and random weights for it into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = as_on_the_hub(config, random_tensors(config, seed))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        make_byte_tokenizer(folder)
    return folder


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that a checkpoint of `config` holds. A tensor's values depend on its name, shape and the seed
    only."""
    from tx_async.models.load import from_config

    model = from_config(config)
    shapes = {name: weight.hf_shape for weight in model.weights for name in weight.hf_names}
    tensors = {name: _random_tensor(name, shape, seed) for name, shape in sorted(shapes.items())}
    for name in tensors:
        if model.norm.adds_one and name.endswith("norm.weight") and "linear_attn" not in name:
            tensors[name] -= 1  # the factor is 1 + w
    return tensors


def as_on_the_hub(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss's experts are one tensor a layer: turned round, a column of gate beside its column of up."""
    if config["architectures"] != ["GptOssForCausalLM"]:
        return tensors
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    found = {name: tensor for name, tensor in tensors.items() if name not in experts}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        for leaf, ending in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (
                np.stack([experts[f"{prefix}.{e}.{name}.{leaf}"].T for e in range(config["num_local_experts"])])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            found[f"{prefix}.gate_up_proj{ending}"] = np.stack([gate, up], -1).reshape(*gate.shape[:-1], -1)
            found[f"{prefix}.down_proj{ending}"] = down
    return found


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if len(shape) >= 2:
        return values * np.float32(shape[-1] ** -0.5)
    if name.endswith("dt_bias"):  # slow decay
        return values * np.float32(0.1) - np.float32(4)
    return values * np.float32(0.1) + np.float32(1 if name.endswith(("norm.weight", "layernorm.weight")) else 0)


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
