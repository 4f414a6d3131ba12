"""A training micro-batch on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tx_async.engine.adapter_slots import lora_scale
from tx_async.wire.worker import TRAIN_TENSORS, TrainMicroBatch


@struct.dataclass
class RowBatch:
    """R packed rows of L positions; the tensors of `TrainMicroBatch`, and which adapter each row trains."""

    slots: Array
    """int32 [R]: training slot; an unused row has the scratch slot, the last one."""
    scale: Array
    """fp32 [R]: LORA_ALPHA / rank of the row's adapter."""
    tokens: Array
    positions: Array
    segment_ids: Array
    loss_fn: Array
    target_tokens: Array
    weights: Array
    logprobs: Array
    advantages: Array
    clip_low_threshold: Array
    clip_high_threshold: Array
    sequence_ratio_mask: Array
    beta: Array


def shapes(rows: int, length: int, k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every field of a (rows, length, K) batch."""
    shape = {name: (rows, length) for name in TRAIN_TENSORS}
    shape |= {"slots": (rows,), "scale": (rows,), "target_tokens": (rows, length, k), "weights": (rows, length, k)}
    ints = {"slots", "tokens", "positions", "segment_ids", "loss_fn", "target_tokens"}
    return {
        field.name: jax.ShapeDtypeStruct(shape[field.name], jnp.int32 if field.name in ints else jnp.float32)
        for field in fields(RowBatch)
    }


def row_batch(
    command: TrainMicroBatch, tensors: Sequence[np.ndarray], ranks: np.ndarray, vocab_size: int
) -> tuple[RowBatch, int]:
    """-> (the batch, the highest rank in it). It copies: when this returns, the tensors belong to the transport again.

    ranks: int [slots + 1], the rank of each slot's adapter, 0 for none; the last slot is the scratch slot. Asserts what
    the scheduler must have ensured.
    """
    scratch_slot = len(ranks) - 1
    slots = np.array([scratch_slot if slot < 0 else slot for slot in command.slots], np.int32)
    assert slots.max() <= scratch_slot, f"slot {slots.max()} of {scratch_slot}"
    scale = np.array([lora_scale(rank) if rank else 0.0 for rank in ranks[slots]], np.float32)
    arrays = {"slots": slots, "scale": scale}
    arrays |= {name: np.array(tensor) for name, tensor in zip(TRAIN_TENSORS, tensors, strict=True)}
    for name, expected in shapes(len(slots), command.row_length, command.targets_per_token).items():
        assert arrays[name].shape == expected.shape, f"{name} is {arrays[name].shape}, not {expected.shape}"
        assert arrays[name].dtype == expected.dtype, f"{name} is {arrays[name].dtype}, not {expected.dtype}"
    for name in ("tokens", "target_tokens"):
        assert arrays[name].min() >= 0 and arrays[name].max() < vocab_size, f"{name} outside of the vocabulary"
    return RowBatch(**arrays), int(ranks[slots].max())
