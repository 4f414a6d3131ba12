"""One adapter between its slot and the host.

On a mesh it goes in pieces that lie as those of its slot do, so that no device needs room for a whole one: of a mixture
of experts with its optimizer state that would be more than a device has left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tx_async.engine.adapter_slots import TrainingState
from tx_async.layers.lora import LoraWeights
from tx_async.layers.sharding import AXES, axes_of


class Transfers:
    """How adapters of one engine move."""

    def __init__(self, slots: TrainingState | None, num_processes: int):
        """slots: the shardings of the training slots; None without a mesh."""
        one: Any = None if slots is None else jax.tree.map(partial(_of_one, num_processes=num_processes), slots)
        #: the shardings of an adapter with its optimizer state, and without
        self.state: TrainingState | None = one
        self.weights: LoraWeights | None = one and one.weights

    def described(self, state: TrainingState) -> TrainingState:
        """Shapes with their shardings, for programs that take them."""
        described = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return state if self.state is None else jax.tree.map(described, state, self.state)

    def to_devices(self, one: Any) -> Any:
        """Host arrays of an adapter (`LoraWeights`, or a `TrainingState`), equal on every host, as arrays of the mesh.
        What is there already stays, and without a mesh so does everything."""
        if self.state is None:
            return one
        return jax.tree.map(_put, one, self.state if isinstance(one, TrainingState) else self.weights)


def to_host(x: Any) -> np.ndarray:
    """Wait for an array and take it off the devices of this host, which have all of it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    whole, pieces = np.empty(x.shape, x.dtype), {str(piece.index): piece for piece in x.addressable_shards}
    for piece in pieces.values():
        whole[piece.index] = np.asarray(piece.data)
    assert sum(piece.data.size for piece in pieces.values()) == x.size, f"this host has not all of {x.sharding}"
    return whole


def axes_within_a_host(shape: Mapping[str, int], num_processes: int) -> set[str]:
    """The axes of a mesh that reach over one host only. Devices are numbered host by host, along the last axis
    first."""
    here, reach, within = math.prod(shape.values()) // num_processes, 1, set[str]()
    for axis in reversed(AXES):
        reach *= shape[axis]
        if reach <= here:
            within.add(axis)
    return within


def _of_one(slots: NamedSharding, num_processes: int) -> NamedSharding:
    """Of what was read from slots [layers, slots, ...]. Every host needs all of it: what is cut along an axis that
    reaches over several hosts is gathered."""
    within = axes_within_a_host(slots.mesh.shape, num_processes)

    def kept(entry: Any) -> tuple[str, ...] | None:
        return tuple(axis for axis in axes_of(entry) if axis in within) or None

    return NamedSharding(slots.mesh, PartitionSpec(*map(kept, (*slots.spec[:1], *slots.spec[2:]))))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])
