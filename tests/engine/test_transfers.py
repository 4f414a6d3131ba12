"""On a mesh an adapter is read from its slot, and written into it, in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from tx_async.engine.adapter_slots import TrainingState
from tx_async.engine.transfers import Transfers, axes_within_a_host
from tx_async.layers.sharding import AXES

MESH = AbstractMesh((2, 1, 4), AXES)


@pytest.mark.parametrize(
    ("sizes", "num_processes", "within"),
    [
        ((2, 1, 8), 1, {"fsdp", "expert", "tensor"}),
        ((2, 1, 8), 2, {"expert", "tensor"}),
        ((1, 2, 8), 2, {"tensor"}),
        ((1, 1, 16), 2, set()),
        ((4, 2, 2), 4, {"expert", "tensor"}),
    ],
)
def test_an_axis_is_within_a_host_where_all_its_devices_are(sizes, num_processes, within):
    assert axes_within_a_host(dict(zip(AXES, sizes, strict=True)), num_processes) >= within
    crossing = {axis for axis, size in zip(AXES, sizes, strict=True) if size > 1} - within
    assert not crossing & axes_within_a_host(dict(zip(AXES, sizes, strict=True)), num_processes)


def of(*spec) -> NamedSharding:
    return NamedSharding(MESH, PartitionSpec(*spec))


def slots() -> TrainingState:
    pair: Any = of(None, None, "fsdp", None), of(None, None, None, ("tensor", "fsdp"))
    stacks: Any = {"layers": {"q": pair}}
    step: Any = of()
    return TrainingState(stacks, stacks, stacks, stacks, step)


def specs(transfers: Transfers) -> list[tuple]:
    state: Any = transfers.state
    assert state.step.spec == PartitionSpec()
    return [tuple(x.spec) for x in state.weights["layers"]["q"]]


def test_an_adapter_is_cut_as_its_slot_is():
    (layers_a, *a), (layers_b, *b) = specs(Transfers(slots(), 1))
    assert layers_a is layers_b is None
    assert a == ["fsdp", None] and b == [None, ("tensor", "fsdp")]


def test_what_reaches_over_hosts_is_gathered():
    (_, *a), (_, *b) = specs(Transfers(slots(), 2))
    assert a == [None, None] and b == [None, "tensor"]


def test_without_a_mesh_host_arrays_stay_what_they_are():
    weights = {"layers": {"q": (np.zeros(2), np.zeros(3))}}
    assert Transfers(None, 1).to_devices(weights) is weights
