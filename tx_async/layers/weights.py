"""The parameters of a model: one declarative list serves loading, sharding, LoRA and export.

A `Weight` is one leaf of `params`. Matrices are stored [in, out], so that y = x W; the files hold [out, in]
(`transposed`). Layers of one `Stack` run in one scan: their leaves have a leading layer axis (then an expert axis,
for experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tx_async.layers.lora import LoraGroup, LoraTarget


class Dim(NamedTuple):
    """One axis of a parameter."""

    size: int
    axis: str | None = None
    """Logical name that `layers/sharding.py` maps to a mesh axis; None is never cut."""
    units: int = 0
    """The number of units that must stay whole (heads); 0 = it may be cut between any two elements."""


@dataclass(frozen=True)
class Weight:
    """One leaf of `params`: its shape, its tensors in the files, and what adapts and cuts it."""

    stack: str
    """The key in `params` of the stack that it belongs to; "" for weights outside of the layers."""
    name: str
    dims: tuple[Dim, ...]
    """The axes of one layer (of one expert)."""
    hf_names: tuple[str, ...]
    """Tensor names on the hub: one per layer, or per layer and expert (experts vary fastest)."""
    transposed: bool = False
    num_experts: int = 0
    group: LoraGroup | None = None
    """LoRA group, for matrices that adapters adapt."""
    projects: bool = False
    """Whether it is a matrix that `layers/linear.py` applies; others are used in ways of their own."""
    wide: bool = False
    """Whether it is kept in fp32 whatever the model's dtype is: a router's choice must not depend on rounding."""

    @property
    def num_layers(self) -> int:
        return len(self.hf_names) // max(1, self.num_experts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        layers = (self.num_layers,) if self.stack else ()
        experts = (self.num_experts,) if self.num_experts else ()
        return (*layers, *experts, *(dim.size for dim in self.dims))

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the files."""
        sizes = tuple(dim.size for dim in self.dims)
        return sizes[::-1] if self.transposed else sizes

    @property
    def lora_target(self) -> LoraTarget:
        assert self.group is not None
        modules = tuple(name.removesuffix(".weight") for name in self.hf_names)
        return LoraTarget(self.group, self.dims[0].size, self.dims[1].size, modules, self.num_experts)


@dataclass(frozen=True)
class Stack:
    """Layers of one kind that are scanned together."""

    name: str
    layers: tuple[int, ...]
    kind: str = "dense"

    def vector(self, name: str, tensor: str, dim: Dim, wide: bool = False) -> Weight:
        return Weight(self.name, name, (dim,), self._names(tensor), wide=wide)

    def tensor(self, name: str, tensor: str, dims: tuple[Dim, ...]) -> Weight:
        return Weight(self.name, name, dims, self._names(tensor))

    def matrix(
        self,
        name: str,
        module: str,
        dims: tuple[Dim, Dim],
        group: LoraGroup | None,
        projects: bool = False,
        wide: bool = False,
    ) -> Weight:
        names = self._names(f"{module}.weight")
        return Weight(self.name, name, dims, names, True, group=group, projects=projects, wide=wide)

    def linear(
        self, name: str, module: str, dims: tuple[Dim, Dim], group: LoraGroup | None, bias: bool = False
    ) -> Iterator[Weight]:
        """A matrix, and its bias if it has one."""
        yield self.matrix(name, module, dims, group, projects=True)
        if bias:
            yield self.vector(f"{name}_bias", f"{module}.bias", dims[1])

    def experts(self, name: str, module: str, dims: tuple[Dim, Dim], num_experts: int) -> Weight:
        """One matrix per expert; `module` has a `{}` for the expert's number."""
        return Weight(
            self.name, name, dims, self._of_experts(f"{module}.weight", num_experts), True, num_experts, "mlp"
        )

    def expert_vectors(self, name: str, tensor: str, dim: Dim, num_experts: int) -> Weight:
        return Weight(self.name, name, (dim,), self._of_experts(tensor, num_experts), num_experts=num_experts)

    def _of_experts(self, tensor: str, num_experts: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{i}.{tensor.format(e)}" for i in self.layers for e in range(num_experts))

    def _names(self, tensor: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{i}.{tensor}" for i in self.layers)


def stacks_of(kinds: tuple[str, ...]) -> tuple[tuple[Stack, ...], ...]:
    """Cut the kinds of the layers, in order, into segments: each is one scan, whose step runs a layer of each of its
    stacks.

    ("dense", "moe", "moe", "moe") -> [dense: 0], [moe: 1 2 3]; ("dense", "moe") * 4 -> [dense: 0 2 4 6, moe: 1 3 5 7].
    This way compile time depends on the pattern and not on the depth, and no stack is ever sliced.
    """
    segments: list[tuple[Stack, ...]] = []
    used: dict[str, int] = {}
    start = 0
    while start < len(kinds):
        length, repeats = max(
            ((n, _repeats(kinds, start, n)) for n in range(1, 9)),
            key=lambda pair: (pair[0] * pair[1] * (pair[1] > 1), -pair[0]),
        )
        segment = []
        for offset in range(length):
            kind = kinds[start + offset]
            number = used[kind] = used.get(kind, 0) + 1
            layers = tuple(start + offset + length * i for i in range(repeats))
            segment.append(Stack(kind if number == 1 else f"{kind}_{number}", layers, kind))
        segments.append(tuple(segment))
        start += length * repeats
    return tuple(segments)


def _repeats(kinds: tuple[str, ...], start: int, length: int) -> int:
    pattern, count = kinds[start : start + length], 0
    while len(pattern) == length and kinds[start + count * length : start + (count + 1) * length] == pattern:
        count += 1
    return count
