"""The base model as its `config.json` describes it: what the server must know before a worker has loaded any weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tx_async import hub, tokenizer_files
from tx_async.errors import BaseModelError
from tx_async.fingerprint import fingerprint
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.wire.worker import EngineConfig

ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlamaForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
)


def read(base_model: str, name: str, engine: EngineConfig) -> BaseModelInfo:
    """Read a folder, or a hub name through `huggingface_hub`. Raises `BaseModelError` that says what is wrong with
    it."""
    if not base_model:
        raise BaseModelError("No base model is configured: set TX_BASE_MODEL or --base-model to a folder or hub name.")
    folder = resolve(base_model)
    config = _read_json(folder / "config.json")
    if config is None:
        raise BaseModelError(f"{folder} has no config.json: it is not the folder of a Hugging Face model.")
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise BaseModelError(
            f"{base_model}: architecture {architecture} is not supported; known: {', '.join(ARCHITECTURES)}."
        )
    check_weights(folder)
    limit = int(config["max_position_embeddings"])
    return BaseModelInfo(
        name=name or base_model,
        path=str(folder),
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        max_context_length=min(limit, engine.max_context_length or limit),
        eos_token_ids=_eos_token_ids(config, _read_json(folder / "generation_config.json") or {}),
        max_lora_rank=engine.max_lora_rank,
        fingerprint=fingerprint(folder),
        tokenizer_problem=tokenizer_files.problem_of(folder),
    )


def resolve(base_model: str) -> Path:
    """The folder with the model's configuration; a hub name is downloaded (its small files only) or found in the
    cache."""
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") != 1:
        raise BaseModelError(f"{base_model}: there is no such folder.")
    return hub.snapshot(base_model, ["*.json"])


def check_weights(folder: Path) -> None:
    """Every shard is there and as long as its header says; hub folders without weights yet are left to the worker."""
    index = _read_json(folder / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    present = [name for name in names if (folder / name).exists()]
    if not present and "snapshots" in folder.parts:
        return
    missing = sorted(set(names) - set(present))
    if missing:
        raise BaseModelError(f"{folder} lacks {', '.join(missing)}.")
    for name in names:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        header_bytes = int.from_bytes(head, "little")
        if len(head) < 8 or header_bytes > size - 8:
            raise BaseModelError(f"{path} is truncated or no safetensors file.")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise BaseModelError(f"{path} is no safetensors file: {error}") from error
    ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
    if size != 8 + header_bytes + max(ends, default=0):
        raise BaseModelError(
            f"{path} is truncated: {size} bytes, its header announces {8 + header_bytes + max(ends, default=0)}."
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BaseModelError(f"{path} is not valid JSON: {error}") from error


def _eos_token_ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins, as in transformers' `generate`."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
