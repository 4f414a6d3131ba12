"""How parameters and rows lie on the mesh: one table from logical axes to mesh axes.

Mesh axes: `fsdp` holds rows of a batch and a piece of every weight, gathered layer by layer while it computes; `tensor`
cuts heads, MLP features and the vocabulary; `expert` gives each device some of the experts. All have size 1 by default.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from tx_async.errors import ConfigError
from tx_async.layers.weights import Dim, Weight
from tx_async.models.decoder import Decoder
from tx_async.wire.worker import EngineConfig

AXES = ("fsdp", "expert", "tensor")

RULES: dict[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}
"""Logical axis -> mesh axis. An axis whose units the mesh axis does not divide stays whole: `num_kv_heads` < tensor, say."""


def make_mesh(config: EngineConfig) -> Mesh | None:
    """The mesh of all devices, None for a single one. Raises `ConfigError` when the sizes and the devices do not match."""
    sizes = (config.fully_sharded_data_parallel_size, config.expert_parallel_size, config.tensor_parallel_size)
    wanted, devices = int(np.prod(sizes)), jax.devices()
    if wanted == 1 and config.num_processes == 1:
        return None
    if wanted > len(devices) or (config.num_processes > 1 and wanted != len(devices)):
        raise ConfigError(
            "fully_sharded_data_parallel_size × expert_parallel_size × tensor_parallel_size is "
            f"{wanted}, but there are {len(devices)} devices."
        )
    return Mesh(np.array(devices[:wanted]).reshape(sizes), AXES)


def spec_of(weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How a leaf is cut: never along its layers."""
    experts = (Dim(weight.num_experts, "experts"),) if weight.num_experts else ()
    axes = [_mesh_axis(dim, mesh) for dim in (*experts, *weight.dims)]
    return PartitionSpec(*((None,) if weight.stack else ()), *axes)


def _mesh_axis(dim: Dim, mesh: Mesh) -> str | None:
    axis = RULES.get(dim.axis) if dim.axis else None
    divides = axis is not None and (dim.units or dim.size) % mesh.shape[axis] == 0
    return axis if divides else None


def weight_sharding(weight: Weight, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, spec_of(weight, mesh))


def param_shardings(model: Decoder, mesh: Mesh | None) -> dict[str, Any]:
    """A tree like `params` of shardings."""
    return tree_of(model, {weight: weight_sharding(weight, mesh) for weight in model.weights})


def tree_of(model: Decoder, leaves: dict[Weight, Any]) -> dict[str, Any]:
    """`params`-shaped: top-level weights beside a dict per stack."""
    tree: dict[str, Any] = {stack.name: {} for stack in model.stacks}
    for weight, leaf in leaves.items():
        (tree[weight.stack] if weight.stack else tree)[weight.name] = leaf
    return tree
