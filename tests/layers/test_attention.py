"""Packed attention against plain softmax attention over the whole row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers import attention
from tx_async.layers.attention import PackedAttention

LAYOUTS = {
    "one sequence": [150],
    "sequences that cross blocks": [3, 61, 40, 30],
    "sequences that end with blocks": [16, 48, 64],
    "padding at the end": [20, 20],
    "only padding": [],
}
LENGTH = 150


def packed(lengths: list[int], rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """positions, segment_ids [rows, LENGTH]; odd rows hold the sequences in reverse order."""
    positions, segments = np.zeros((2, rows, LENGTH), np.int32)
    for row in range(rows):
        start = 0
        for number, length in enumerate(lengths if row % 2 == 0 else lengths[::-1], 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return positions, segments


def plain(q, k, v, positions, segments, scale, window=0, sinks=None):
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.asarray(x, float), repeats, axis=2) for x in (k, v))
    scores = np.einsum("rlhd,rmhd->rhlm", np.asarray(q, float), k) * scale
    seen = (segments[:, :, None] == segments[:, None]) & (positions[:, :, None] >= positions[:, None])
    if window:
        seen &= positions[:, :, None] - positions[:, None] < window
    top = scores.max(-1, keepdims=True)
    weights = np.where(seen[:, None], np.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, float)[:, None, None] - top)
    return np.einsum("rhlm,rmhd->rlhd", weights / total, v)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(params=[16, 64, 256], ids=lambda size: f"blocks of {size}")
def blocks(request, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_exact_and_so_is_its_gradient(layout, blocks):
    check_exact(LAYOUTS[layout])


@pytest.mark.parametrize(("window", "has_sinks"), [(1, False), (17, False), (40, True), (0, True)])
def test_windows_and_sinks_are_exact_and_so_are_their_gradients(window, has_sinks, blocks):
    """A window counts the token itself; a sink takes part in the softmax and has no value."""
    check_exact(LAYOUTS["sequences that cross blocks"], window, random(4, seed=9) if has_sinks else None)


def check_exact(lengths, window=0, sinks=None):
    positions, segments = packed(lengths)
    reference = partial(plain, positions=positions, segments=segments, scale=0.3, window=window, sinks=sinks)
    q, k, v = random(2, LENGTH, 4, 8), random(2, LENGTH, 2, 8, seed=1), random(2, LENGTH, 2, 6, seed=2)
    direction = random(2, LENGTH, 4, 6, seed=3) * (segments > 0)[..., None, None]

    def value(q, k, v):
        attend = PackedAttention(jnp.asarray(positions), jnp.asarray(segments))
        out, _ = attend((), jnp.int32(0), q, k, v, 0.3, window=window, sinks=sinks)
        return (out * direction).sum(), out

    gradients, out = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    valid = segments > 0
    np.testing.assert_allclose(out[valid], reference(q, k, v)[valid], atol=1e-5)
    rng, step = np.random.default_rng(4), 1e-5
    for index, gradient in enumerate(gradients):
        shift = rng.standard_normal(gradient.shape)
        moved = [np.asarray(x, float) for x in (q, k, v)]
        totals = []
        for sign in (1, -1):
            arguments = [x + sign * step * shift if i == index else x for i, x in enumerate(moved)]
            totals.append((reference(*arguments) * np.asarray(direction)).sum())
        expected = (totals[0] - totals[1]) / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient, float) * shift).sum(), expected, rtol=1e-3, atol=1e-3)


def test_values_may_be_the_first_features_of_the_keys(blocks):
    """Multi-head latent attention with absorbed projections: one key head, and no values of their own."""
    positions, segments = packed([100, 50])
    q, k = random(2, LENGTH, 4, 8), random(2, LENGTH, 1, 8, seed=1)
    attend = PackedAttention(jnp.asarray(positions), jnp.asarray(segments))
    out, _ = attend((), jnp.int32(0), q, k, None, 0.3, v_features=5)
    np.testing.assert_allclose(out, plain(q, k, k[..., :5], positions, segments, 0.3), atol=1e-5)


def test_a_row_keeps_its_bits_whatever_its_neighbour_is(blocks):
    positions, segments = packed(LAYOUTS["sequences that cross blocks"])
    q, k, v = random(2, LENGTH, 4, 8), random(2, LENGTH, 2, 8, seed=1), random(2, LENGTH, 2, 8, seed=2)

    @jax.jit
    def run(q, k, v, positions, segments):
        attend = PackedAttention(positions, segments)
        out, pullback = jax.vjp(lambda *qkv: attend((), jnp.int32(0), *qkv, 0.3)[0], q, k, v)
        return out, *pullback(out)

    alone = run(q, k, v, positions, segments)
    other_positions, other_segments = positions.copy(), segments.copy()
    other_positions[1], other_segments[1] = np.arange(LENGTH), 1
    hostile = [x.at[1].set(jnp.nan) for x in (q, k, v)]
    beside = run(*hostile, other_positions, other_segments)
    for one, other in zip(alone, beside, strict=True):
        assert (one[0] == other[0]).all()
