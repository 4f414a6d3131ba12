"""Files in which the experts of a layer are one tensor, read as if they stood one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from tx_async.models.tensor_files import StoredTensor

FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def one_by_one(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """gate_up_proj [E, 2F, D] and down_proj [E, D, F] as E (times two) matrices; other tensors as they are."""
    match = FUSED.fullmatch(tensor.name)
    if not match or len(tensor.shape) != 3:
        yield tensor
        return
    names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    num_experts, rows, columns = tensor.shape
    shape = (rows // len(names), columns)
    for number in range(num_experts * len(names)):
        expert, half = divmod(number, len(names))
        name = f"{match[1]}.{expert}.{names[half]}.weight"
        offset = tensor.offset + number * shape[0] * shape[1] * tensor.dtype.itemsize
        yield replace(tensor, name=name, shape=shape, offset=offset)
