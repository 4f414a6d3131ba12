"""Adapters as PEFT knows them: `adapter_config.json` + `adapter_model.safetensors`, one A and one B per projection.

Names and shapes are those of ordinary PEFT adapters: `base_model.model.<module>.lora_A.weight` [rank, in] and
`lora_B` [out, rank]; experts one by one (`mlp.experts.<e>.gate_proj`), which PEFT fuses itself where transformers 5
has fused parameters (but for `Decoder.peft_knows_experts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tx_async.errors import InvalidRequest
from tx_async.layers.lora import LoraTarget
from tx_async.models.decoder import Decoder
from tx_async.models.peft_experts import Pair, fused, fused_settings, unfused
from tx_async.wire.worker import LORA_ALPHA, AdapterConfig

AdapterWeights = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
"""stack -> name -> (A [layers(, experts), in, rank], B [layers(, experts), rank, out]), fp32."""
PREFIX = "base_model.model."
BASE_TENSORS = ("lm_head.weight", "lm_head.base_layer.weight", "model.embed_tokens.weight")
"""PEFT saves the base model's own tensors with adapters that adapt the unembedding."""
TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."))
LINEAR_LEAVES = ("gate_proj", "up_proj", "down_proj")


def adapter_shapes(
    model: Decoder, config: AdapterConfig
) -> dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """stack -> name -> (shape of A, shape of B) of one adapter, trained groups only."""
    return {
        stack: {name: _shapes(target, config.rank) for name, target in targets.items() if _trained(config, target)}
        for stack, targets in model.lora_targets().items()
    }


def to_peft(
    model: Decoder, weights: AdapterWeights, config: AdapterConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> (tensors of adapter_model.safetensors, content of adapter_config.json). Untrained groups are left out."""
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for stack, name, target in _targets(model):
        if not _trained(config, target):
            continue
        a, b = (np.asarray(w, np.float32) for w in weights[stack][name])
        a, b = a.reshape(-1, *a.shape[-2:])[..., : config.rank], b.reshape(-1, *b.shape[-2:])[:, : config.rank]
        for i, module in enumerate(target.hf_names):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[i].T)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[i].T)
        modules.extend(target.hf_names)
    if not model.interleaved_experts:
        beside = _beside_experts(modules) if model.peft_knows_experts else {}
        return tensors, _peft_config(config, modules) | beside
    settings = _peft_config(config, [module for module in modules if ".experts." not in module])
    return fused(tensors), settings | fused_settings(config.rank, int(LORA_ALPHA), config.train_mlp)


def _peft_config(config: AdapterConfig, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(LORA_ALPHA),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }


def _beside_experts(modules: list[str]) -> dict[str, Any]:
    """Settings by which dense MLPs beside experts are named as parameters.

    For a model with experts, PEFT on transformers 5 takes the target module `gate_proj` (and `up_proj`, `down_proj`)
    for the experts' fused parameters only, and would leave the same projections of dense layers and shared experts
    without LoRA.
    """
    if not any(".experts." in module for module in modules):
        return {}
    dense = {
        re.sub(r".*\.(mlp\..*)", r"\1.weight", m) for m in modules if m.endswith(LINEAR_LEAVES) and ".experts." not in m
    }
    return {"target_parameters": sorted(dense)} if dense else {}


def from_peft(
    model: Decoder, tensors: dict[str, np.ndarray], adapter_config: dict[str, Any]
) -> tuple[AdapterWeights, AdapterConfig]:
    """A PEFT adapter in our form: scale 32 / rank (other scales go into B), one rank (smaller ones are padded with
    zeros).

    Raises `InvalidRequest` naming a feature, module or shape that has no counterpart here.
    """
    _refuse_unsupported(adapter_config)
    pairs = _pairs(model, tensors, adapter_config)
    targets = list(_targets(model))
    unknown = sorted(set(pairs) - {module for _, _, target in targets for module in target.hf_names})
    if unknown:
        raise InvalidRequest(f"The adapter adapts modules that this model does not: {', '.join(unknown[:5])}.")
    if not pairs:
        raise InvalidRequest("The adapter holds no LoRA weights.")
    rank = max(pair.a.shape[0] for pair in pairs.values())
    groups = {target.group for _, _, target in targets if any(module in pairs for module in target.hf_names)}
    config = AdapterConfig(
        rank=rank, train_attn="attn" in groups, train_mlp="mlp" in groups, train_unembed="unembed" in groups
    )
    weights: AdapterWeights = {stack: {} for stack in model.lora_targets()}
    for stack, name, target in targets:
        if _trained(config, target):
            weights[stack][name] = _stacked(target, pairs, rank)
    return weights, config


def _stacked(target: LoraTarget, pairs: dict[str, Pair], rank: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = _shapes(target, rank)
    stacked_a, stacked_b = (np.zeros(shape, np.float32) for shape in shapes)
    flat_a, flat_b = (w.reshape(-1, *w.shape[-2:]) for w in (stacked_a, stacked_b))
    for i, module in enumerate(target.hf_names):
        if module not in pairs:
            continue
        a, b, scale = pairs[module]
        if a.shape[1] != target.in_features or b.shape[0] != target.out_features or a.shape[0] != b.shape[1]:
            raise InvalidRequest(
                f"The adapter's {module} has A {list(a.shape)} and B {list(b.shape)}: it belongs to another model."
            )
        own = a.shape[0]
        flat_a[i, :, :own] = a.T
        flat_b[i, :own] = b.T * np.float32(scale * rank / LORA_ALPHA)
    return stacked_a, stacked_b


def _refuse_unsupported(adapter_config: dict[str, Any]) -> None:
    if adapter_config.get("peft_type") != "LORA":
        raise InvalidRequest(f"peft_type {adapter_config.get('peft_type')!r} is not supported; only LORA is.")
    for key in (
        "use_dora",
        "modules_to_save",
        "lora_bias",
        "fan_in_fan_out",
        "layer_replication",
        "alora_invocation_tokens",
    ):
        if adapter_config.get(key):
            raise InvalidRequest(f"Adapters with {key} are not supported.")
    if adapter_config.get("bias", "none") != "none":
        raise InvalidRequest(f"Adapters with bias {adapter_config['bias']!r} are not supported.")


def _scale(adapter_config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of a module: alpha / r, or alpha / √r (rsLoRA), each possibly by pattern.

    Raises `InvalidRequest` where r is not the tensors' rank: PEFT would not load them, and their scale is unknown.
    """
    alpha = _by_pattern(adapter_config.get("alpha_pattern"), module, adapter_config["lora_alpha"])
    nominal = _by_pattern(adapter_config.get("rank_pattern"), module, adapter_config.get("r", rank))
    if nominal != rank:
        raise InvalidRequest(
            f"The adapter's {module}.lora_A has rank {rank}; adapter_config.json gives {nominal} (r or rank_pattern)."
        )
    return alpha / (rank**0.5 if adapter_config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Like `peft.utils.get_pattern_key`: a pattern matches the module's path or its end; also the path that the module
    has in a model that sees."""
    paths = (module, *(theirs + module.removeprefix(ours) for theirs, ours in TEXT_PREFIXES))
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            return value
    return default


def _pairs(model: Decoder, tensors: dict[str, np.ndarray], adapter_config: dict[str, Any]) -> dict[str, Pair]:
    """module -> its pair; fused experts are taken apart."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if name.removeprefix(PREFIX) in BASE_TENSORS:
            continue
        match = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if not match:
            raise InvalidRequest(f"The adapter holds {name}, which is not a LoRA weight.")
        halves.setdefault(text_module(match[1]), {})[match[2]] = np.asarray(tensor, np.float32)
    pairs: dict[str, Pair] = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            raise InvalidRequest(f"The adapter holds only half of {module}: lora_{next(iter(pair))}.")
        a, b = pair["A"], pair["B"]
        if re.search(r"\.experts(\.base_layer)*$", module):
            experts = module.split(".base_layer")[0]
            targets = [t for _, _, t in _targets(model) if any(name.startswith(f"{experts}.") for name in t.hf_names)]
            if not targets:
                raise InvalidRequest(f"The adapter adapts {experts}, which this model does not have.")
            scale = partial(_scale, adapter_config)
            pairs |= unfused(targets, module, a, b, scale, model.interleaved_experts)
        else:
            pairs[module] = Pair(a, b, _scale(adapter_config, module, a.shape[0]))
    return pairs


def text_module(module: str) -> str:
    """A vision model's module by its text model's own name, as `AutoModelForCausalLM` has it."""
    return next((new + module.removeprefix(old) for old, new in TEXT_PREFIXES if module.startswith(old)), module)


def _targets(model: Decoder) -> Iterator[tuple[str, str, LoraTarget]]:
    for stack, targets in model.lora_targets().items():
        for name, target in targets.items():
            yield stack, name, target


def _shapes(target: LoraTarget, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    experts = (target.num_experts,) if target.num_experts else ()
    lead = (len(target.hf_names) // max(1, target.num_experts), *experts)
    return (*lead, target.in_features, rank), (*lead, rank, target.out_features)


def _trained(config: AdapterConfig, target: LoraTarget) -> bool:
    return {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}[target.group]
