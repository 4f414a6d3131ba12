"""`tx-async checkpoints export`: a running server's checkpoint as a folder for PEFT and the tools built on it. A file
gets its name when it is complete, so a broken export leaves none that only looks whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.numpy import load, save

from tx_async import server_client
from tx_async.errors import ConfigError
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG

UNEMBEDDING = "lm_head"
"""PEFT's name for the unembedding, in tensors and among the modules."""


def export(base_url: str, api_key: str, path: str, folder: Path, no_unembed: bool) -> None:
    """Raises `ConfigError` when the checkpoint cannot be downloaded, or the folder is not empty or cannot be made."""
    _check_empty(folder)
    files = _download(base_url, api_key, path)
    if no_unembed:
        files = without_unembed(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            part = folder / f".{name}.part"
            part.write_bytes(content)
            os.replace(part, folder / name)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be written: {error}") from error


def _check_empty(folder: Path) -> None:
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--to {folder} is a file: choose a folder.")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--to {folder} is not empty: choose another folder.")
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be read: {error}") from error


def without_unembed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The adapter without its part for the unembedding, which tools cannot merge into a model with tied embeddings.
    Raises `ConfigError` where nothing would be left."""
    config: dict[str, Any] = json.loads(files[ADAPTER_CONFIG])
    tensors = {name: tensor for name, tensor in load(files[ADAPTER]).items() if UNEMBEDDING not in name.split(".")}
    if not tensors:
        raise ConfigError("--no-unembed: this adapter adapts the unembedding only, so nothing would be exported.")
    modules = config.get("target_modules")
    if isinstance(modules, list):
        config["target_modules"] = [name for name in modules if name.rpartition(".")[2] != UNEMBEDDING]
    return files | {ADAPTER_CONFIG: json.dumps(config).encode(), ADAPTER: save(tensors, {"format": "pt"})}


def _download(base_url: str, api_key: str, path: str) -> dict[str, bytes]:
    run, kind, name = _parts(path)
    where = f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"
    urls: dict[str, str] = server_client.call(base_url, api_key, "GET", where)["urls"]
    if missing := [wanted for wanted in (ADAPTER_CONFIG, ADAPTER) if wanted not in urls]:
        raise ConfigError(
            f"{path} has no {missing[0]}: an encrypted checkpoint is downloaded and decrypted by its recipients."
        )
    wanted = {name: url for name, url in urls.items() if name in (ADAPTER_CONFIG, ADAPTER)}
    return {name: server_client.fetch(base_url, "", "GET", urlsplit(url).path) for name, url in wanted.items()}


def _parts(path: str) -> tuple[str, str, str]:
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or not all(parts):
        raise ConfigError(
            f"{path} is not a checkpoint's path: tinker://RUN/KIND/NAME, as `tx-async checkpoints list` prints."
        )
    return parts[0], parts[1], parts[2]
