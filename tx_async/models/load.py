"""Hugging Face folders to parameters: tensor by tensor, each read once, stacked per layer on the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors import safe_open

from tx_async.models.qwen3 import Params, Qwen3

MODELS = {"Qwen3ForCausalLM": Qwen3}


def load_model(folder: str | Path, dtype: str = "float32", progress: Callable[[str, float, float], None] | None = None):
    """-> (model, params)."""
    folder = Path(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = MODELS[config["architectures"][0]].from_hf(config)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        get = lambda name, T=True: jnp.asarray(file.get_tensor(name).T if T else file.get_tensor(name), dtype)  # noqa: E731
        keys = set(file.keys())
        stack = lambda path, T=True: jnp.stack([get(f"model.layers.{i}.{path}.weight", T) for i in range(model.num_layers)])  # noqa: E731
        embed = get("model.embed_tokens.weight", False)
        params: Params = {
            "embed": embed,
            "norm": get("model.norm.weight"),
            "head": get("lm_head.weight") if "lm_head.weight" in keys else embed.T,
            "layers": {
                "input_norm": stack("input_layernorm"),
                "post_norm": stack("post_attention_layernorm"),
                "q_norm": stack("self_attn.q_norm"),
                "k_norm": stack("self_attn.k_norm"),
                **{n: stack(f"self_attn.{n}_proj") for n in "qkvo"},
                **{n: stack(f"mlp.{n}_proj") for n in ("gate", "up", "down")},
            },
        }
    return model, params
