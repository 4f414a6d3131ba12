"""Top-k and top-p keep exactly the tokens that they should; draws are functions of their own row alone."""

import jax
import numpy as np
import pytest

from tx_async.engine.sampler import Choices, logprobs_at, sample, stream_key
from tx_async.engine.vocabulary import largest

DRAWS = 4096
run, keys = jax.jit(sample), jax.jit(stream_key)


def choices(rows, temperature=1.0, top_k=-1, top_p=1.0, seed=0, index=None):
    def full(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), rows)

    words = np.broadcast_to(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32), (rows, 2))
    key = keys(words, np.arange(rows) if index is None else full(index, np.int32))
    return Choices(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32), key)


def drawn(logits, **fields):
    """How often each token comes in DRAWS independent samples of one distribution."""
    rows = np.broadcast_to(np.float32(logits), (DRAWS, len(logits)))
    tokens, _, _ = run(rows, choices(DRAWS, **fields), np.full(DRAWS, 7))
    return np.bincount(tokens, minlength=len(logits))


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0], [-2.0, -3.0, -1.0]], np.float32)
    tokens, logprobs, lse = run(logits, choices(3, temperature=0.0), np.zeros(3, np.int32))
    assert tokens.tolist() == [1, 0, 2]
    expected = np.log(np.exp(logits.astype(float)).sum(-1))
    assert np.allclose(logprobs, logits[np.arange(3), tokens] - expected)
    assert np.allclose(lse, expected)


@pytest.mark.parametrize("vocab", [3, 128, 320, 1000])
def test_logprobs_of_vocabularies_that_fill_the_lanes_and_that_do_not(vocab):
    logits = np.random.default_rng(0).standard_normal((4, vocab)).astype(np.float32) * 9
    expected = np.log(np.exp(logits.astype(float)).sum(-1))
    logprobs, lse = jax.jit(logprobs_at)(logits, np.arange(8).reshape(4, 2) % vocab)
    assert np.allclose(lse, expected, atol=1e-5)
    assert np.allclose(
        logprobs, [logits[i, [2 * i % vocab, (2 * i + 1) % vocab]] - expected[i] for i in range(4)], atol=1e-5
    )


@pytest.mark.parametrize(("num", "k"), [(40, 40), (997, 3), (1000, 40), (4096, 128)])
def test_the_largest_are_those_of_a_sort_and_of_equals_the_first(num, k):
    rng = np.random.default_rng(0)
    x = np.float32([rng.standard_normal(num), rng.integers(0, 4, num), np.zeros(num), np.full(num, -np.inf)])
    values, indexes = jax.jit(largest, static_argnums=1)(x, k)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indexes, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))


def test_top_k_keeps_the_k_likeliest_and_every_tie_at_the_kth_place():
    logits = np.zeros(300, np.float32)
    logits[[7, 70, 170, 270]] = [3.0, 2.0, 2.0, 1.0]
    assert np.flatnonzero(drawn(logits, top_k=1)).tolist() == [7]
    assert np.flatnonzero(drawn(logits, top_k=2)).tolist() == [7, 70, 170]
    assert np.flatnonzero(drawn(logits, top_k=4)).tolist() == [7, 70, 170, 270]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    assert np.flatnonzero(drawn(logits, top_p=0.39)).tolist() == [1]
    assert np.flatnonzero(drawn(logits, top_p=0.41)).tolist() == [1, 3]
    assert np.flatnonzero(drawn(logits, top_p=0.69)).tolist() == [1, 3]
    assert np.flatnonzero(drawn(logits, top_p=0.71)).tolist() == [1, 2, 3]
    assert np.flatnonzero(drawn(logits, top_p=1e-6)).tolist() == [1]


def test_top_p_of_equals_keeps_as_many_as_it_needs_from_the_lowest_token_on():
    assert np.flatnonzero(drawn(np.zeros(200), top_p=0.25)).tolist() == list(range(50))


def test_top_p_counts_its_share_inside_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert np.flatnonzero(drawn(logits, top_k=2, top_p=0.57)).tolist() == [0]
    assert np.flatnonzero(drawn(logits, top_k=2, top_p=0.58)).tolist() == [0, 1]


def test_random_limits_agree_with_sorting():
    """Against a float64 sort over many rows; only tokens within rounding of an edge may differ."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = rng.standard_normal(400) * rng.uniform(0.2, 6)
        temperature, k, p = rng.uniform(0.3, 2), int(rng.integers(1, 60)), rng.uniform(0.05, 0.99)
        weights = np.exp((logits - logits.max()) / temperature)
        order = np.argsort(-weights)[:k]
        share = np.cumsum(weights[order]) / weights[order].sum()
        kept = order[: np.searchsorted(share, p) + 1]
        counts = drawn(logits, temperature=temperature, top_k=k, top_p=p)
        assert set(np.flatnonzero(counts)) <= set(kept)
        likely = [t for t in kept if DRAWS * weights[t] / weights[kept].sum() > 20]
        assert set(likely) <= set(np.flatnonzero(counts))


def test_draws_follow_the_distribution():
    """Chi-squared over all tokens; mean and variance of the statistic are those of its degrees of freedom."""
    logits = np.random.default_rng(1).standard_normal(60)
    for temperature in (0.7, 1.0, 2.0):
        expected = np.exp(logits / temperature)
        expected *= DRAWS / expected.sum()
        statistic = ((drawn(logits, temperature=temperature, seed=3) - expected) ** 2 / expected).sum()
        assert abs(statistic - 59) < 4.5 * np.sqrt(2 * 59)


def test_a_row_is_drawn_alike_among_any_others():
    """Neighbours that are greedy, filtered or NaN switch code paths on and off; no row notices."""
    logits = np.random.default_rng(2).standard_normal((4, 320)).astype(np.float32)
    position = np.full(4, 3)
    plain = choices(4)
    alone, _, _ = jax.device_get(run(logits, plain, position))
    mixed = plain._replace(
        top_k=np.array([-1, 5, -1, 3], np.int32),
        top_p=np.array([1.0, 0.5, 1.0, 0.2], np.float32),
        temperature=np.array([1.0, 1.0, 1.0, 0.0], np.float32),
    )
    logits[1] = np.nan
    beside, logprobs, _ = jax.device_get(run(logits, mixed, position))
    assert beside[0] == alone[0]
    assert beside[2] == alone[2]
    assert np.isfinite(logprobs[[0, 2, 3]]).all()
    assert 0 <= int(beside[1]) < 320


def test_streams_differ_by_seed_sample_and_position_and_repeat():
    logits = np.zeros((64, 1000), np.float32)

    def first(seed, index, position):
        return int(np.asarray(run(logits, choices(64, seed=seed, index=index), np.full(64, position))[0])[0])

    tokens = {
        (seed, index, position): first(seed, index, position)
        for seed in (0, 1, 2**32)
        for index in (0, 1)
        for position in (5, 6)
    }
    assert len(set(tokens.values())) > 9
    assert first(2**32, 1, 6) == tokens[2**32, 1, 6]


def test_tiny_temperatures_are_greedy_and_huge_ones_uniform():
    logits = np.array([0.0, 1.0, 0.5, 0.9])
    assert np.flatnonzero(drawn(logits, temperature=1e-30)).tolist() == [1]
    assert abs(drawn(logits, temperature=1e30) - DRAWS / 4).max() < 150
