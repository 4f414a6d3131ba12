"""Whose turn it is to decode, where not all can at once."""

from collections.abc import Sequence

import numpy as np

from tx_async.engine.kv_cache import NULL_PAGE
from tx_async.engine.prefix_cache import PageKeys, PrefixCache
from tx_async.engine.sequences import Sequences, SequenceState, prompt_key
from tx_async.wire.worker import SequenceSpec

STEPS = 4


def sequences(num_decoding_max: int) -> Sequences:
    return Sequences(PrefixCache(num_pages=2000, page_size=16, enabled=False), 64, num_decoding_max)


def admit(
    line: Sequences, number: int, max_tokens: int, prompt: Sequence[int] = (), stream: bool = False
) -> SequenceState:
    tokens = np.array(prompt or [number], np.int32)
    spec = SequenceSpec(
        sequence_id=number, sampler_slot=-1, adapter_version="", prompt_index=0, max_tokens=max_tokens, stream=stream
    )
    sample = SequenceState(
        order=number,
        spec=spec,
        prompt_key=prompt_key(spec, tokens),
        num_prompt=len(tokens),
        limit=len(tokens) + max_tokens,
        tokens=tokens.tolist(),
        keys=PageKeys("", 16),
    )
    line.admit(sample)
    return sample


def quantum(line: Sequences, only_first_tokens: bool = False) -> list[int]:
    """-> sequence_ids that decoded; those at their limit have left."""
    decoding = list(line.schedule(STEPS, 64, only_first_tokens).decoding)
    for sample in decoding:
        sample.tokens += [0] * min(STEPS, sample.limit - len(sample.tokens))
        sample.num_computed = len(sample.tokens) - 1
        if len(sample.tokens) == sample.limit:
            line.finish(sample)
    line.check()
    return [sample.spec.sequence_id for sample in decoding]


def test_all_decode_while_there_is_room():
    line = sequences(num_decoding_max=4)
    for number in range(4):
        admit(line, number, max_tokens=100)
    assert quantum(line) == quantum(line) == [0, 1, 2, 3]


def test_a_short_one_is_not_behind_the_long_ones_before_it():
    line = sequences(num_decoding_max=8)
    for number in range(32):
        admit(line, number, max_tokens=256)
    for _ in range(3):
        quantum(line)
    admit(line, 32, max_tokens=8)
    assert 32 in quantum(line)
    assert 32 in quantum(line)
    assert 32 not in {sample.spec.sequence_id for sample in line}


def test_a_stream_of_short_ones_does_not_stop_a_long_one():
    line = sequences(num_decoding_max=4)
    long = [admit(line, number, max_tokens=40) for number in range(4)]
    number, num_quanta = 4, 0
    while any(sample in long for sample in line):
        for _ in range(4):
            admit(line, number, max_tokens=4)
            number += 1
        quantum(line)
        num_quanta += 1
        assert num_quanta < 400
    assert num_quanta > 10


def test_who_waited_longest_decodes_next():
    line = sequences(num_decoding_max=4)
    for number in range(12):
        admit(line, number, max_tokens=1000)
    gaps = {number: 0 for number in range(12)}
    for _ in range(50):
        chosen = quantum(line)
        assert len(chosen) == 4
        gaps = {number: 0 if number in chosen else gap + 1 for number, gap in gaps.items()}
        assert max(gaps.values()) <= 6


def test_the_longest_do_not_run_alone_in_the_end():
    """Clients wait for a whole batch: as long as any one decodes, the places of all are hardly ever empty."""
    line = sequences(num_decoding_max=16)
    lengths = np.random.default_rng(1).integers(16, 257, 32)
    for number, length in enumerate(lengths):
        admit(line, number, max_tokens=int(length))
    num_quanta = 0
    while list(line):
        quantum(line)
        num_quanta += 1
    assert num_quanta <= 1.1 * max(lengths.sum() / 16, lengths.max()) / STEPS


def test_watched_ones_decode_in_every_quantum_and_leave_a_quarter_of_the_places():
    line = sequences(num_decoding_max=8)
    for number in range(32):
        admit(line, number, max_tokens=256)
    quantum(line)
    for number in range(32, 36):
        admit(line, number, max_tokens=64, stream=True)
    assert all(set(quantum(line)) >= {32, 33, 34, 35} for _ in range(5))
    for number in range(36, 50):
        admit(line, number, max_tokens=64, stream=True)
    turns = [quantum(line) for _ in range(6)]
    assert all(sum(number >= 32 for number in turn) == 6 for turn in turns)
    assert set().union(*turns) >= set(range(32, 50))


def test_a_quantum_for_first_tokens_leaves_out_who_has_one_or_is_not_watched():
    line = sequences(num_decoding_max=8)
    for number in range(3):
        admit(line, number, max_tokens=100, stream=number == 0)
    assert quantum(line) == [0, 1, 2]
    admit(line, 3, max_tokens=100)
    admit(line, 4, max_tokens=100, stream=True)
    assert quantum(line, only_first_tokens=True) == [4]
    assert quantum(line, only_first_tokens=True) == [0, 1, 2, 3, 4], "nobody waits for a first token"


def test_watched_ones_wait_and_prefill_before_others_and_give_way_last():
    line = Sequences(PrefixCache(num_pages=12, page_size=16, enabled=False), 3, 3)
    first = admit(line, 0, max_tokens=100, prompt=range(30))
    second = admit(line, 1, max_tokens=100, prompt=range(30))
    quantum(line)
    admit(line, 2, max_tokens=100, prompt=range(10))
    watched = admit(line, 3, max_tokens=100, prompt=range(10), stream=True)
    assert [sample.spec.sequence_id for sample in line.waiting] == [3, 2]
    while not line.schedule(STEPS, 64).num_preempted:
        for sample in line.running:
            sample.tokens += [0] * STEPS
            sample.num_computed = len(sample.tokens) - 1
    assert watched in line.running and first in line.running and second not in line.running


def test_a_prompt_is_charged_whole_pages_of_a_quantums_prefill():
    line = sequences(num_decoding_max=64)
    for number in range(40):
        admit(line, number, max_tokens=4, prompt=[number] * 4)
    computed = len(line.schedule(STEPS, prefill_tokens=256).prefill)
    assert computed == 256 // 16


def test_pages_that_left_every_window_are_free_again_and_a_known_prefix_is_still_found():
    line = Sequences(PrefixCache(num_pages=40, page_size=16), 64, 8, window=32)
    sample = admit(line, 0, max_tokens=400, prompt=range(100))
    most = 0
    while list(line):
        quantum(line)
        most = max(most, sum(page != NULL_PAGE for page in sample.pages))
        assert sum(page != NULL_PAGE for page in sample.pages) <= 100 // 16 + 2
    assert most == 7, "the prompt's, before its end was computed; later a window and the next tokens"
    follower = admit(line, 1, max_tokens=4, prompt=range(100))
    quantum(line)
    assert follower.num_cached == 99
