"""How much of the weights and of adapters each device of a mesh holds, by the same table of axes that cuts them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tx_async.layers.sharding import spec_of
from tx_async.layers.weights import Weight
from tx_async.models.decoder import Decoder

GATHERED_LAYERS = 2
"""One that runs, and the one that comes next."""


@dataclass(frozen=True)
class CutSizes:
    """fsdp: whether that axis cuts adapters. In training slots it does, in rows it does not; None: where it cuts the
    base weight, as in sampler slots (see `mesh.py`)."""

    model: Decoder
    mesh: Any

    def weight_bytes(self, dtype: str) -> int:
        return sum(math.prod(x.shape) * _size(x, dtype) // self._pieces(spec_of(x, self.mesh)) for x in self._weights)

    def gathered_bytes(self, dtype: str) -> int:
        """Of weights that `fsdp` cuts, whole while training uses them: the head and GATHERED_LAYERS."""
        sizes: Counter[str] = Counter()
        for weight in self._weights:
            spec = spec_of(weight, self.mesh)
            if "fsdp" in spec and self.mesh.shape["fsdp"] > 1:
                one = math.prod(weight.shape) // (weight.num_layers if weight.stack else 1) * _size(weight, dtype)
                sizes[weight.stack or weight.name] += one // self._pieces(spec, fsdp=False)
        layer = max(sizes[stack.name] for stack in self.model.stacks)
        return sizes[self.model.unembedding_weight.name] + GATHERED_LAYERS * layer

    def of_layers(self, rank: int, fsdp: bool | None = None) -> int:
        """Numbers in A and B of one adapter's layers."""
        return sum(self._of_matrix(x, rank, fsdp) for x in self._weights if x.stack and x.group)

    def of_head(self, rank: int, fsdp: bool | None = None) -> int:
        """Numbers in A and B of one adapter's unembedding."""
        vocab, _ = spec_of(self.model.unembedding_weight, self.mesh)
        inputs = self.model.hidden_size // self._pieces((), fsdp)
        return (inputs + self.model.vocab_size // self._pieces((vocab,), fsdp)) * rank

    def of_adapter(self, rank: int, fsdp: bool | None = None) -> int:
        return self.of_layers(rank, fsdp) + self.of_head(rank, fsdp)

    def _of_matrix(self, weight: Weight, rank: int, fsdp: bool | None) -> int:
        _, *experts, inputs, outputs = spec_of(weight, self.mesh)
        lead = weight.num_layers * max(1, weight.num_experts)
        a = lead * weight.dims[0].size * rank // self._pieces((*experts, inputs), fsdp)
        return a + lead * weight.dims[1].size * rank // self._pieces((*experts, outputs), fsdp)

    @property
    def _weights(self) -> tuple[Weight, ...]:
        return self.model.weights

    def _pieces(self, axes: Iterable[Any], fsdp: bool | None = None) -> int:
        cutting = {axis for axis in axes if axis}
        if fsdp is not None:
            cutting = cutting | {"fsdp"} if fsdp else cutting - {"fsdp"}
        return math.prod(self.mesh.shape[axis] for axis in cutting)


def _size(weight: Weight, dtype: str) -> int:
    return 4 if weight.wide else jnp.dtype(dtype).itemsize
