"""Packed attention against plain softmax attention over the whole row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


blocks = pytest.mark.parametrize("block", [16, 64, 256], ids=lambda size: f"blocks of {size}")


@partial(jax.jit, static_argnames=("block", "window"))
@partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
def gradients_and_output(q, k, v, positions, segments, direction, sinks, block, window):
    """One program for all layouts: where sequences lie is data."""
    attend = PackedAttention(positions, segments, block)
    out, _ = attend((), jnp.int32(0), q, k, v, 0.3, window=window, sinks=sinks)
    return (out * direction).sum(), out


@blocks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_exact_and_so_is_its_gradient(layout, block):
    check_exact(LAYOUTS[layout], block)


@blocks
@pytest.mark.parametrize(("window", "has_sinks"), [(1, False), (17, False), (40, True), (0, True)])
def test_windows_and_sinks_are_exact_and_so_are_their_gradients(window, has_sinks, block):
    """A window counts the token itself; a sink takes part in the softmax and has no value."""
    check_exact(LAYOUTS["sequences that cross blocks"], block, window, random(4, seed=9) if has_sinks else None)


def check_exact(lengths, block, window=0, sinks=None):
    positions, segments = packed(lengths)
    reference = partial(plain, positions=positions, segments=segments, scale=0.3, window=window, sinks=sinks)
    q, k, v = random(2, LENGTH, 4, 8), random(2, LENGTH, 2, 8, seed=1), random(2, LENGTH, 2, 6, seed=2)
    direction = random(2, LENGTH, 4, 6, seed=3) * (segments > 0)[..., None, None]

    gradients, out = gradients_and_output(q, k, v, positions, segments, direction, sinks, block, window)
    valid = segments > 0
    np.testing.assert_allclose(np.asarray(out)[valid], reference(q, k, v)[valid], atol=1e-5)
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


@blocks
def test_values_may_be_the_first_features_of_the_keys(block):
    """Multi-head latent attention with absorbed projections: one key head, and no values of their own."""
    positions, segments = packed([100, 50])
    q, k = random(2, LENGTH, 4, 8), random(2, LENGTH, 1, 8, seed=1)

    @jax.jit
    def run(q, k, positions, segments):
        return PackedAttention(positions, segments, block)((), jnp.int32(0), q, k, None, 0.3, v_features=5)[0]

    out = run(q, k, positions, segments)
    np.testing.assert_allclose(out, plain(q, k, k[..., :5], positions, segments, 0.3), atol=1e-5)


@blocks
def test_a_row_keeps_its_bits_whatever_its_neighbour_is(block):
    positions, segments = packed(LAYOUTS["sequences that cross blocks"])
    q, k, v = random(2, LENGTH, 4, 8), random(2, LENGTH, 2, 8, seed=1), random(2, LENGTH, 2, 8, seed=2)

    @jax.jit
    def run(q, k, v, positions, segments):
        attend = PackedAttention(positions, segments, block)
        out, pullback = jax.vjp(lambda *qkv: attend((), jnp.int32(0), *qkv, 0.3)[0], q, k, v)
        return out, *pullback(out)

    alone = run(q, k, v, positions, segments)
    other_positions, other_segments = positions.copy(), segments.copy()
    other_positions[1], other_segments[1] = np.arange(LENGTH), 1
    hostile = [np.stack([x[0], np.full_like(x[1], np.nan)]) for x in (q, k, v)]
    beside = run(*hostile, other_positions, other_segments)
    for one, other in zip(alone, beside, strict=True):
        assert (np.asarray(one)[0] == np.asarray(other)[0]).all()
