"""Gated SiLU MLP: down(silu(gate x) · up x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax import Array

from tx_async.layers.block import LayerWeights, Run
from tx_async.layers.linear import project
from tx_async.layers.lora import LayerLora
from tx_async.layers.weights import Dim, Stack, Weight


@dataclass(frozen=True)
class GatedMlp:
    hidden_size: int
    intermediate_size: int
    bias: bool = False
    prefix: str = ""
    """Of the parameters' names: "shared_" where a layer has experts too."""
    module: str = "mlp"

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, inner = Dim(self.hidden_size, "embed"), Dim(self.intermediate_size, "mlp")
        for name, dims in (("gate", (hidden, inner)), ("up", (hidden, inner)), ("down", (inner, hidden))):
            yield from stack.linear(f"{self.prefix}{name}", f"{self.module}.{name}_proj", dims, "mlp", self.bias)

    def __call__(self, run: Run, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        gate, up = project(run.lora, adapters, w, (f"{self.prefix}gate", f"{self.prefix}up"), x)
        return project(run.lora, adapters, w, (f"{self.prefix}down",), jax.nn.silu(gate) * up)[0]
