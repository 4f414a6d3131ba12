"""The base model as its `config.json` describes it: what the server must know before a worker has loaded any weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tx_async import hub, model_folder, tokenizer_files
from tx_async.errors import BaseModelError
from tx_async.fingerprint import fingerprint
from tx_async.models import tensor_files
from tx_async.names import names_of
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.text_config import text_config
from tx_async.wire.worker import EngineConfig

ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "SeedOssForCausalLM",
    "Phi3ForCausalLM",
    "SmolLM3ForCausalLM",
    "Olmo3ForCausalLM",
    "GptOssForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
)
"""The classes of `models/families.py`, which this process cannot import because it must not import JAX."""


def read(base_model: str, name: str, engine: EngineConfig) -> BaseModelInfo:
    """Read a folder, or a hub name through `huggingface_hub`. name: what clients call the model, or a comma-separated
    list. Raises `BaseModelError` saying what is wrong."""
    if not base_model:
        raise BaseModelError("No base model is configured: set TX_BASE_MODEL or --base-model to a folder or hub name.")
    folder = resolve(base_model)
    path = folder / model_folder.CONFIG
    config = text_config(model_folder.read_config(folder))
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise BaseModelError(
            f"{base_model}: architecture {architecture} is not supported; known: {', '.join(ARCHITECTURES)}."
        )
    model_folder.need(path, config, "max_position_embeddings")
    vocab_size = model_folder.need(path, config, "vocab_size")
    check_weights(folder)
    names = names_of(base_model, name, folder)
    return BaseModelInfo(
        name=names[0],
        aliases=names[1:],
        path=str(folder),
        architecture=architecture,
        vocab_size=vocab_size,
        max_context_length=_context(path, config, engine.max_context_length),
        eos_token_ids=model_folder.eos_token_ids(folder, config),
        max_lora_rank=engine.max_lora_rank,
        fingerprint=fingerprint(folder),
        tokenizer_problem=tokenizer_files.problem_of(folder),
    )


def _context(path: Path, config: dict[str, Any], asked: int) -> int:
    """asked: `max_context_length`, 0 = the model's own limit."""
    limit = model_folder.context_length(config)
    if asked > limit:
        raise BaseModelError(
            f"max_context_length is {asked}; according to {path}, the model takes at most {limit} positions."
        )
    return asked or limit


def resolve(base_model: str) -> Path:
    """The folder with the model's configuration; a hub name is downloaded (its small files only) or found in the
    cache."""
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") != 1:
        raise BaseModelError(f"{base_model}: there is no such folder.")
    return hub.snapshot(base_model, ["*.json", "*.jinja"])


def check_weights(folder: Path) -> None:
    """Check that every shard is there and as long as its header says; the worker checks hub folders without weights
    yet."""
    present = [name for name in model_folder.weight_files(folder) if (folder / name).exists()]
    if present or "snapshots" not in folder.parts:
        tensor_files.open_folder(folder)
