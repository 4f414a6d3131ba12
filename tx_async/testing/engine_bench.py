"""An engine driven by hand: micro-batches from a few segments, every command waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tx_async.engine.adapter_slots import TrainingState, read_state
from tx_async.engine.engine import JaxEngine
from tx_async.wire.worker import (
    LOSS_FNS,
    TRAIN_TENSORS,
    AdamParams,
    AdapterConfig,
    CreateAdapter,
    LoadAdapter,
    Loaded,
    SaveAdapter,
    StepOptimizer,
    Stepped,
    TrainMicroBatch,
)

BatchSegment = dict[str, Any]
"""tokens, and any other tensor of a micro-batch as an array or a number; `loss_fn` by name."""


def segment(
    length: int, seed: int = 0, loss_fn: str = "cross_entropy", vocab: int = 256, **inputs: Any
) -> BatchSegment:
    """Random tokens and targets; weight 1, no clipping."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab, (2, length))
    defaults = {"weights": 1.0, "clip_high_threshold": 1e6, "sequence_ratio_mask": 1.0}
    return {"tokens": tokens, "target_tokens": targets, "loss_fn": loss_fn, **defaults, **inputs}


def rl_segment(length: int, seed: int, loss_fn: str, **inputs: Any) -> BatchSegment:
    rng = np.random.default_rng(seed + 1000)
    noise = {"logprobs": -6 + rng.standard_normal(length), "advantages": rng.standard_normal(length)}
    thresholds: dict[str, Any] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": 0.05}
    given: dict[str, Any] = thresholds | noise | inputs
    return segment(length, seed, loss_fn, **given)


def micro_batch(
    rows: Sequence[tuple[int, Sequence[BatchSegment]]], length: int, k: int = 1, forward_only: bool = False
) -> tuple[TrainMicroBatch, list[np.ndarray]]:
    """rows: (slot, segments side by side)."""
    arrays = _empty(len(rows), length, k)
    for r, (_, segments) in enumerate(rows):
        start = 0
        for number, one in enumerate(segments, 1):
            stop = start + len(one["tokens"])
            _put(arrays, r, slice(start, stop), one | {"segment_ids": number, "positions": np.arange(stop - start)})
            start = stop
    slots = tuple(slot for slot, _ in rows)
    command = TrainMicroBatch(slots=slots, row_length=length, targets_per_token=k, forward_only=forward_only)
    return command, [arrays[name] for name in TRAIN_TENSORS]


def _empty(rows: int, length: int, k: int) -> dict[str, np.ndarray]:
    ints = ("tokens", "positions", "segment_ids", "loss_fn", "target_tokens")
    wide = ("target_tokens", "weights")
    return {
        name: np.zeros((rows, length, k) if name in wide else (rows, length), np.int32 if name in ints else np.float32)
        for name in TRAIN_TENSORS
    }


def _put(arrays: dict[str, np.ndarray], row: int, where: slice, values: BatchSegment) -> None:
    for name, value in values.items():
        value = LOSS_FNS.index(value) if name == "loss_fn" else np.asarray(value)
        place = arrays[name][row, where]
        if place.ndim == 2 and np.ndim(value) < 2:
            place[:, 0] = value
        else:
            place[:] = value


class EngineBench:
    """One engine and what tests ask of it, each call waiting for its outcome."""

    def __init__(self, engine: JaxEngine):
        self.engine = engine

    def run(self, command: Any, tensors: Sequence[np.ndarray] = ()) -> tuple[Any, list[np.ndarray]]:
        return self.engine.execute(command, tensors)()

    def create(self, slot: int, rank: int = 4, seed: int = 1, **config: Any) -> AdapterConfig:
        adapter = AdapterConfig(rank=rank, seed=seed, **config)
        self.run(CreateAdapter(slot=slot, config=adapter))
        return adapter

    def train(
        self, *rows: tuple[int, Sequence[BatchSegment]], length: int = 32, k: int = 1, forward_only: bool = False
    ):
        """-> (logprobs [R, L, K], losses [R, L]); as many micro-batches as the engine's shape for `length` needs."""
        size = dict((length, rows) for rows, length in self.engine.row_shapes)[length]
        outputs = []
        for chunk in (rows[i : i + size] for i in range(0, len(rows), size)):
            padded = [*chunk, *[(-1, [])] * (size - len(chunk))]
            outputs.append([x[: len(chunk)] for x in self.run(*micro_batch(padded, length, k, forward_only))[1]])
        logprobs, losses = (np.concatenate(x) for x in zip(*outputs, strict=True))
        return logprobs, losses

    def step(self, slot: int, **adam: Any) -> Stepped:
        return self.run(StepOptimizer(slot=slot, adam=AdamParams(**{"learning_rate": 0.01} | adam)))[0]

    def state(self, slot: int) -> TrainingState:
        """Everything of a slot, on the host, copied."""
        return jax.tree.map(np.array, jax.jit(read_state)(self.engine.training, slot))

    def save(self, slot: int, config: AdapterConfig, key: str, kind: Any = "training"):
        return self.run(SaveAdapter(slot=slot, config=config, key=key, kind=kind))[0]

    def load(self, slot: int, config: AdapterConfig, key: str, optimizer: bool = True) -> Loaded:
        return self.run(LoadAdapter(slot=slot, config=config, key=key, optimizer=optimizer))[0]


def assert_same_bits(one: Any, other: Any) -> None:
    """NaNs of equal bits count as equal."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
