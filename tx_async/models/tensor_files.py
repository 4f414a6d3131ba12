"""Safetensors folders, read by ranges of rows: no tensor is ever in memory whole, and no page of a mapping counts as
ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tx_async.errors import BaseModelError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True)
class StoredTensor:
    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) into fresh memory. Raises `BaseModelError` if the file is shorter than it says."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = out.view(np.uint8).reshape(-1).data
        with self.path.open("rb", buffering=0) as file:
            position, done = self.offset + start * self.row_bytes, 0
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], position + done)
                if count == 0:
                    raise BaseModelError(f"{self.path} ends inside of {self.name}: it is truncated.")
                done += count
        return out


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder, by name: `model.safetensors`, or the shards of
    `model.safetensors.index.json`."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = ["model.safetensors"]
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise BaseModelError(f"{folder} lacks {', '.join(missing)}.")
    return {tensor.name: tensor for name in files for tensor in _open_file(folder / name)}


def _open_file(path: Path) -> Iterator[StoredTensor]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise BaseModelError(f"{path} is truncated or no safetensors file.")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
        except ValueError as error:
            raise BaseModelError(f"{path} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise BaseModelError(f"{name} in {path} has dtype {entry['dtype']}, which is not supported.")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        yield StoredTensor(path, name, dtype, tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
