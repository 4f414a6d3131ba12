"""The shapes of training micro-batches: few, known at start, and the only ones that ever occur."""

from __future__ import annotations

from collections.abc import Sequence

from tx_async.engine.platform import Platform
from tx_async.wire.worker import EngineConfig

PREFERRED_ROW = 1024
"""Packed rows are filled up to this length; only a longer sequence needs a longer row."""


def row_shapes(config: EngineConfig, context: int, platform: Platform) -> tuple[tuple[int, int], ...]:
    """(rows, length in tokens) of every micro-batch, ascending by length; the last one holds a whole context. Each
    device along `fsdp` has as many rows as another."""
    configured = {length for length in config.train_row_lengths if length < context}
    lengths = (*configured, context) if configured else _doubling(platform.shortest_row, context)
    devices = config.fully_sharded_data_parallel_size
    return tuple((devices * _rows_of_a_device(config, length, platform), length) for length in sorted(lengths))


def _rows_of_a_device(config: EngineConfig, length: int, platform: Platform) -> int:
    if config.train_micro_batch_size:
        return -(-config.train_micro_batch_size // config.fully_sharded_data_parallel_size)
    return max(1, (config.train_micro_batch_tokens or platform.micro_batch_tokens) // length)


def _doubling(shortest: int, context: int) -> tuple[int, ...]:
    lengths = [shortest]
    while lengths[-1] < context:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], context)


def preferred_row_length(row_shapes: Sequence[tuple[int, int]]) -> int:
    """The length that rows are filled up to: the longest that is no longer than PREFERRED_ROW."""
    lengths = [length for _, length in row_shapes]
    return max((length for length in lengths if length <= PREFERRED_ROW), default=lengths[0])
