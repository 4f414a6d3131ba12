"""Every model class in `config.json` that is known, and the function that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tx_async.models import (
    deepseek_v3,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from tx_async.models.decoder import Decoder

FAMILIES: dict[str, Callable[[dict[str, Any]], Decoder]] = {
    "Qwen2ForCausalLM": qwen2.from_hf,
    "Qwen3ForCausalLM": qwen3.from_hf,
    "Qwen3MoeForCausalLM": qwen3_moe.from_hf,
    "Qwen3_5ForCausalLM": qwen3_5.dense,
    "Qwen3_5ForConditionalGeneration": qwen3_5.dense,
    "Qwen3_5MoeForCausalLM": qwen3_5.moe,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5.moe,
    "Qwen3NextForCausalLM": qwen3_5.next_moe,
    "LlamaForCausalLM": llama.from_hf,
    "MistralForCausalLM": mistral.from_hf,
    "MinistralForCausalLM": mistral.from_hf,
    "Ministral3ForCausalLM": mistral.ministral3,
    "Mistral3ForConditionalGeneration": mistral.from_hf,
    "SeedOssForCausalLM": seed_oss.from_hf,
    "Phi3ForCausalLM": phi3.from_hf,
    "SmolLM3ForCausalLM": smollm3.from_hf,
    "Olmo3ForCausalLM": olmo3.from_hf,
    "GptOssForCausalLM": gpt_oss.from_hf,
    "Gemma3ForCausalLM": gemma3.from_hf,
    "Gemma3ForConditionalGeneration": gemma3.from_hf,
    "DeepseekV3ForCausalLM": deepseek_v3.from_hf,
    "Glm4MoeForCausalLM": glm4_moe.from_hf,
    "Glm4MoeLiteForCausalLM": deepseek_v3.from_hf,
}
"""Each function takes the text model's `config.json`, with `served_context_length` beside its keys (0 = the model's
own), and returns its decoder without weights. It raises `BaseModelError` naming a setting that is not implemented."""
