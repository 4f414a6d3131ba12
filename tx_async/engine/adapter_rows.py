"""Adapters between their slots and the rows of a micro-batch.

Rows bring their adapters with them: A and B are taken out of their slots for each row, gradients come out for each row,
and row after row is added to its slot's sum. No product with a mask ever joins two rows, so what is in one (NaN
included) cannot reach another.

Along `fsdp` each device has a piece of every slot (`mesh.training_shardings`) and rows of its own. It takes its piece
of the adapter of every row, and one exchange leaves it with the whole adapters of its own rows; gradients go the other
way. So what crosses devices is of the size of the rows, however many slots there are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from tx_async.engine.adapter_slots import at
from tx_async.engine.mesh import training_shardings
from tx_async.layers.lora import LoraWeights, by_path
from tx_async.layers.sharding import axes_of, holds_whole_layers
from tx_async.models.decoder import Decoder

UNROLLED_ROWS_MAX = 32
"""So many rows are added to their sums without a loop, whose turns the host of a GPU would wait for."""


def of_rows(model: Decoder, weights: LoraWeights, slots: Array, rank: int) -> LoraWeights:
    """[layers, slots, ...] -> [layers, R, ...], without the padding above `rank`; slots: int32 [R]."""
    narrow = by_path(lambda _, ab: (ab[0][..., :rank], ab[1][..., :rank, :]), weights)
    if model.mesh is None or holds_whole_layers(model.mesh):
        return jax.tree.map(lambda x: x[:, slots], narrow)

    def take(weights: LoraWeights, slots: Array, mine: Array) -> LoraWeights:
        return jax.tree.map(partial(_of_own_rows, slots, mine), in_slots, weights)

    in_slots, in_rows = _specs(model, model.mesh, slots)
    run = _on_each_device(model.mesh, take, (in_slots, PartitionSpec(), PartitionSpec("fsdp")), in_rows)
    return run(narrow, slots, slots)


def add_rows(model: Decoder, gradients: LoraWeights, rows: LoraWeights, slots: Array) -> LoraWeights:
    """gradients [layers, slots, ...] with those of rows [layers, R, ...] added."""
    if model.mesh is None or holds_whole_layers(model.mesh):
        return _add_in_order(gradients, rows, slots)

    def add(gradients: LoraWeights, rows: LoraWeights, slots: Array) -> LoraWeights:
        return _add_in_order(gradients, jax.tree.map(_of_own_piece, in_slots, rows), slots)

    in_slots, in_rows = _specs(model, model.mesh, slots)
    run = _on_each_device(model.mesh, add, (in_slots, in_rows, PartitionSpec()), in_slots)
    return run(gradients, rows, slots)


def _add_in_order(gradients: LoraWeights, of_rows: LoraWeights, slots: Array) -> LoraWeights:
    """Add row after row: rows of one adapter in a fixed order, unused rows into the scratch slot that nobody reads."""

    def add_row(r: Array | int, total: Array, rows: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(rows, r, 1, axis=1)
        place = at(slots[r], total)
        mine = jax.lax.dynamic_slice(total, place, row.shape)
        return jax.lax.dynamic_update_slice(total, mine + row, place)

    def add_all(r: Array | int, totals: LoraWeights) -> LoraWeights:
        return jax.tree.map(lambda total, rows: add_row(r, total, rows), totals, of_rows)

    num_rows = slots.shape[0]
    if num_rows == 1:
        return add_all(0, gradients)
    return jax.lax.fori_loop(0, num_rows, add_all, gradients, unroll=num_rows <= UNROLLED_ROWS_MAX)


# ---- on one device of those along `fsdp`


def _of_own_rows(slots: Array, mine: Array, spec: PartitionSpec, x: Array) -> Array:
    """A device's piece of the slots [layers, slots, ...] -> the whole adapters of its rows. slots: of all rows; mine:
    of its own."""
    axis = _cut_axis(spec)
    if axis is None:
        return x[:, mine]
    return jax.lax.all_to_all(x[:, slots], "fsdp", split_axis=1, concat_axis=axis, tiled=True)


def _of_own_piece(spec: PartitionSpec, rows: Array) -> Array:
    """The gradients of a device's rows [layers, its rows, ...] -> those of all rows, of its piece of the slots."""
    axis = _cut_axis(spec)
    if axis is None:
        return jax.lax.all_gather(rows, "fsdp", axis=1, tiled=True)
    return jax.lax.all_to_all(rows, "fsdp", split_axis=axis, concat_axis=1, tiled=True)


def _cut_axis(spec: PartitionSpec) -> int | None:
    """The axis of an array that `fsdp` cuts; None where it is whole."""
    return next((axis for axis, names in enumerate(spec) if "fsdp" in axes_of(names)), None)


def _specs(model: Decoder, mesh: Mesh, slots: Array) -> tuple[Any, Any]:
    """How A and B lie in their slots, and in rows."""
    assert slots.shape[0] % mesh.shape["fsdp"] == 0, f"{slots.shape[0]} rows on {dict(mesh.shape)}"

    def in_rows(spec: PartitionSpec) -> PartitionSpec:
        others = ([name for name in axes_of(names) if name != "fsdp"] for names in spec[2:])
        return PartitionSpec(None, "fsdp", *(names[0] if names else None for names in others))

    in_slots = jax.tree.map(lambda sharding: sharding.spec, training_shardings(model, mesh))
    return in_slots, jax.tree.map(in_rows, in_slots, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _on_each_device(mesh: Mesh, function: Any, inputs: tuple[Any, ...], outputs: Any) -> Any:
    # What no device has a piece of is the same on all of them, which the check cannot see.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
