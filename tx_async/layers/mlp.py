"""Gated MLP: down(act(gate x) · up x), where act is SiLU in most families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.block import ForwardPass, LayerWeights
from tx_async.layers.linear import project_back, project_out
from tx_async.layers.lora import LayerLora
from tx_async.layers.weights import Dim, Stack, Weight


@dataclass(frozen=True)
class GatedMlp:
    """A gated linear unit (arXiv 2002.05202). An `Mlp`."""

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    prefix: str = ""
    """A prefix of the parameters' names: "shared_" where a layer also has experts."""
    module: str = "mlp"
    activation: str = "silu"
    """Key of `ACTIVATIONS`."""
    fused: bool = False
    """Gate and up are one module, `gate_up_proj` (Phi)."""

    @property
    def _inner(self) -> Dim:
        return Dim(self.intermediate_size, "mlp")

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, inner = Dim(self.hidden_size, "embed"), self._inner
        shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        if self.fused:
            shapes = {"gate_up": (hidden, Dim(2 * self.intermediate_size, "mixed")), "down": (inner, hidden)}
        for name, dims in shapes.items():
            yield from stack.linear(f"{self.prefix}{name}", f"{self.module}.{name}_proj", dims, "mlp", self.bias)

    def __call__(self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        names = ("gate_up",) if self.fused else ("gate", "up")
        outputs = (Dim(2 * self.intermediate_size, "mixed"),) if self.fused else (self._inner, self._inner)
        names = tuple(f"{self.prefix}{name}" for name in names)
        made = project_out(forward.mesh, outputs, forward.lora, adapters, w, names, x)
        gate, up = jnp.split(made[0], 2, axis=-1) if self.fused else made
        inner = ACTIVATIONS[self.activation](gate, up)
        return project_back(forward.mesh, self._inner, forward.lora, adapters, w, f"{self.prefix}down", inner)


@jax.custom_vjp
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) · up. Its gradients take one pass: if JAX derived them, they would take four over the layer's largest
    arrays."""
    return jax.nn.silu(gate) * up


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return jax.nn.silu(gate) * up, (gate, up)


def _backward(saved: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
    gate, up = saved
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return dout * up * (share + silu * (1 - share)), dout * silu


gated.defvjp(_forward, _backward)


def _gelu_gated(approximate: bool, gate: Array, up: Array) -> Array:
    return jax.nn.gelu(gate, approximate=approximate) * up


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss: (up + 1) · gate · sigmoid(alpha · gate), with gate below and up within the limit."""

    alpha: float
    limit: float

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


def silu_gated(gate: Array, up: Array) -> Array:
    """Like `gated`, with gradients that JAX derives."""
    return jax.nn.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "silu": gated,
    "swish": gated,
    "gelu": partial(_gelu_gated, False),
    "gelu_pytorch_tanh": partial(_gelu_gated, True),
}
"""(gate, up) -> act(gate) · up, by the name in `config.json`."""
