"""Arrays as they travel: dtype, shape and little-endian C-order bytes; numpy views on both sides, no copies."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
from msgspec import Struct

DType = Literal["float32", "int64", "int32", "uint32", "uint64", "bfloat16", "bool"]


@cache
def _dtype_name(dtype: np.dtype) -> DType:
    """The cached name of a dtype: NumPy takes longer to spell it than to copy a small array."""
    return str(dtype)  # type: ignore[return-value]


class Tensor(Struct, frozen=True, array_like=True, gc=False):
    """An array with its bytes, for bodies that are stored (operations in the journal)."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    def numpy(self) -> np.ndarray:
        """A read-only view on `data`."""
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        return cls(_dtype_name(array.dtype), array.shape, array.tobytes())


class TensorSpec(Struct, frozen=True, array_like=True, gc=False):
    """An array whose bytes travel beside the message: in shared memory, or as a frame of their own."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> TensorSpec:
        return cls(_dtype_name(array.dtype), array.shape)
