"""Calls that a quantum's prefill is cut into."""

from itertools import pairwise

import pytest

from tx_async.engine.decode_batches import decode_batch, prefill_rows
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.platform import ACCELERATOR, CPU
from tx_async.engine.prefix_cache import PageKeys
from tx_async.engine.sequences import SequenceState
from tx_async.wire.worker import SequenceSpec


@pytest.mark.parametrize("sizes", [CPU.prefill_rows, ACCELERATOR.prefill_rows])
def test_calls_have_a_row_for_every_tile_and_few_to_spare(sizes):
    for num_tiles in range(1, 200):
        calls = list(prefill_rows(num_tiles, sizes))
        assert set(calls) <= set(sizes)
        assert sum(calls[:-1]) < num_tiles <= sum(calls)
        assert sum(calls) <= max(sizes[0], 2 * num_tiles)
        assert all(larger >= smaller for larger, smaller in pairwise(calls))


def test_a_top_k_beyond_int32_is_no_limit_and_no_overflow():
    """It is a whole number to a client, and an element of an int32 array here: the worker must not die of it."""
    spec = SequenceSpec(
        sequence_id=1, sampler_slot=-1, adapter_version="base", prompt_index=0, max_tokens=1, top_k=2**63 - 1
    )
    sample = SequenceState(1, spec, ("base", b""), 1, 2, [5], PageKeys("base", 16))
    batch = decode_batch([sample], 4, CacheLayout.plan(64, 16, 64))
    assert int(batch.top_k[0]) == 2**31 - 1
