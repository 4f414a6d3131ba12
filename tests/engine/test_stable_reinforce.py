"""What score centering is for: nothing of the sampler's mismatch moves the policy, and on-policy it is REINFORCE."""

import jax
import numpy as np
import pytest

from tx_async.engine.losses import STABLE_REINFORCE, LossInputs, loss_terms

VOCAB = 12


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def gradient(p: np.ndarray, q: np.ndarray, size: int, token: int, advantage: float = 1.0, kl_coeff: float = 0.0):
    """d loss / d logits [V] of one position: policy p, sampler q whose `size` likeliest tokens were recorded. A sampler
    that leaves tokens out (q = 0) has recorded all that it could draw when they fit."""
    head = np.argsort(-q, kind="stable")[:size]
    targets = np.array([token, *head])
    is_whole = bool((q == 0).any()) and np.isclose(q[head].sum(), 1)
    weights = np.array([float(is_whole), *q[head]])
    one = np.zeros(1, np.float32)
    inputs = LossInputs(
        loss_fn=np.array([STABLE_REINFORCE], np.int32),
        valid=np.array([True]),
        weights=np.float32(weights[None]),
        logprobs=one,
        advantages=np.array([advantage], np.float32),
        clip_low_threshold=one,
        clip_high_threshold=one,
        beta=np.array([kl_coeff], np.float32),
        log_sequence_ratio=one,
    )
    _, slopes = jax.jit(loss_terms)(np.float32(np.log(p[targets])[None]), inputs)
    slopes = np.asarray(slopes, float)[0]
    found = -slopes.sum() * p
    np.add.at(found, targets, slopes)
    return found


def reinforce(p: np.ndarray, token: int) -> np.ndarray:
    """d (-log p(token)) / d logits"""
    return p - np.eye(VOCAB)[token]


@pytest.fixture
def policy() -> np.ndarray:
    return softmax(np.random.default_rng(1).standard_normal(VOCAB))


def test_on_policy_it_is_reinforce(policy):
    for token in range(VOCAB):
        found = gradient(policy, policy, 5, token, advantage=0.7)
        np.testing.assert_allclose(found, 0.7 * reinforce(policy, token), atol=1e-6)


@pytest.mark.parametrize("size", [3, VOCAB])
def test_on_policy_the_correction_vanishes_for_a_filtered_sampler_too(policy, size):
    """top-k left three tokens: the policy is compared within them, where it is the sampler."""
    kept = np.argsort(-policy)[:3]
    q = np.zeros(VOCAB)
    q[kept] = policy[kept] / policy[kept].sum()
    mean = sum(q[token] * gradient(policy, q, size, token) for token in kept)
    np.testing.assert_allclose(mean, 0, atol=1e-6)


def test_equal_advantages_do_not_move_the_policy_however_far_the_sampler_is(policy):
    """The drift that the correction stops: with a constant advantage REINFORCE's mean gradient under q is not 0."""
    q = softmax(np.random.default_rng(2).standard_normal(VOCAB))
    tokens = range(VOCAB)
    drift = sum(q[token] * reinforce(policy, token) for token in tokens)
    whole = sum(q[token] * gradient(policy, q, VOCAB, token) for token in tokens)
    part = sum(q[token] * gradient(policy, q, 8, token) for token in tokens)
    np.testing.assert_allclose(whole, 0, atol=1e-5)
    assert np.abs(part).max() < 0.2 * np.abs(drift).max()


def test_the_divergence_pulls_towards_the_sampler(policy):
    q = softmax(np.random.default_rng(3).standard_normal(VOCAB))
    found = gradient(policy, q, VOCAB, 0, advantage=0.0, kl_coeff=0.5)
    np.testing.assert_allclose(found, 0.5 * (policy - q), atol=1e-5)


def test_the_divergence_of_a_filtered_sampler_stays_within_its_support(policy):
    q = np.zeros(VOCAB)
    q[:4] = softmax(np.arange(4.0))
    found = gradient(policy, q, 6, 0, advantage=0.0, kl_coeff=1.0)
    inside = policy[:4] / policy[:4].sum()
    np.testing.assert_allclose(found[:4], inside - q[:4], atol=1e-5)
    np.testing.assert_allclose(found[4:], 0, atol=1e-6)


def test_a_policy_that_has_left_the_tail_empty_gives_finite_numbers():
    p = np.full(VOCAB, 1e-12)
    p[0] = 1 - p[1:].sum()
    q = np.full(VOCAB, 1 / VOCAB)
    assert np.isfinite(gradient(p, q, 3, 5, kl_coeff=1.0)).all()
