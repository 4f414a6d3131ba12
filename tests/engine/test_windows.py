"""Layers with a window beside layers that see everything: pages behind a window are free again, and nobody's bits
depend on what is cached, freed or shared."""

import numpy as np
import pytest

from tests.support.sampling_bench import SamplingBench
from tx_async.testing.models import QWEN3_TINY, make_model
from tx_async.wire.worker import PromptScores

WINDOW = 24
MIXED = QWEN3_TINY | {
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 320,
}
CACHE = {"kv_cache_tokens": 512, "prefill_chunk_tokens": 48}
BOUND = 1e-4
"""Promised: |sampled - forward| log-probability in fp32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("mixed"), MIXED, tokenizer=False)


@pytest.fixture(scope="module")
def bench(folder):
    return SamplingBench(folder, **CACHE)


@pytest.fixture(scope="module")
def uncached(folder):
    return SamplingBench(folder, **CACHE, prefix_cache=False)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def finished(bench: SamplingBench, prompts: list, prefill_tokens: int = 48, **fields) -> list:
    ids = [bench.admit(prompt, seed=n, sample_index=n, **fields) for n, prompt in enumerate(prompts)]
    bench.finish(prefill_tokens=prefill_tokens)
    return [bench.outcomes[i] for i in ids]


def agrees_with_the_trainer(bench: SamplingBench, prompt: list, outcome) -> bool:
    expected = bench.logprobs([*prompt, *outcome.tokens[:-1]])[len(prompt) - 1 :]
    gap = expected[np.arange(len(outcome.tokens)), outcome.tokens] - outcome.logprobs
    return bool(np.abs(gap).max() <= BOUND)


def test_a_sequence_has_a_table_for_each_group_of_layers(bench):
    layout = bench.engine.layout
    assert (layout.paging.windows, layout.paging.page_layers) == ((0, WINDOW, WINDOW), 1)
    assert bench.engine.pools["k"].shape[0] == layout.num_pages == 3 * 32 + 1
    assert bench.engine.kv_cache_tokens == 512


def test_more_long_sequences_run_at_once_than_would_fit_with_all_their_pages(bench):
    """Four of 240 tokens, where the cache holds 512 in all tables; their results are the trainer's."""
    before, prompts = len(bench.replies), [tokens(100, seed) for seed in range(50, 54)]
    ids = [bench.admit(prompt, max_tokens=140) for prompt in prompts]
    most = 0
    while len(bench.outcomes.keys() & set(ids)) < 4:
        bench.quantum(4, 48)
        bench.engine.sequences.check()
        most = max(most, bench.replies[-1].num_kv_tokens)
    replies = bench.replies[before:]
    assert max(reply.num_running for reply in replies) == 4 and not sum(reply.num_preempted for reply in replies)
    assert most <= 4 * (15 + 2 * 3) * 16 // 3, "a window and the next tokens take three pages of a table"
    assert all(
        agrees_with_the_trainer(bench, *pair) for pair in zip(prompts, map(bench.outcomes.get, ids), strict=True)
    )
    assert bench.engine.sequences.cache.num_used == 0


def test_results_have_the_same_bits_with_and_without_the_cache(bench, uncached):
    def conversation(bench: SamplingBench) -> list:
        system = tokens(70)
        outcomes = finished(bench, [system] * 4, temperature=1.0)
        prompts = [system + tokens(9, 1), system[:50] + tokens(30, 2), [*system, *outcomes[0].tokens, *tokens(20, 3)]]
        return outcomes + finished(bench, prompts) + finished(bench, prompts)

    with_cache, without = conversation(bench), conversation(uncached)
    assert all(one.same_as(other) for one, other in zip(with_cache, without, strict=True))
    assert not any(outcome.num_cached_tokens for outcome in without)
    assert [outcome.num_cached_tokens for outcome in with_cache] == [0, 69, 69, 69, 64, 48, 64, 78, 79, 97]


def test_results_have_the_same_bits_beside_others_and_in_any_pieces(uncached):
    prompt, others = tokens(90, 21), [tokens(60, seed) for seed in range(22, 25)]
    alone, *_ = finished(uncached, [prompt], temperature=1.0)
    assert finished(uncached, [prompt], 96, temperature=1.0)[0].same_as(alone)
    assert finished(uncached, [prompt, *others], 64, temperature=1.0)[0].same_as(alone)


def test_a_prompt_longer_than_the_cache_has_room_for_in_all_tables_is_scored(bench):
    """Its windows are left behind while it is computed, 48 tokens at a time."""
    prompt = tokens(300, 9)
    (outcome,) = finished(bench, [prompt], max_tokens=10, prompt_scores=PromptScores(logprobs=True))
    expected = bench.logprobs(prompt)[np.arange(299), prompt[1:]]
    np.testing.assert_allclose(outcome.prompt_logprobs[1:], expected, atol=BOUND)
    assert agrees_with_the_trainer(bench, prompt, outcome)


def test_preempted_sequences_go_on_where_they_were(bench):
    """Eight of 150 tokens do not fit: the youngest give way and come back."""
    before, prompts = len(bench.replies), [tokens(20, seed) for seed in range(30, 38)]
    outcomes = finished(bench, prompts, max_tokens=130)
    assert sum(reply.num_preempted for reply in bench.replies[before:]) > 0
    assert all(agrees_with_the_trainer(bench, *pair) for pair in zip(prompts, outcomes, strict=True))
    assert bench.engine.sequences.cache.num_used == 0
