"""Recurrent layers in sampling: a slot of state for each sequence, snapshots of known prefixes, the same bits with and
without them."""

import numpy as np
import pytest

from tests.support.sampling_bench import SamplingBench
from tx_async.testing.models import QWEN3_5_TINY, make_model

SMALL = QWEN3_5_TINY | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("hybrid"), SMALL, tokenizer=False)


@pytest.fixture(scope="module")
def bench(folder):
    return SamplingBench(folder)


@pytest.fixture(scope="module")
def uncached(folder):
    return SamplingBench(folder, prefix_cache=False)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def conversation(bench: SamplingBench) -> list:
    """Samples of one prompt, prompts that share its beginning, and what the answers go on to."""
    system = tokens(40)
    outcomes = [bench.outcomes[i] for i in finished(bench, [system] * 4, temperature=1.0)]
    prompts = [system + tokens(9, 1), system + tokens(30, 2), [*system, *outcomes[0].tokens, *tokens(20, 3)], tokens(1)]
    outcomes += [bench.outcomes[i] for i in finished(bench, prompts)]
    return outcomes + [bench.outcomes[i] for i in finished(bench, prompts)]


def finished(bench: SamplingBench, prompts: list, **fields) -> list[int]:
    ids = [bench.admit(prompt, seed=n, sample_index=n, **fields) for n, prompt in enumerate(prompts)]
    bench.finish(prefill_tokens=48)
    return ids


def test_results_have_the_same_bits_with_and_without_snapshots(bench, uncached):
    with_cache, without = conversation(bench), conversation(uncached)
    assert all(one.same_as(other) for one, other in zip(with_cache, without, strict=True))
    assert not any(outcome.num_cached_tokens for outcome in without)
    assert [outcome.num_cached_tokens for outcome in with_cache[:4]] == [0, 39, 39, 39], "of one prompt, once"
    assert all(outcome.num_cached_tokens >= 32 for outcome in with_cache[4:7]), "whole pages of the shared beginning"
    assert [outcome.num_cached_tokens for outcome in with_cache[8:]] == [48, 69, 67, 0], (
        "a prompt that was there before"
    )


def test_results_have_the_same_bits_beside_others_and_in_any_pieces(uncached):
    prompt, others = tokens(90, 21), [tokens(90, seed) for seed in range(22, 32)]

    def sampled(prompts: list, prefill_tokens: int):
        ids = [uncached.admit(prompt, seed=3, temperature=1.0) for prompt in prompts]
        uncached.finish(prefill_tokens=prefill_tokens)
        return uncached.outcomes[ids[0]]

    alone = sampled([prompt], 48)
    assert sampled([prompt], 256).same_as(alone)
    assert sampled([prompt, *others], 256).same_as(alone)
    assert sampled([prompt, *others], 64).same_as(alone)


def test_logprobs_are_the_trainers_whatever_came_from_a_snapshot(bench):
    prompt = tokens(50, 7)
    for outcome in (bench.sample(prompt), bench.sample(prompt)):
        expected = bench.logprobs([*prompt, *outcome.tokens[:-1]])[len(prompt) - 1 :]
        assert np.abs(expected[np.arange(8), outcome.tokens] - outcome.logprobs).max() < 2e-4


def test_a_preempted_sequence_is_computed_again_from_a_snapshot(folder):
    """Room for six pages: sequences of three pages each give way to each other."""
    cramped = SamplingBench(folder, kv_cache_tokens=96, max_context_length=96)
    prompts = [tokens(20, seed) for seed in (11, 12, 13)]
    ids = finished(cramped, prompts, max_tokens=30)
    assert sum(reply.num_preempted for reply in cramped.replies) > 0
    for sequence_id, prompt in zip(ids, prompts, strict=True):
        outcome = cramped.outcomes[sequence_id]
        expected = cramped.logprobs([*prompt, *outcome.tokens[:-1]])[len(prompt) - 1 :]
        assert np.abs(expected[np.arange(30), outcome.tokens] - outcome.logprobs).max() < 2e-4
    states = cramped.engine.sequences.states
    assert len(states._free) == cramped.config.sample_max_num_sequences, "every slot came back"
