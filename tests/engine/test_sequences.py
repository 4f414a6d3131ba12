"""Whose turn it is to decode, where not all can at once."""

from collections.abc import Sequence

import numpy as np
import pytest

from tx_async.engine.kv_cache import NULL_PAGE
from tx_async.engine.prefix_cache import PageKeys, PrefixCache
from tx_async.engine.sequences import Schedule, Sequences, SequenceState, prompt_key
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
    return [sample.spec.sequence_id for sample in scheduled(line, only_first_tokens).decoding]


def scheduled(line: Sequences, only_first_tokens: bool = False) -> Schedule:
    """A quantum, with what its tokens would do."""
    schedule = line.schedule(STEPS, 64, only_first_tokens)
    for piece in schedule.prefill:
        has_what_it_sees(line, piece.sample, piece.start, piece.stop)
    for sample in list(schedule.decoding):
        has_what_it_sees(line, sample, len(sample.tokens) - 1, min(len(sample.tokens) + STEPS - 1, sample.limit - 1))
        sample.tokens += [0] * min(STEPS, sample.limit - len(sample.tokens))
        sample.num_computed = len(sample.tokens) - 1
        if len(sample.tokens) == sample.limit:
            line.finish(sample)
    line.check()
    return schedule


def has_what_it_sees(line: Sequences, sample: SequenceState, start: int, stop: int) -> None:
    """Tokens [start, stop) have pages to write to, and those before them that their layers see."""
    for pages, window in zip(sample.tables, line.pages.windows, strict=True):
        first = max(0, start - window + 1) // 16 if window else 0
        seen = pages[first : -(-stop // 16)]
        assert len(seen) == -(-stop // 16) - first and NULL_PAGE not in seen


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


def run_to_the_end(line: Sequences) -> tuple[int, int]:
    """-> the most pages in use after any quantum, and how many sequences were preempted."""
    most = preempted = 0
    while list(line):
        schedule = scheduled(line)
        most, preempted = max(most, line.cache.num_used), preempted + schedule.num_preempted
    return most, preempted


def test_pages_that_left_their_window_are_free_again_and_a_known_prefix_is_still_found():
    line = Sequences(PrefixCache(num_pages=40, page_size=16), 64, 8, windows=(32,))
    admit(line, 0, max_tokens=400, prompt=range(100))
    most, _ = run_to_the_end(line)
    assert most == 5, "a window and what is computed next, never the 32 pages of all tokens"
    follower = admit(line, 1, max_tokens=4, prompt=range(100))
    quantum(line)
    assert follower.num_cached == 99


def test_beside_layers_that_see_everything_a_window_keeps_its_own_pages():
    """Also while a long prompt is computed, piece by piece."""
    line = Sequences(PrefixCache(num_pages=200, page_size=16), 64, 8, windows=(0, 32, 32))
    sample = admit(line, 0, max_tokens=1000, prompt=range(1000))
    of_window = 0
    while len(sample.tokens) < 1900:
        quantum(line)
        full, *windowed = ([page for page in pages if page != NULL_PAGE] for pages in sample.tables)
        assert len(full) >= len(sample.tokens) // 16, "what sees everything keeps everything"
        of_window = max(of_window, *map(len, windowed))
    assert of_window == 6, "two pages before a chunk of four"
    run_to_the_end(line)
    follower = admit(line, 1, max_tokens=4, prompt=range(1000))
    quantum(line)
    assert follower.num_cached == 999, "where the prompt ended its window is still known"


def test_sequences_that_would_not_fit_with_all_pages_run_at_once():
    """Four sequences of 64 pages in each of two tables; 130 pages held two of them before."""
    line = Sequences(PrefixCache(num_pages=4 * 64 + 4 * 8 + 1, page_size=16), 64, 8, windows=(0, 32))
    for number in range(4):
        admit(line, number, max_tokens=800, prompt=[number] * 224)
    for _ in range(20):
        quantum(line)
    assert len(line.running) == 4
    most, preempted = run_to_the_end(line)
    assert most <= 4 * (64 + 8) and not preempted


def test_samples_of_one_prompt_share_the_pages_of_every_table():
    line = Sequences(PrefixCache(num_pages=100, page_size=16), 64, 8, windows=(0, 32))
    group = [admit(line, number, max_tokens=80, prompt=range(200)) for number in range(4)]
    copies, prefilled = [], 0
    for _ in range(8):
        schedule = scheduled(line)
        prefilled += sum(piece.stop - piece.start for piece in schedule.prefill)
        copies += schedule.copies
    assert prefilled == 199
    assert len(copies) == 3 * 2 and len(set(copies)) == 6, "the last page, in part, of each table"
    assert [sample.num_cached for sample in group] == [0, 199, 199, 199]
    shared = [sample.tables[0][:12] for sample in group]
    assert shared == shared[:1] * 4


def test_a_prefix_of_which_a_window_is_gone_is_computed_from_where_all_of_it_is_there():
    line = Sequences(PrefixCache(num_pages=80, page_size=16), 64, 8, windows=(0, 32))
    admit(line, 0, max_tokens=4, prompt=range(320))
    run_to_the_end(line)
    pages = line.pages
    keys = PageKeys("", 16).upto(list(range(320)), 320)
    assert pages.borders(keys[:10])[-1] == 10, "pages behind the window are known while there is room"
    for key in keys[4:10]:  # as when their room was needed
        page = line.cache.known(key + bytes([1]))
        line.cache._idle.pop(page)
        line.cache._free.append(page)
        for known in line.cache._keys.pop(page):
            del line.cache._pages[known]
    line.cache.check([])
    assert pages.borders(keys[:10])[-1] == 4
    assert pages.borders(keys)[-1] == 20, "the window before the end is there"
    follower = admit(line, 1, max_tokens=4, prompt=[*range(160), *range(1000, 1100)])
    quantum(line)
    assert follower.num_cached == 4 * 16


@pytest.mark.parametrize("seed", range(6))
def test_whoever_comes_and_goes_the_books_agree_and_all_end(seed):
    """Prompts that share beginnings, little room, cancellations; three kinds of tables."""
    rng = np.random.default_rng(seed)
    windows = [(0, 32), (0, 64, 16), (48,), (64, 64, 16)][seed % 4]
    line = Sequences(PrefixCache(num_pages=48, page_size=16, enabled=seed != 4), 6, 4, windows=windows)
    for number in range(40):
        shared = list(range(int(rng.integers(1, 160))))
        admit(line, number, int(rng.integers(1, 60)), [*shared, *rng.integers(0, 9, rng.integers(0, 20)).tolist()])
        if rng.random() < 0.6:
            quantum(line)
        if rng.random() < 0.1:
            line.cancel([int(rng.integers(0, number + 1))])
            line.check()
    for _ in range(2000):
        if not list(line):
            break
        quantum(line)
    assert not list(line), "everybody came to an end"
    assert line.cache.num_used == 0
