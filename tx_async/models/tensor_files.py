"""Safetensors folders, read by ranges of rows: no tensor is ever in memory whole, and no mapped page counts as our
memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
from msgspec import Meta, Struct

from tx_async import model_folder
from tx_async.errors import BaseModelError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, which is read by ranges of rows."""

    path: Path
    name: str
    """The name for messages; the file is read only by offset."""
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """The offset of its first byte in the file."""

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
                    raise BaseModelError(f"{self.path} ends inside {self.name}: it is truncated.")
                done += count
        return out


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder, by name: `model.safetensors`, or the shards of
    `model.safetensors.index.json`."""
    files = model_folder.weight_files(folder)
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise BaseModelError(f"{folder} lacks {', '.join(missing)}.")
    return {tensor.name: tensor for name in files for tensor in open_file(folder / name)}


def open_file(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of one file. Raises `BaseModelError` when it is not complete."""
    header, start = read_header(path)
    end = start
    for name, entry in header.items():
        if entry.dtype not in DTYPES:
            raise BaseModelError(f"{name} in {path} has dtype {entry.dtype}, which is not supported.")
        tensor = StoredTensor(path, name, np.dtype(DTYPES[entry.dtype]), entry.shape, start + entry.data_offsets[0])
        size = entry.data_offsets[1] - entry.data_offsets[0]
        if size != math.prod(entry.shape) * tensor.dtype.itemsize:
            raise BaseModelError(f"{name} in {path} has {size} bytes, which misfits its shape {list(entry.shape)}.")
        end = max(end, start + entry.data_offsets[1])
        yield tensor
    if path.stat().st_size != end:
        raise BaseModelError(f"{path} is truncated: {path.stat().st_size} bytes, its header announces {end}.")


class TensorEntry(Struct):
    """What a header says about a tensor."""

    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


def read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """-> (tensors by name, where their bytes begin). Raises `BaseModelError`."""
    try:
        content = _header_of(path)
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read: {error}") from error
    try:
        header: dict[str, Any] = msgspec.json.decode(content, type=dict[str, Any])
        header.pop("__metadata__", None)
        return msgspec.convert(header, dict[str, TensorEntry]), 8 + len(content)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError) as error:
        raise BaseModelError(f"{path} is not a safetensors file: {error}") from error


def _header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(64)
        model_folder.check_no_pointer(path, head)
        size = int.from_bytes(head[:8], "little")
        if len(head) < 8 or size > path.stat().st_size - 8:
            raise BaseModelError(f"{path} is truncated or not a safetensors file.")
        file.seek(8)
        return file.read(size)
