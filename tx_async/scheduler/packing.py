"""Sequences into rows, rows into micro-batches.

A request's rows are a function of that request alone (and of the engine's short list of row lengths), so neither its
numbers nor their order can depend on who else is there. Only whole rows of other requests ever join a micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from random import Random

import numpy as np
from msgspec import Struct

from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.worker import LOSS_FNS, EngineInfo

DEFAULT_THRESHOLDS = {"ppo": (0.8, 1.2), "gspo": (0.8, 1.2), "cispo": (0.0, 4.0)}
"""Section 14 of the wire contract: clip_low_threshold, clip_high_threshold, as bounds of the ratio itself."""

MICRO_BATCH_OVERHEAD = 25
"""What a micro-batch costs beside its positions, in positions: 30 ms where 1,024 of them take 1.2 s (two cores)."""
PLACEMENTS_TRIED = 480
"""Sequences that orders beside the first may place: a few ms of the server's loop."""


class Segment(Struct, frozen=True, array_like=True):
    """One datum's place in a row."""

    datum: int
    offset: int
    length: int


class Row(Struct, frozen=True):
    length: int
    segments: tuple[Segment, ...]


class PackedRequest(Struct, frozen=True):
    rows: tuple[Row, ...]
    targets_per_token: int
    """K of the micro-batches that hold these rows: a member of `EngineInfo.target_tokens_k`."""


def pack(operation: ForwardBackward, info: EngineInfo) -> PackedRequest:
    """First-fit decreasing into rows of the preferred length; each row then shrinks to the shortest that holds it.

    Where a row is a micro-batch by itself, a row may become several that cost less together, and other orders than the
    decreasing one are tried: for 16 sequences of 32 to 512 tokens rows are 97 instead of 94 % full.
    """
    lengths = [length for _, length in info.row_shapes]
    sizes = [datum.num_tokens for datum in operation.data]
    capacity = round_up(min(sum(sizes), info.row_length_preferred), lengths)
    decreasing = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    if all(num_rows == 1 for num_rows, _ in info.row_shapes):
        tried = [_apart(order, sizes, capacity, lengths) for order in (decreasing, *_other_orders(sizes))]
        contents = min(tried, key=lambda contents: _cost(contents, sizes, lengths))
    else:
        contents = _first_fit(decreasing, sizes, capacity, lengths)
    rows = tuple(_row(content, sizes, lengths) for content in contents)
    widest = max(_targets(datum).shape[1] for datum in operation.data)
    return PackedRequest(rows, round_up(widest, info.target_tokens_k))


def _other_orders(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Decreasing, but for chance: the same for the same sizes. Few for many sequences, whose rows are full anyway."""
    chance = Random(0)
    for _ in range(PLACEMENTS_TRIED // max(16, len(sizes))):
        keys = [size * chance.uniform(0.5, 1) for size in sizes]
        yield sorted(range(len(sizes)), key=lambda i: -keys[i])


def _apart(order: Sequence[int], sizes: Sequence[int], capacity: int, lengths: Sequence[int]) -> list[list[int]]:
    """First fit, and what fills a row badly in shorter ones."""
    contents = _first_fit(order, sizes, capacity, lengths)
    return [part for content in contents for part in _split(content, sizes, lengths)]


def _first_fit(order: Sequence[int], sizes: Sequence[int], capacity: int, lengths: Sequence[int]) -> list[list[int]]:
    """What goes together: each datum of `order` where it fits first. One that is longer than `capacity` opens a row
    that is long enough."""
    contents: list[list[int]] = []
    free: list[int] = []
    for i in order:
        place = next((place for place, space in enumerate(free) if space >= sizes[i]), None)
        if place is None:
            place = len(contents)
            contents.append([])
            free.append(max(capacity, round_up(sizes[i], lengths)))
        contents[place].append(i)
        free[place] -= sizes[i]
    return contents


def _split(content: list[int], sizes: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """The data of one row in the rows that cost least together; in the one row if none cost less than that."""
    shorter = lengths[: lengths.index(_length_of(content, sizes, lengths))]
    choices = [[content], *(_first_fit(content, sizes, length, lengths) for length in shorter)]
    return min(choices, key=lambda contents: _cost(contents, sizes, lengths))


def _cost(contents: Sequence[Sequence[int]], sizes: Sequence[int], lengths: Sequence[int]) -> int:
    """Of rows that are micro-batches by themselves, in tokens."""
    return sum(_length_of(content, sizes, lengths) + MICRO_BATCH_OVERHEAD for content in contents)


def _length_of(content: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]) -> int:
    return round_up(sum(sizes[i] for i in content), lengths)


def _row(content: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]) -> Row:
    ends = list(accumulate(sizes[i] for i in content))
    segments = tuple(Segment(i, end - sizes[i], sizes[i]) for i, end in zip(content, ends, strict=True))
    return Row(round_up(ends[-1], lengths), segments)


def fits(operation: ForwardBackward, info: EngineInfo) -> bool:
    """Whether the engine has a row for every sequence, and room for its targets."""
    longest = max(datum.num_tokens for datum in operation.data)
    widest = max(_targets(datum).shape[1] for datum in operation.data)
    return longest <= info.row_shapes[-1][1] and widest <= info.target_tokens_k[-1]


def round_up(value: int, choices: Sequence[int]) -> int:
    """The smallest choice (ascending) that is at least `value`; `api/` has refused anything above the largest."""
    index = bisect_left(choices, value)
    assert index < len(choices), f"{value} exceeds every one of {choices}"
    return choices[index]


def fill(operations: Sequence[tuple[ForwardBackward, Row] | None], length: int, k: int) -> list[np.ndarray]:
    """The tensors of a micro-batch (`TRAIN_TENSORS`) from its rows; None is an unused row."""
    shape = (len(operations), length)
    ints = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "loss_fn")}
    wide = {"target_tokens": np.zeros((*shape, k), np.int32), "weights": np.zeros((*shape, k), np.float32)}
    names = (
        "logprobs",
        "advantages",
        "clip_low_threshold",
        "clip_high_threshold",
        "sequence_ratio_mask",
        "beta",
    )
    floats = {name: np.zeros(shape, np.float32) for name in names}
    arrays = ints | wide | floats
    for r, entry in enumerate(operations):
        if entry is not None:
            operation, row = entry
            for number, segment in enumerate(row.segments, start=1):
                at = {
                    name: array[r, segment.offset : segment.offset + segment.length] for name, array in arrays.items()
                }
                _fill_segment(at, operation, operation.data[segment.datum], number)
    return list(arrays.values())


def _fill_segment(at: dict[str, np.ndarray], operation: ForwardBackward, datum: Datum, number: int) -> None:
    inputs, config = datum.loss_fn_inputs, operation.loss_fn_config
    at["tokens"][:] = np.frombuffer(datum.tokens, np.int32)
    at["positions"][:] = np.arange(datum.num_tokens)
    at["segment_ids"][:] = number
    at["loss_fn"][:] = LOSS_FNS.index(operation.loss_fn)
    targets = _targets(datum)
    at["target_tokens"][:, : targets.shape[1]] = targets
    # Without weights, cross_entropy counts each position once; the other losses do not read them.
    weights = inputs["weights"].numpy().reshape(targets.shape) if "weights" in inputs else np.float32(1)
    at["weights"][:, : targets.shape[1]] = weights
    low, high = DEFAULT_THRESHOLDS.get(operation.loss_fn, (0.0, 0.0))
    defaults = {
        "clip_low_threshold": config.get("clip_low_threshold", low),
        "clip_high_threshold": config.get("clip_high_threshold", high),
        "sequence_ratio_mask": 1.0,
        "beta": config.get("beta", 0.0),
        "logprobs": 0.0,
        "advantages": 0.0,
    }
    for name, default in defaults.items():
        at[name][:] = inputs[name].numpy() if name in inputs else default


def _targets(datum: Datum) -> np.ndarray:
    """[T, K]"""
    targets = datum.loss_fn_inputs["target_tokens"].numpy()
    return targets.reshape(datum.num_tokens, -1)
