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
        return project(run.lora, adapters, w, (f"{self.prefix}down",), gated(gate, up))[0]


@jax.custom_vjp
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) · up. Its gradients in one pass: derived, they would be four over the layer's largest arrays."""
    return jax.nn.silu(gate) * up


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return jax.nn.silu(gate) * up, (gate, up)


def _backward(saved: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
    gate, up = saved
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return dout * up * (share + silu * (1 - share)), dout * silu


gated.defvjp(_forward, _backward)
