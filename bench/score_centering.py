"""Whether a sampler that is not quite the trainer makes a run drift, with importance_sampling and stable_reinforce.

    python bench/score_centering.py [--steps N] [--mismatch X]

The experiment of arXiv:2609.20807 in small: one position with a vocabulary of 200, a sampler whose logits differ from
the policy's by fixed noise, and a reward that says nothing (all advantages are equal), so that a right gradient is 0 on
average and any movement is drift. The losses are those of the engine; the plain one ignores the mismatch, as REINFORCE
on the trainer's own log-probabilities does. Prints the policy's distance from where it began, in nats.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from tx_async.engine.losses import CISPO, STABLE_REINFORCE, LossInputs, loss_terms

VOCAB, HEAD, BATCH, LEARNING_RATE = 200, 64, 256, 0.5


def inputs(loss_fn: int, weights: jax.Array, logprobs: jax.Array) -> LossInputs:
    ones = jnp.ones(BATCH)
    return LossInputs(
        loss_fn=jnp.full(BATCH, loss_fn),
        valid=jnp.ones(BATCH, bool),
        weights=weights,
        logprobs=logprobs,
        advantages=ones,
        clip_low_threshold=ones,
        clip_high_threshold=ones,  # a ratio of exactly 1: cispo is REINFORCE then
        beta=0 * ones,
        log_sequence_ratio=0 * ones,
    )


@jax.jit
def step(logits: jax.Array, noise: jax.Array, key: jax.Array, is_stable: jax.Array) -> jax.Array:
    q = jax.nn.softmax(logits + noise)
    log_p = jax.nn.log_softmax(logits)
    drawn = jax.random.categorical(key, jnp.log(q), shape=(BATCH,))
    head_q, head = jax.lax.top_k(q, HEAD)
    targets = jnp.concatenate([drawn[:, None], jnp.broadcast_to(head, (BATCH, HEAD))], 1)
    weights = jnp.concatenate([jnp.zeros((BATCH, 1)), jnp.broadcast_to(head_q, (BATCH, HEAD))], 1)
    lp = log_p[targets]
    slopes = jnp.where(
        is_stable,
        loss_terms(lp, inputs(STABLE_REINFORCE, weights, lp[:, 0]))[1],
        loss_terms(lp, inputs(CISPO, weights, lp[:, 0]))[1],
    )
    gradient = jnp.zeros(VOCAB).at[targets].add(slopes) - slopes.sum() * jax.nn.softmax(logits)
    return logits - LEARNING_RATE * gradient / BATCH


def distance(now: jax.Array, before: jax.Array) -> float:
    p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(now)
    return float(jnp.sum(jnp.exp(p) * (p - q)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--mismatch", type=float, default=0.3, help="standard deviation of the logits' noise")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    before = jnp.asarray(2 * rng.standard_normal(VOCAB), jnp.float32)
    noise = jnp.asarray(args.mismatch * rng.standard_normal(VOCAB), jnp.float32)
    print(f"{'step':>6} {'REINFORCE':>12} {'stable_reinforce':>18}")
    runs = {False: before, True: before}
    for i in range(1, args.steps + 1):
        key = jax.random.key(i)
        runs = {stable: step(logits, noise, key, jnp.bool_(stable)) for stable, logits in runs.items()}
        if i % (args.steps // 8) == 0:
            print(f"{i:6} {distance(runs[False], before):12.5f} {distance(runs[True], before):18.5f}")


if __name__ == "__main__":
    main()
