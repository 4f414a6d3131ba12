"""Identifies the base model in a folder: the same numbers under another path are the same model, other numbers under
the same path are not.

The fingerprint is a hash over those fields of `config.json` that change numbers, and over every tensor's name, dtype,
shape and a few KiB of its content. How the tensors are divided into files does not matter. It needs no JAX, and reads
so little that a folder of 70B parameters takes about a second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from msgspec import Struct

from tx_async import model_folder
from tx_async.errors import BaseModelError
from tx_async.models import tensor_files

SAMPLE_BYTES = 4 * 2**10
"""Bytes read of each tensor's beginning, middle and end; a tensor of at most three times this size is read whole."""
READERS = 16
"""Small reads that wait for the disk at the same time."""
DIGEST_CHARACTERS = 32

_CHANGES_NO_NUMBER = frozenset(
    (
        "_name_or_path",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
"""Keys of `config.json` that do not count: where a model comes from, how it was trained or how far it is served. Those
of rope are here because they are taken in one spelling, below."""


class _TensorEntry(Struct, frozen=True):
    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def fingerprint(folder: Path) -> str:
    """Hex digits that two folders share exactly when they are the same base model; "" while the folder holds no
    weights. Raises `BaseModelError` for files that cannot be read."""
    config = model_folder.read_config(folder)
    tensors = sorted(_tensors(folder), key=lambda tensor: tensor.name)
    if not tensors:
        return ""
    digest = hashlib.sha256(json.dumps(_numeric(config), sort_keys=True).encode())
    with ThreadPoolExecutor(READERS) as readers:
        for tensor, sample in zip(tensors, readers.map(_sample, tensors), strict=True):
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode() + sample)
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def _numeric(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that change numbers. Absent and null are the same, except for `head_dim`, which some families read."""
    kept = {key: value for key, value in config.items() if key not in _CHANGES_NO_NUMBER}
    return {key: value for key, value in kept.items() if value is not None or key == "head_dim"} | {
        "rope": _rope(config)
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope fields in transformers 5's spelling, from either; the context counts only if frequencies depend on
    it."""
    rope = {
        key: value
        for key, value in (config.get("rope_scaling") or config.get("rope_parameters") or {}).items()
        if value is not None
    }
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    if rope["rope_type"] == "default":
        rope.pop("original_max_position_embeddings", None)
    else:
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", original)
    return rope


def _tensors(folder: Path) -> Iterator[_TensorEntry]:
    for name in model_folder.weight_files(folder):
        path = folder / name
        if path.exists():
            header, start = tensor_files.read_header(path)
            for tensor, entry in header.items():
                begin, end = entry.data_offsets
                yield _TensorEntry(path, tensor, entry.dtype, entry.shape, start + begin, end - begin)


def _sample(tensor: _TensorEntry) -> bytes:
    if tensor.num_bytes <= 3 * SAMPLE_BYTES:
        return _read(tensor, 0, tensor.num_bytes)
    last = tensor.num_bytes - SAMPLE_BYTES
    return b"".join(_read(tensor, start, SAMPLE_BYTES) for start in (0, last // 2, last))


def _read(tensor: _TensorEntry, start: int, length: int) -> bytes:
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, tensor.offset + start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BaseModelError(f"{tensor.path} cannot be read: {error}") from error
