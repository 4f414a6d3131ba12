"""The mesh of an engine, and how its model's parameters lie on it (the table of axes is `layers/sharding.py`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tx_async.errors import ConfigError
from tx_async.layers.sharding import AXES, weight_sharding
from tx_async.models.decoder import Decoder, tree_of
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


def param_shardings(model: Decoder, mesh: Mesh | None) -> dict[str, Any]:
    """How every parameter lies: a tree like `params`, of shardings."""
    return tree_of({weight: weight_sharding(weight, mesh) for weight in model.weights})
