"""Training data in its canonical form: every encoding of tokens and tensors becomes dense little-endian bytes.

Only the form is checked here (sizes, dtypes, sparse indices); `api/validation.py` checks whether the numbers make
sense. Errors name the field and are `InvalidRequest`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from tx_async.errors import InvalidRequest
from tx_async.wire import tinker
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.tensors import Tensor

TENSOR_RANK_MAX = 2
AXIS_MAX = 2**31 - 1
ITEM_BYTES = {"float32": 4, "int64": 8}

_datum_decoder = msgspec.json.Decoder(tinker.DatumJson)


class DenseBudget:
    """How many bytes the sparse tensors of one request may still unfold to: a few bytes of CSR can describe a
    terabyte."""

    def __init__(self, bytes_max: int):
        self.bytes_left = bytes_max

    def take(self, num_bytes: int) -> None:
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise InvalidRequest(
                "The sparse tensors of this request are too large when unfolded: send fewer datums at once."
            )


def dense(data: bytes, dtype: Literal["float32", "int64"], shape: Sequence[int]) -> Tensor:
    """A tensor from little-endian bytes, whose values are not checked; no shape means one axis."""
    num_values, remainder = divmod(len(data), ITEM_BYTES[dtype])
    dimensions = tuple(shape) or (num_values,)
    _check_shape(dimensions)
    if remainder or math.prod(dimensions) != num_values:
        raise InvalidRequest(f"shape {list(dimensions)} does not fit {len(data)} bytes of {dtype}.")
    return Tensor(dtype, dimensions, data)


def densify(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int], budget: DenseBudget, fill: int = 0
) -> np.ndarray:
    """A 2-D array from compressed sparse rows; cells that are not listed hold `fill`."""
    dimensions = tuple(shape)
    _check_shape(dimensions)
    if len(dimensions) != 2:
        raise InvalidRequest(f"a sparse tensor needs a shape of two dimensions, not {list(dimensions)}.")
    rows, columns = dimensions
    if crow.size != rows + 1:
        raise InvalidRequest(f"sparse_crow_indices has {crow.size} entries; {rows} rows need {rows + 1}.")
    if crow[0] != 0 or crow[-1] != values.size or np.any(np.diff(crow) < 0):
        raise InvalidRequest(f"sparse_crow_indices must rise from 0 to the number of values, {values.size}.")
    if col.size != values.size:
        raise InvalidRequest(f"sparse_col_indices has {col.size} entries for {values.size} values.")
    if col.size and (col.min() < 0 or col.max() >= columns):
        raise InvalidRequest(f"sparse_col_indices must lie in [0, {columns}).")
    budget.take(rows * columns * values.itemsize)
    row_of_value = np.repeat(np.arange(rows), np.diff(crow))
    cells = np.full(dimensions, fill, values.dtype)
    cells[row_of_value, col] = values
    return cells


def from_bytes(data: bytes, dtype: str, what: str) -> np.ndarray:
    """A view on little-endian bytes."""
    if len(data) % np.dtype(dtype).itemsize:
        raise InvalidRequest(f"{what}: {len(data)} bytes are not a whole number of {dtype} values.")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))


def from_numbers(numbers: Sequence[float], dtype: str) -> np.ndarray:
    """Numbers of a JSON tensor; int64 ones must be whole."""
    array = np.asarray(numbers, np.float64)
    if dtype == "float32":
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if not np.all(np.abs(array) < 2.0**63):
        raise InvalidRequest("an int64 tensor has values that are not 64-bit integers.")
    whole = array.astype(np.int64)
    if np.any(whole != array):
        raise InvalidRequest("an int64 tensor has values that are not whole numbers.")
    return whole


# ---- the JSON forms


def text_tokens(model_input: tinker.ModelInput) -> bytes:
    """The int32 tokens of a prompt; only text is taken here."""
    tokens: list[int] = []
    for chunk in model_input.chunks:
        if chunk.type != "encoded_text":
            raise InvalidRequest(f"model_input has a chunk of type {chunk.type!r}; this model takes encoded_text only.")
        if chunk.tokens is None:
            raise InvalidRequest("model_input has an encoded_text chunk without tokens.")
        tokens += chunk.tokens
    return np.asarray(tokens, "<i4").tobytes()


def array_from_json(data: tinker.TensorData, budget: DenseBudget, fill: int = 0) -> np.ndarray:
    values = from_numbers(data.data, data.dtype)
    if data.sparse_crow_indices is None and data.sparse_col_indices is None:
        return dense(values.tobytes(), data.dtype, data.shape or ()).numpy()
    crow = np.asarray(data.sparse_crow_indices or (), np.int64)
    col = np.asarray(data.sparse_col_indices or (), np.int64)
    return densify(values, crow, col, data.shape or (), budget, fill)


def forward_backward_from_json(
    ids: tinker.TrainingIds, content: tinker.UndecodedInput, forward_only: bool, budget: DenseBudget
) -> ForwardBackward:
    return ForwardBackward(
        model_id=ids.model_id,
        seq_id=ids.seq_id,
        data=tuple(_datum_from_json(datum, f"data[{i}]", budget) for i, datum in enumerate(content.data)),
        loss_fn=content.loss_fn,
        loss_fn_config=content.loss_fn_config or {},
        forward_only=forward_only,
    )


def explained(error: msgspec.ValidationError) -> str:
    hint = " (the SDK sends NaN and infinity as null)" if "got `null`" in str(error) else ""
    return f"{error}{hint}"


def _datum_from_json(encoded: msgspec.Raw, where: str, budget: DenseBudget) -> Datum:
    """Datums are decoded one by one, because each call into the decoder keeps the interpreter to itself."""
    try:
        datum = _datum_decoder.decode(encoded)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{where}: {explained(error)}.") from None
    try:
        inputs = {name: Tensor.of(array_from_json(data, budget)) for name, data in datum.loss_fn_inputs.items()}
        return Datum(text_tokens(datum.model_input), inputs)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}") from None


def _check_shape(dimensions: tuple[int, ...]) -> None:
    if len(dimensions) > TENSOR_RANK_MAX or min(dimensions, default=0) < 0:
        shown = str(list(dimensions[: TENSOR_RANK_MAX + 1]))
        raise InvalidRequest(f"shape {shown} is not supported: tensors have one or two dimensions.")
    # NumPy refuses an axis that it cannot address, even when another one is 0 and there is nothing to address.
    if max(dimensions, default=0) > AXIS_MAX:
        raise InvalidRequest(f"shape {list(dimensions)} has an axis longer than {AXIS_MAX}.")
