"""The mesh of an engine, and its model's parameters on it (the table of axes is `layers/sharding.py`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding

from tx_async.errors import ConfigError
from tx_async.layers.sharding import AXES, spec_of
from tx_async.layers.weights import Weight
from tx_async.models.decoder import Decoder
from tx_async.wire.worker import EngineConfig


def make_mesh(config: EngineConfig) -> Mesh | None:
    """The mesh of all devices, None for one device alone. Raises `ConfigError` when sizes and devices do not match."""
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


def weight_sharding(weight: Weight, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, spec_of(weight, mesh))


def param_shardings(model: Decoder, mesh: Mesh | None) -> dict[str, Any]:
    """A tree like `params` of shardings."""
    return tree_of(model, {weight: weight_sharding(weight, mesh) for weight in model.weights})


def tree_of(model: Decoder, leaves: dict[Weight, Any]) -> dict[str, Any]:
    """`params`-shaped: top-level weights beside a dict per stack."""
    paths = {(weight.stack, weight.name) if weight.stack else (weight.name,): leaf for weight, leaf in leaves.items()}
    return unflatten_dict(paths)
