"""The two halves of a decoder layer, as protocols: frozen dataclasses of static numbers that declare their weights
and run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from jax import Array
from jax.sharding import Mesh

from tx_async.layers.attention import Attend, Cache
from tx_async.layers.lora import LayerLora, Lora
from tx_async.layers.weights import Stack, Weight

LayerWeights = dict[str, Any]


class Run(NamedTuple):
    """What all layers of one forward pass share."""

    lora: Lora
    rotary: tuple[Array, Array]
    """cos, sin fp32 [R, L, D/2]."""
    attend: Attend
    mesh: Mesh | None


class Attention(Protocol):
    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]: ...

    def weights(self, stack: Stack) -> Iterable[Weight]: ...

    def __call__(
        self, run: Run, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        """x [R, L, D] -> ([R, L, D], cache); `layer` is this layer's index in the cache."""
        ...


class Mlp(Protocol):
    def weights(self, stack: Stack) -> Iterable[Weight]: ...

    def __call__(self, run: Run, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        """x [R, L, D] -> [R, L, D]."""
        ...
