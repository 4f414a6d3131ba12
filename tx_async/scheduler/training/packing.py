"""Sequences into rows, rows into micro-batches.

A request's rows are a function of that request alone (and of the engine's short list of row lengths), so neither its
numbers nor their order can depend on who else is there. Only whole rows of other requests ever join a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from msgspec import Struct

from tx_async.scheduler.training.placement import Placement, round_up
from tx_async.wire.operations import Datum, ForwardBackward, SamplerHeads
from tx_async.wire.worker import CLIP_THRESHOLDS, LOSS_FNS, EngineInfo

_INTS = ("tokens", "positions", "segment_ids", "loss_fn")
_FLOATS = ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask", "beta")


class Segment(Struct, frozen=True, array_like=True):
    """One datum's place in a row."""

    datum: int
    offset: int
    length: int


class PackedRow(Struct, frozen=True):
    length: int
    segments: tuple[Segment, ...]


class PackedRequest(Struct, frozen=True):
    rows: tuple[PackedRow, ...]
    targets_per_token: int
    """K of the micro-batches that hold these rows: a member of `EngineInfo.target_tokens_k`."""


def pack(operation: ForwardBackward, info: EngineInfo) -> PackedRequest:
    sizes = [datum.num_tokens for datum in operation.data]
    lengths = [length for _, length in info.row_shapes]
    placement = Placement(sizes, lengths, info.row_length_preferred, info.micro_batch_overhead)
    is_row_alone = all(num_rows == 1 for num_rows, _ in info.row_shapes)
    contents = placement.of_own_micro_batches() if is_row_alone else placement.of_shared_micro_batches()
    rows = tuple(_row(content, sizes, placement.length_of(content)) for content in contents)
    widest = max(map(_width, operation.data))
    return PackedRequest(rows, round_up(widest, info.target_tokens_k))


def _row(content: Sequence[int], sizes: Sequence[int], length: int) -> PackedRow:
    ends = accumulate(sizes[i] for i in content)
    return PackedRow(length, tuple(Segment(i, end - sizes[i], sizes[i]) for i, end in zip(content, ends, strict=True)))


def fits(operation: ForwardBackward, info: EngineInfo) -> bool:
    """Whether the engine has a row for every sequence, and room for its targets."""
    longest = max(datum.num_tokens for datum in operation.data)
    widest = max(map(_width, operation.data))
    return longest <= info.row_shapes[-1][1] and widest <= info.target_tokens_k[-1]


def fill(operations: Sequence[tuple[ForwardBackward, PackedRow] | None], length: int, k: int) -> list[np.ndarray]:
    """The tensors of a micro-batch (`TRAIN_TENSORS`) from its rows; None is an unused row."""
    shape = (len(operations), length)
    ints = dict(zip(_INTS, np.zeros((len(_INTS), *shape), np.int32), strict=True))
    wide = {"target_tokens": np.zeros((*shape, k), np.int32), "weights": np.zeros((*shape, k), np.float32)}
    floats = dict(zip(_FLOATS, np.zeros((len(_FLOATS), *shape), np.float32), strict=True))
    arrays = ints | wide | floats
    for r, entry in enumerate(operations):
        if entry is not None:
            operation, row = entry
            for number, segment in enumerate(row.segments, start=1):
                place = (r, slice(segment.offset, segment.offset + segment.length))
                _fill_segment(arrays, place, operation, operation.data[segment.datum], number)
    return list(arrays.values())


def _fill_segment(
    arrays: dict[str, np.ndarray], place: tuple[int, slice], operation: ForwardBackward, datum: Datum, number: int
) -> None:
    """The arrays are zero where nothing is put."""
    inputs, config = datum.loss_fn_inputs, operation.loss_fn_config
    arrays["tokens"][place] = np.frombuffer(datum.tokens, np.int32)
    arrays["positions"][place] = np.arange(datum.num_tokens)
    arrays["segment_ids"][place] = number
    arrays["loss_fn"][place] = LOSS_FNS.index(operation.loss_fn)
    targets = _targets(datum)
    arrays["target_tokens"][place][:, : targets.shape[1]] = targets
    # Without weights, cross_entropy counts each position once; the other losses do not read them.
    weights = inputs["weights"].numpy().reshape(targets.shape) if "weights" in inputs else np.float32(1)
    arrays["weights"][place][:, : targets.shape[1]] = weights
    if datum.heads:
        _fill_heads(arrays["target_tokens"][place], arrays["weights"][place], datum.heads)
    low, high = CLIP_THRESHOLDS.get(operation.loss_fn, (0.0, 0.0))
    defaults = {
        "clip_low_threshold": config.get("clip_low_threshold", low),
        "clip_high_threshold": config.get("clip_high_threshold", high),
        "sequence_ratio_mask": 1.0,
        "beta": config.get("beta", config.get("kl_coeff", 0.0)),
        "logprobs": 0.0,
        "advantages": 0.0,
    }
    for name, default in defaults.items():
        if name in inputs:
            arrays[name][place] = inputs[name].numpy()
        elif default:
            arrays[name][place] = default


def _fill_heads(targets: np.ndarray, weights: np.ndarray, heads: SamplerHeads) -> None:
    """Behind the sampled token: the sampler's head, and its probabilities as weights. See `TrainMicroBatch`."""
    positions = np.frombuffer(heads.positions, np.int32)
    columns = slice(1, 1 + heads.k)
    weights[:] = 0
    targets[positions, columns] = np.frombuffer(heads.token_ids, np.int32).reshape(-1, heads.k)
    weights[positions, columns] = np.frombuffer(heads.probabilities, np.float32).reshape(-1, heads.k)
    weights[positions, 0] = np.frombuffer(heads.is_whole, np.uint8)


def _width(datum: Datum) -> int:
    """The number of targets of each position."""
    if datum.heads:
        return 1 + datum.heads.k
    return math.prod(datum.loss_fn_inputs["target_tokens"].shape) // datum.num_tokens


def _targets(datum: Datum) -> np.ndarray:
    """[T, K]"""
    targets = datum.loss_fn_inputs["target_tokens"].numpy()
    return targets.reshape(datum.num_tokens, -1)
