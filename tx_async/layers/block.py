"""A layer as data: a token mixer, an MLP, and the places of its norms.

Mixers and MLPs are frozen dataclasses of static numbers that declare their weights and run. A mixer declares once
(`Keeps`) what it keeps of a sequence between two calls; cache, memory plan and sharding read it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jax import Array
from jax.sharding import Mesh

from tx_async.layers.attention import Attend, Cache
from tx_async.layers.lora import LayerLora, Lora
from tx_async.layers.norm import RmsNorm
from tx_async.layers.rope import Rope
from tx_async.layers.weights import Dim, Stack, Weight

LayerWeights = dict[str, Any]


class ForwardPass(NamedTuple):
    """The data that all layers of one forward pass share."""

    lora: Lora
    positions: Array
    """int32 [R, L]."""
    rotary: dict[Rope, tuple[Array, Array]]
    """cos, sin fp32 [R, L, D/2] of each rope that a layer of the model has."""
    attend: Attend
    mesh: Mesh | None
    grouped_kernel: bool = False
    """Whether `grouped_kernel.py` computes experts where it can."""


class Keeps(NamedTuple):
    """What one layer stores for a sequence."""

    pages: dict[str, tuple[int, int]] = {}  # noqa: RUF012
    """For each token: name -> (heads, features)."""
    state: dict[str, tuple[tuple[int, ...], bool]] = {}  # noqa: RUF012
    """For the whole sequence: name -> (shape, whether it is fp32 whatever the model's dtype is)."""
    window: int = 0
    """For how many of the newest tokens it keeps pages; 0 = for all."""

    @property
    def kind(self) -> tuple[bool, int]:
        """Layers of one kind are numbered together; the number is their place in the cache."""
        return bool(self.pages), self.window


class Mixer(Protocol):
    """Mixes tokens: some kind of attention."""

    @property
    def keeps(self) -> Keeps: ...

    @property
    def rope(self) -> Rope | None: ...

    def weights(self, stack: Stack) -> Iterable[Weight]: ...

    def __call__(
        self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        """x [R, L, D] -> ([R, L, D], cache); `layer` is this layer's place in the cache."""
        ...


class Mlp(Protocol):
    """Works on each token alone: dense, or a mixture of experts."""

    def weights(self, stack: Stack) -> Iterable[Weight]: ...

    def __call__(self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        """x [R, L, D] -> [R, L, D]."""
        ...


@dataclass(frozen=True)
class Norms:
    """The names of a layer's norms in the files; "" = the family has none there."""

    norm: RmsNorm
    before_mixer: str = "input_layernorm"
    after_mixer: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    def weights(self, stack: Stack, hidden_size: int) -> Iterator[Weight]:
        for place in ("before_mixer", "after_mixer", "before_mlp", "after_mlp"):
            if name := getattr(self, place):
                yield stack.vector(place, f"{name}.weight", Dim(hidden_size))

    def __call__(self, place: str, w: LayerWeights, x: Array) -> Array:
        return self.norm(x, w[place]) if place in w else x


@dataclass(frozen=True)
class Layer:
    """x + mixer(norm(x)), then x + mlp(norm(x)), with norms after them where the family has some."""

    name: str
    """The name of its kind: layers that share it are equal and are scanned together."""
    mixer: Mixer
    mlp: Mlp = field(repr=False)
    norms: Norms = field(repr=False)

    def weights(self, stack: Stack, hidden_size: int) -> Iterator[Weight]:
        yield from self.norms.weights(stack, hidden_size)
        yield from self.mixer.weights(stack)
        yield from self.mlp.weights(stack)
