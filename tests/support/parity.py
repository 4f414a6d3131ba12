"""The configurations whose numbers must equal transformers', and the few lines that run them here and there.

Used by `tests/models/`, by the script that stores the reference values, and by whoever doubts a port of a model of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tests.support import long_tests
from tx_async.layers.attention import PackedAttention
from tx_async.layers.lora import Lora, LoraRows, layer_slice
from tx_async.models.decoder import Decoder, Params, unembedding
from tx_async.models.peft import AdapterWeights, adapter_shapes
from tx_async.testing.models import (
    DEEPSEEK_V3_TINY,
    GPT_OSS_TINY,
    LLAMA_TINY,
    QWEN3_5_MOE_TINY,
    QWEN3_5_TINY,
    QWEN3_MOE_TINY,
    QWEN3_TINY,
)
from tx_async.wire.worker import LORA_ALPHA, AdapterConfig

SEEDS = (0, 1)
STORED_POSITIONS = 6
"""Last positions of a sequence whose logits the golden files hold."""


GREEDY_SEEDS = (0, 1, 2)
GREEDY_TOKENS = 16


class Case(NamedTuple):
    name: str
    config: dict[str, Any]
    length: int = 40


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_DEEPSEEK_YARN = _YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GLM = {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1}


_QWEN2 = QWEN3_TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_MISTRAL = QWEN3_TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
_MINISTRAL = _MISTRAL | {
    "architectures": ["MinistralForCausalLM"],
    "model_type": "ministral",
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
}
_MINISTRAL3 = _MISTRAL | {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "rope_theta": None}
_LLAMA4_SCALING = _YARN | {"rope_theta": 1e6, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
_SEED_OSS = QWEN3_TINY | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_bias": True}
_PHI3 = QWEN3_TINY | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "sliding_window": 16,
    "pad_token_id": 0,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [1.5, 2, 3, 4, 6, 8]}
_PHI4 = _PHI3 | {"rope_scaling": _LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}
_SMOLLM3 = QWEN3_TINY | {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "pad_token_id": 0,
}
_OLMO3 = QWEN3_TINY | {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "pad_token_id": 0,
    "rope_theta": 5e5,  # any other, and transformers forgets it in the layers with windows
}
_GEMMA3 = QWEN3_TINY | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}
_GLM4_MOE = DEEPSEEK_V3_TINY | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": True,
    "use_qk_norm": True,
}
_QWEN3_NEXT = QWEN3_5_MOE_TINY | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


CASES = (
    Case("qwen3", QWEN3_TINY),
    Case("qwen3_tied", QWEN3_TINY | {"tie_word_embeddings": True}),
    Case("qwen3_bias", QWEN3_TINY | {"attention_bias": True}),
    Case("qwen3_default_head_dim", _without(QWEN3_TINY, "head_dim")),
    Case("qwen3_linear", QWEN3_TINY | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    Case("qwen3_yarn", QWEN3_TINY | {"rope_scaling": _YARN}, 100),
    Case("qwen3_yarn_factor", QWEN3_TINY | {"rope_scaling": _YARN | {"attention_factor": 1.3, "truncate": False}}, 100),
    Case(
        "qwen3_rope_parameters", QWEN3_TINY | {"rope_theta": None, "rope_parameters": _YARN | {"rope_theta": 5e5}}, 100
    ),
    Case("qwen3_window", QWEN3_TINY | _WINDOW, 100),
    Case("qwen3_gelu", QWEN3_TINY | {"hidden_act": "gelu"}),
    Case("qwen2", _QWEN2),
    Case("qwen2_window", _without(_QWEN2, "head_dim") | _WINDOW, 100),
    Case("mistral", _MISTRAL),
    Case("mistral_window", _MISTRAL | {"sliding_window": 16}, 100),
    Case("ministral", _MINISTRAL, 100),
    Case("ministral3", _MINISTRAL3 | {"rope_parameters": _LLAMA4_SCALING}, 100),
    Case("seed_oss", _SEED_OSS),
    Case("seed_oss_biases", _SEED_OSS | {"attention_out_bias": True, "mlp_bias": True}),
    Case("phi3", _PHI3),
    Case("phi3_longrope", _PHI4, 100),
    Case("phi3_short", _PHI4 | {"max_position_embeddings": 64}),
    Case("smollm3", _SMOLLM3),
    Case("smollm3_interval", _without(_SMOLLM3, "no_rope_layers") | {"tie_word_embeddings": True}),
    Case("olmo3", _OLMO3, 100),
    Case("olmo3_yarn", _OLMO3 | {"rope_scaling": _YARN}, 100),
    Case("gemma3", _GEMMA3, 100),
    Case("gemma3_linear", _GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    Case("qwen3_5", QWEN3_5_TINY, 150),
    Case(
        "qwen3_5_interval",
        _without(QWEN3_5_TINY, "layer_types") | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    Case("qwen3_5_moe", QWEN3_5_MOE_TINY),
    Case("qwen3_next", _QWEN3_NEXT),
    Case("qwen3_next_mlp_only", _QWEN3_NEXT | {"mlp_only_layers": [1], "norm_topk_prob": False}),
    Case("gpt_oss", GPT_OSS_TINY, 100),
    Case("gpt_oss_default_rope", _without(GPT_OSS_TINY, "rope_scaling", "rope_theta") | {"attention_bias": False}),
    Case("llama", LLAMA_TINY),
    Case("llama_llama3", LLAMA_TINY | {"rope_theta": 5e5, "rope_scaling": _LLAMA3}, 100),
    Case("llama_tied", LLAMA_TINY | {"tie_word_embeddings": True}),
    Case("llama_biases", LLAMA_TINY | {"attention_bias": True, "mlp_bias": True}),
    Case("llama_no_groups", _without(LLAMA_TINY, "head_dim", "num_key_value_heads")),
    Case("qwen3_moe", QWEN3_MOE_TINY),
    Case("qwen3_moe_top3", _without(QWEN3_MOE_TINY, "head_dim") | {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    Case("qwen3_moe_sparse_step", QWEN3_MOE_TINY | {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    Case("qwen3_moe_mlp_only", QWEN3_MOE_TINY | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    Case("deepseek", DEEPSEEK_V3_TINY),
    Case("deepseek_plain_q", DEEPSEEK_V3_TINY | {"q_lora_rank": None, "first_k_dense_replace": 0}),
    Case("deepseek_yarn", DEEPSEEK_V3_TINY | {"rope_scaling": _DEEPSEEK_YARN}, 100),
    Case("deepseek_yarn_mscale", DEEPSEEK_V3_TINY | {"rope_scaling": _DEEPSEEK_YARN | {"mscale": 0.7}}, 100),
    Case("deepseek_halves", DEEPSEEK_V3_TINY | {"rope_interleave": False, "attention_bias": True}),
    Case("deepseek_routing", DEEPSEEK_V3_TINY | {"n_shared_experts": 2, "norm_topk_prob": False, "topk_group": 3}),
    Case("deepseek_scaling", DEEPSEEK_V3_TINY | {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0}),
    Case("kimi_k2", DEEPSEEK_V3_TINY | {"rope_scaling": _DEEPSEEK_YARN, "n_group": 1, "topk_group": 1}, 100),
    Case("glm4_moe", _GLM4_MOE),
    Case("glm4_moe_plain", _without(_GLM4_MOE, "use_qk_norm", "attention_bias", "partial_rotary_factor")),
    Case("glm4_moe_lite", DEEPSEEK_V3_TINY | _GLM),
)
_WHOLE = ("qwen3", "llama", "qwen3_moe_sparse_step", "deepseek", "phi3", "gemma3", "qwen3_5", "gpt_oss")
FAMILIES = tuple(case for case in CASES if case.name in _WHOLE)
"""One of each kind of layer, for what is tested of every kind: cache, gradients, adapters, greedy answers."""
_EVERY_MIXER = ("qwen3", "deepseek", "qwen3_5", "gpt_oss")
KINDS = FAMILIES if long_tests.ARE_ON else tuple(case for case in FAMILIES if case.name in _EVERY_MIXER)
"""For tests that compile for half a minute a family: grouped-query, latent and recurrent layers, windows with sinks,
dense MLPs and three kinds of experts. All families with LONG_TESTS=1."""
_LIVE = (*_WHOLE, "mistral_window", "smollm3", "olmo3", "glm4_moe")
LIVE = tuple(case for case in CASES if case.name in _LIVE)
"""For tests beside torch, which most runs leave out: one of each architecture that has code of its own."""


def config_of(name: str) -> dict[str, Any]:
    """Of the case of that name."""
    return next(case.config for case in CASES if case.name == name)


def tokens_of(case: Case, seed: int, rows: int = 1) -> np.ndarray:
    """int32 [rows, length]."""
    shape = (rows, case.length)
    return np.random.default_rng([seed, 7]).integers(0, case.config["vocab_size"], shape).astype(np.int32)


def no_lora(model: Decoder, rows: int) -> LoraRows:
    return LoraRows({stack.name: {} for stack in model.stacks}, jnp.zeros(rows))


def logits(model: Decoder, params: Params, tokens: Array, lora: Lora | None = None) -> Array:
    """One segment per row: [R, L] -> fp32 [R, L, V], the adapted unembedding included."""
    R, L = tokens.shape
    lora = lora if lora is not None else no_lora(model, R)
    positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (R, L))
    attend = PackedAttention(positions, jnp.ones_like(positions))
    hidden, _ = model.forward(params, lora, jnp.asarray(tokens), positions, attend)
    out = (hidden @ unembedding(params).T).astype(jnp.float32)
    if head := lora.weights.get("head"):
        out = out + lora.deltas(layer_slice(head), ("head",), hidden)[0]
    return out


def random_adapter(model: Decoder, config: AdapterConfig, seed: int = 0) -> AdapterWeights:
    """A and B that both matter, so that a wrong name or scale shows."""
    rng = np.random.default_rng([seed, 11])

    def matrix(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.25 * shape[-2] ** -0.5)

    shapes = adapter_shapes(model, config)
    return {s: {n: (matrix(a), matrix(b)) for n, (a, b) in targets.items()} for s, targets in shapes.items()}


def rows_of(adapter: AdapterWeights, config: AdapterConfig, rows: int) -> LoraRows:
    """The same adapter for every row."""
    weights: Any = jax.device_put(jax.tree.map(lambda w: np.repeat(np.asarray(w)[:, None], rows, axis=1), adapter))
    return LoraRows(weights, jnp.full(rows, LORA_ALPHA / config.rank))


def relative_error(ours: Any, theirs: Any) -> float:
    """‖a − b‖ / ‖b‖."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def reference_torch() -> Any:
    """torch is no dependency of the project: only who makes the golden files, or compares live, has it."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)  # threads that wait for each other cost tiny models minutes on a busy machine
    return torch


def reference_model(folder: Path) -> Any:
    """The folder in transformers, fp32, on plain attention and expert loops."""
    import transformers

    transformers.logging.disable_progress_bar()
    options = {"attn_implementation": "eager"}
    if "experts" in (folder / "config.json").read_text():
        options["experts_implementation"] = "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=reference_torch().float32, **options).eval()


def keep_own_blocks(b: Any, interleaved: bool) -> None:
    """Zero, in B [2F, 2 · rank · experts] of a fused gate_up_proj, what is neither of gate's A and gate's output nor of
    up's and up's. The halves of its output are blocks, or alternate."""
    halves = (
        b.reshape(b.shape[0] // 2, 2, 2, -1).transpose(0, 1) if interleaved else b.reshape(2, -1, 2, b.shape[1] // 2)
    )
    halves[0, :, 1] = 0
    halves[1, :, 0] = 0


def reference_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch = reference_torch()
    with torch.no_grad():
        return reference_model(folder)(torch.tensor(tokens)).logits.numpy()


def golden_name(case: Case, seed: int) -> str:
    return f"{case.name}/{seed}"


def cases_with_seeds() -> Iterator[tuple[Case, int]]:
    return ((case, seed) for case in CASES for seed in SEEDS)


def greedy_prompts(case: Case, seed: int) -> list[np.ndarray]:
    """Eight prompts of mixed lengths, around page boundaries and far from them."""
    rng = np.random.default_rng([seed, 13])
    return [rng.integers(0, case.config["vocab_size"], n).astype(np.int32) for n in (1, 2, 9, 16, 17, 33, 50, 80)]


def reference_greedy(folder: Path, case: Case, seed: int) -> np.ndarray:
    """int16 [prompts, GREEDY_TOKENS]: transformers' `generate`, which stops at no token."""
    torch, model = reference_torch(), reference_model(folder)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": GREEDY_TOKENS, "eos_token_id": None}
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in greedy_prompts(case, seed):
        tokens = torch.tensor(prompt[None], dtype=torch.long)
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
        answers.append(out[0, len(prompt) :].numpy())
    return np.stack(answers).astype(np.int16)
