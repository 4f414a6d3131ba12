"""Files in which a layer's experts are one tensor, read as if each expert had its own.

- Qwen3.5: gate_up_proj [E, 2F, D], gate above up, and down_proj [E, D, F].
- gpt-oss in bf16: gate_up_proj [E, D, 2F], a column of gate beside its column of up, and down_proj [E, F, D], both
  transposed, with biases [E, 2F] and [E, D].
- gpt-oss in MXFP4: `_blocks` [E, 2F, D / 32, 16] of two 4-bit floats a byte, and `_scales` [E, 2F, D / 32], a power of
  two for each 32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from tx_async.models.tensor_files import StoredTensor

FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|)")
BF16 = np.dtype(ml_dtypes.bfloat16)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 4 bits (OCP Microscaling, E2M1)."""


def one_by_one(tensors: dict[str, StoredTensor]) -> Iterator[StoredTensor]:
    """The same tensors with a matrix (and a bias) for each expert and projection: `…experts.3.gate_proj.weight`."""
    for tensor in tensors.values():
        match = FUSED.fullmatch(tensor.name)
        if not match or match[3] == "_scales" or len(tensor.shape) < 2:
            yield tensor
            continue
        of_gpt_oss = f"{match[1]}.gate_up_proj_bias" in tensors
        names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for expert in range(tensor.shape[0]):
            whole = _one(tensor, expert)
            if match[3] == "_blocks":
                scales = _one(tensors[tensor.name.removesuffix("_blocks") + "_scales"], expert)
                whole = _Mxfp4(whole.path, tensor.name, BF16, (whole.shape[0], 32 * whole.shape[1]), 0, whole, scales)
            for half, name in enumerate(names):
                label = f"{match[1]}.{expert}.{name}.{'bias' if match[3] == '_bias' else 'weight'}"
                turned = of_gpt_oss and not match[3]
                yield _part(whole, label, half, len(names), interleaved=of_gpt_oss, turned=turned)


def _one(tensor: StoredTensor, number: int) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * tensor.row_bytes)


def _part(whole: StoredTensor, name: str, half: int, count: int, interleaved: bool, turned: bool) -> StoredTensor:
    rows, *rest = whole.shape[::-1] if turned else whole.shape
    shape = (rows // count, *rest)
    if interleaved:
        return _Strided(whole.path, name, whole.dtype, shape, 0, whole, half, count, turned)
    return replace(whole, name=name, shape=shape, offset=whole.offset + half * shape[0] * whole.row_bytes)


@dataclass(frozen=True)
class _Strided(StoredTensor):
    """Every `step`-th row of another tensor, or every `step`-th of its columns as a row."""

    whole: StoredTensor
    first: int
    step: int
    turned: bool

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.turned:
            columns = self.whole.rows(0, self.whole.shape[0])[:, self.first :: self.step]
            return np.ascontiguousarray(columns[:, start:stop].T)
        low, high = self.first + self.step * start, self.first + self.step * (stop - 1) + 1
        return np.ascontiguousarray(self.whole.rows(low, high)[:: self.step])


@dataclass(frozen=True)
class _Mxfp4(StoredTensor):
    """A matrix of 4-bit floats, dequantised as it is read: bf16 holds each value exactly."""

    blocks: StoredTensor
    """uint8 [rows, columns / 32, 16]: of a byte, the low half comes first."""
    scales: StoredTensor
    """uint8 [rows, columns / 32]: exponents, with an excess of 127."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        blocks, scales = self.blocks.rows(start, stop), self.scales.rows(start, stop)
        values = FP4[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*blocks.shape[:-1], 32)
        return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(len(blocks), -1).astype(BF16)
