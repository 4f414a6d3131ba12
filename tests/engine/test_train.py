"""Micro-batches: the gradients are those of the plain model, however the data is split and packed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine import engine as engine_module
from tx_async.engine.adapter_slots import lora_scale, read_slot
from tx_async.layers.lora import LoraRows
from tx_async.models.decoder import unembedding
from tx_async.testing.engine_bench import assert_same_bits, rl_segment, segment
from tx_async.wire.worker import LOSS_FNS


def trained(bench, slot=0, rank=4, **config):
    """An adapter whose B is not zero any more."""
    config = bench.create(slot, rank, **config)
    bench.train((slot, [segment(20, 99)]))
    bench.step(slot)
    return config


def gradients(bench, slot=0):
    return bench.state(slot).gradients


def assert_close(one, other, tolerance=1e-5):
    """Within `tolerance` of the largest entry of each matrix."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-6, np.abs(a).max()))


PLAIN_LENGTH = 32


def plain_gradients(bench, slot, rank, data):
    """Sequence by sequence through ordinary attention and whole logits, differentiated by JAX. All are filled up to one
    length, which causal attention does not see, so that two losses are two programs."""
    model, params = bench.engine.model, bench.engine.params

    def attend(cache, layer, q, k, v, scale, v_features=0, window=0, sinks=None):
        assert not window and sinks is None
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("rlhd,rmhd->rhlm", q, k) * scale
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf))
        return jnp.einsum("rhlm,rmhd->rlhd", weights, v), cache

    @partial(jax.jit, static_argnames="loss_fn")
    @jax.grad
    def gradient(weights, one, loss_fn):
        lora = LoraRows(jax.tree.map(lambda w: w[:, None], weights), jnp.array([lora_scale(rank)]))
        tokens = jnp.asarray(one["tokens"])[None]
        hidden, _ = model.forward(params, lora, tokens, jnp.arange(tokens.shape[1])[None], attend)
        a, b = weights["head"]["head"]
        logits = hidden[0] @ unembedding(params).T + hidden[0] @ a[0] @ b[0] * lora_scale(rank)
        lp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(one["target_tokens"])[:, None], 1)[:, 0]
        if loss_fn == "cross_entropy":
            return -(one["weights"] * lp).sum()
        return -(jnp.exp(lp - one["logprobs"]) * one["advantages"]).sum()

    def filled(one):
        num = len(one["tokens"])
        arrays = {name: np.broadcast_to(x, num) for name, x in one.items() if name != "loss_fn"}
        return {name: np.pad(x, (0, PLAIN_LENGTH - num)) for name, x in arrays.items()}

    weights = jax.jit(read_slot)(bench.engine.training.weights, np.int32(slot))
    each = [gradient(weights, filled(one), one["loss_fn"]) for one in data]
    return jax.tree.map(lambda *gradients: np.sum(gradients, axis=0), *each)


def test_packed_gradients_are_those_of_the_plain_model(bench):
    trained(bench)
    data = [segment(n, n, weights=w) for n, w in ((20, 0.5), (9, -2.0), (1, 1.0), (31, 3.0))]
    data += [rl_segment(17, 5, "importance_sampling")]
    bench.train((0, data[:4]), (0, data[4:]), length=64)
    assert_close(plain_gradients(bench, 0, 4, data), gradients(bench), 2e-4)


def test_any_split_into_micro_batches_accumulates_to_one_big_batch(make_bench):
    """One row of 128 against three rows of other lengths, and against four rows of one micro-batch."""
    data = [rl_segment(n, n, LOSS_FNS[n % 6]) for n in (30, 25, 20, 31)]
    found = []
    for config, batches in (
        ({}, [[(0, data)]]),
        ({}, [[(0, data[:1])], [(0, data[1:2])], [(0, data[2:])]]),
        ({"train_micro_batch_size": 4}, [[(0, [one]) for one in data]]),
    ):
        bench = make_bench(**config)
        trained(bench)
        losses = 0.0
        for rows in batches:
            used = max(sum(len(one["tokens"]) for one in segments) for _, segments in rows)
            length = next(length for length in (32, 64, 128) if length >= used)
            losses += float(bench.train(*rows, length=length)[1].sum(dtype=float))
        found.append((gradients(bench), losses, bench.step(0), bench.state(0).weights))
    for other in found[1:]:
        assert_close(found[0][0], other[0])
        np.testing.assert_allclose(found[0][1], other[1], rtol=1e-5)
        np.testing.assert_allclose(found[0][2].metrics["grad_norm"], other[2].metrics["grad_norm"], rtol=1e-5)


def test_forward_says_the_same_and_leaves_no_trace(bench):
    trained(bench)
    data = [segment(20, 1), rl_segment(11, 2, "gspo")]
    before = bench.state(0)
    forward = bench.train((0, data), forward_only=True)
    assert_same_bits(before, bench.state(0))
    both = bench.train((0, data))
    for one, other in zip(forward, both, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert (forward[0][0, 31:] == 0).all() and (forward[1][0, 31:] == 0).all()


def test_several_targets_per_token_are_weighted_one_by_one(bench):
    """K targets of one position give the sum of K batches with one target each."""
    trained(bench)
    rng = np.random.default_rng(0)
    targets, weights = rng.integers(0, 256, (20, 5)), rng.standard_normal((20, 5))
    targets[3] = 7
    logprobs, losses = bench.train((0, [segment(20, 1, target_tokens=_wide(targets), weights=_wide(weights))]), k=8)
    together = gradients(bench)
    bench.step(0, learning_rate=0.0)
    singles = [bench.train((0, [segment(20, 1, target_tokens=targets[:, i], weights=weights[:, i])])) for i in range(5)]
    assert_close(together, gradients(bench))
    np.testing.assert_allclose(logprobs[0, :20, :5], np.stack([s[0][0, :20, 0] for s in singles], -1), atol=1e-5)
    np.testing.assert_allclose(losses, sum(s[1] for s in singles), atol=1e-4)


def _wide(values: np.ndarray) -> np.ndarray:
    return np.pad(values, [(0, 0), (0, 8 - values.shape[1])])


def test_training_lowers_the_loss(bench):
    bench.create(0)
    losses = []
    for _ in range(6):
        losses.append(float(bench.train((0, [segment(20, 1)]))[1].sum()))
        bench.step(0)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]


def test_rematerialisation_changes_no_result(make_bench, monkeypatch):
    data = [segment(60, 3)]
    found = []
    for tokens in (16_384, 100):
        monkeypatch.setattr(engine_module, "REMAT_TOKENS", tokens)
        bench = make_bench()
        trained(bench)
        found.append((bench.train((0, data), length=128), gradients(bench)))
    assert_close(found[0], found[1])


def test_a_sequence_as_long_as_the_context_trains(bench):
    bench.create(0)
    _, losses = bench.train((0, [segment(128, 3)]), length=128)
    assert losses.shape == (1, 128) and (losses != 0).all()
    assert bench.step(0).metrics["grad_norm"] > 0


def test_the_step_reports_norm_learning_rate_and_count(bench):
    bench.create(0)
    bench.train((0, [segment(20, 1)]))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in jax.tree.leaves(gradients(bench))))
    stepped = bench.step(0, learning_rate=0.25, grad_clip_norm=1e-3)
    assert stepped.step == 1 and stepped.metrics["learning_rate"] == 0.25 and stepped.metrics["step"] == 1
    np.testing.assert_allclose(stepped.metrics["grad_norm"], norm, rtol=1e-5)


def test_a_batch_that_the_scheduler_must_not_send_is_our_mistake(bench):
    bench.create(0)
    for wrong in (segment(20, 1, target_tokens=bench.engine.model.vocab_size), segment(20, 1, tokens=np.full(20, -1))):
        with pytest.raises(AssertionError, match="outside of the vocabulary"):
            bench.train((0, [wrong]))


def test_the_same_commands_give_the_same_bits(make_bench):
    def run():
        bench = make_bench()
        for step in range(3):
            if step == 0:
                bench.create(0)
            outputs = bench.train((0, [segment(60, step), rl_segment(40, step, "ppo")]), length=128)
            bench.step(0)
        return outputs, bench.state(0)

    assert_same_bits(*(partial(run)() for _ in range(2)))
