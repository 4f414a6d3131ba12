"""The stored form of operations: what decides whether a second submission is the same."""

import msgspec
import pytest

from tx_async.wire.operations import Datum, ForwardBackward, decode, encode
from tx_async.wire.tensors import Tensor

DATUM = Datum(
    b"\1\0\0\0", {"weights": Tensor("float32", (1,), b"\0\0\0\0"), "target_tokens": Tensor("int64", (1,), b"8 bytes!")}
)


@pytest.mark.parametrize("num_datums", [0, 1, 15, 16, 2**16 - 1, 2**16])
def test_a_batch_that_is_encoded_datum_by_datum_has_the_bytes_of_one_that_is_encoded_at_once(num_datums: int):
    operation = ForwardBackward(
        model_id="\xa4data\x90", seq_id=7, data=(DATUM,) * num_datums, loss_fn="data", loss_fn_config={"data": 1.0}
    )
    assert encode(operation) == msgspec.msgpack.encode(operation, order="sorted")
    assert decode(encode(operation)) == operation
