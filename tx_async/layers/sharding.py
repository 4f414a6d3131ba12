"""How parameters and rows lie on the mesh: one table from logical axes to mesh axes.

Mesh axes: `fsdp` holds rows of a batch and a piece of every weight, which is gathered layer by layer during
computation; `expert` gives each device some of the experts; `tensor` cuts heads, MLP features and the vocabulary.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tx_async.layers.weights import Dim, Weight

AXES = ("fsdp", "expert", "tensor")

RULES: dict[str, str] = {
    "embed": "fsdp",
    "experts": "expert",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "mixed": "tensor",
}
"""Logical axis -> mesh axis. "mixed" is the output of several projections in one: a piece may hold parts of one
projection only, so the output is rearranged for the heads that need it. An axis whose units the mesh axis does not
divide stays whole, as when `num_kv_heads` < tensor."""


def spec_of(weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How a leaf is stored: never cut along its layers."""
    return PartitionSpec(*((None,) if weight.stack else ()), *_layer_axes(weight, mesh))


def weight_sharding(weight: Weight, mesh: Mesh | None) -> Sharding:
    """The sharding of a stored leaf; without a mesh it lies on the first device."""
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec_of(weight, mesh))


def of_one_layer(stack: Sharding) -> Sharding:
    """The sharding of each layer of a stack, which is never cut along its layers."""
    return NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:])) if isinstance(stack, NamedSharding) else stack


def gathered_spec_of(weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How one layer of a leaf is used: whole along `fsdp`."""
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in _layer_axes(weight, mesh)))


def holds_whole_layers(mesh: Mesh | None) -> bool:
    """Whether a layer's weights are used as they lie: nothing is gathered along `fsdp`."""
    return mesh is None or mesh.shape["fsdp"] == 1


def row_axis(mesh: Mesh, num_rows: int) -> str | None:
    """The mesh axis that cuts the rows of a batch; None where it does not divide their number."""
    return None if num_rows % mesh.shape["fsdp"] else "fsdp"


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def is_cut(dim: Dim, mesh: Mesh | None) -> bool:
    """Whether the tensor axis cuts this axis of a parameter."""
    return mesh is not None and mesh.shape["tensor"] > 1 and _mesh_axis(dim, mesh) == "tensor"


def _layer_axes(weight: Weight, mesh: Mesh) -> list[str | None]:
    experts = (Dim(weight.num_experts, "experts"),) if weight.num_experts else ()
    return [_mesh_axis(dim, mesh) for dim in (*experts, *weight.dims)]


def _mesh_axis(dim: Dim, mesh: Mesh) -> str | None:
    axis = RULES.get(dim.axis) if dim.axis else None
    divides = axis is not None and (dim.units or dim.size) % mesh.shape[axis] == 0
    return axis if divides else None
