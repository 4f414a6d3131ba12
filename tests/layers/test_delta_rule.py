"""The gated delta rule in chunks against the recurrence that it is, token by token in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers import cpu, delta_rule
from tx_async.layers.delta_rule import Chunks, ChunkTransition, Inputs

H, DK, DV, LENGTH = 2, 4, 6, 150
LAYOUTS = {
    "one sequence": [150],
    "borders inside of chunks": [3, 61, 40, 30],
    "borders at chunks": [64, 64, 22],
    "sequences of one token": [1, 1, 1, 90],
}


def segments_of(lengths: list[int]) -> np.ndarray:
    """[1, LENGTH]; 0 is padding."""
    numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(numbers, (0, LENGTH - len(numbers))).astype(np.int32)[None]


def random_inputs(length: int = LENGTH, rows: int = 1, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((rows, length, H, DK)) for _ in "qk")
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((rows, length, H, DV))
    g, beta = -rng.exponential(0.1, (rows, length, H)), rng.uniform(size=(rows, length, H))
    return Inputs(*(x.astype(np.float32) for x in (q, k, v, g, beta)))


def sequential(x: Inputs, segments: np.ndarray, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """-> (o [R, L, H, dv], the last state [R, H, dk, dv])."""
    q, k, v, g, beta = (np.asarray(y, np.float64) for y in x)
    out, states = np.zeros(v.shape), []
    for r in range(len(q)):
        held, segment = (np.zeros((H, DK, DV)), None) if state is None else (state[r].copy(), segments[r, 0])
        for t in range(q.shape[1]):
            if segments[r, t] != segment:
                held, segment = np.zeros((H, DK, DV)), segments[r, t]
            held = held * np.exp(g[r, t])[:, None, None]
            u = beta[r, t][:, None] * (v[r, t] - np.einsum("hkv,hk->hv", held, k[r, t]))
            held = held + np.einsum("hk,hv->hkv", k[r, t], u)
            out[r, t] = np.einsum("hkv,hk->hv", held, q[r, t])
        states.append(held)
    return out, np.stack(states)


def one_step(x: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    write, out = delta_rule.step(x, state)
    return write(state), out


@pytest.mark.parametrize("chunks", [Chunks(), Chunks(32, keeps_states=True)], ids=["64", "32, kept"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_are_exact_and_so_are_their_gradients(layout, chunks):
    x, segments = random_inputs(), segments_of(LAYOUTS[layout])
    valid = segments > 0
    direction = np.random.default_rng(1).standard_normal((1, LENGTH, H, DV)) * valid[..., None, None]

    def value(x):
        out = delta_rule.packed(x, jnp.asarray(segments), chunks)
        return (out * direction).sum(), out

    gradients, out = jax.jit(jax.grad(value, has_aux=True))(x)
    np.testing.assert_allclose(out[valid], sequential(x, segments)[0][valid], atol=1e-5)
    step, rng = 1e-5, np.random.default_rng(2)
    for index, gradient in enumerate(gradients):
        shift = rng.standard_normal(gradient.shape)
        totals = []
        for sign in (1, -1):
            moved = [np.float64(y) + (sign * step * shift if i == index else 0) for i, y in enumerate(x)]
            totals.append((sequential(Inputs(*moved), segments)[0] * direction).sum())
        expected = (totals[0] - totals[1]) / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * shift).sum(), expected, rtol=1e-3, atol=1e-3)


def test_a_segment_keeps_its_bits_whatever_its_neighbours_in_the_row_are():
    """What stands before it in its chunk takes part in sums as exact zeros."""
    segments = segments_of([30, 50, 70])
    run = jax.jit(jax.grad(lambda x, segments: (delta_rule.packed(x, segments)[:, 30:80] ** 2).sum()))
    one, other = random_inputs(), random_inputs(seed=5)
    mine = np.zeros(LENGTH, bool)
    mine[30:80] = True
    beside = Inputs(
        *(np.where(mine.reshape(1, -1, *[1] * (a.ndim - 2)), a, 3 * b) for a, b in zip(one, other, strict=True))
    )
    beside = beside._replace(g=-np.abs(beside.g))
    for a, b in zip(run(one, segments), run(beside, segments), strict=True):
        np.testing.assert_array_equal(a[:, mine], b[:, mine])


def test_a_chunk_and_single_steps_go_on_from_a_state():
    x, state = random_inputs(20, rows=3), np.random.default_rng(7).standard_normal((3, H, DK, DV))
    same = np.zeros((3, 20), np.int32)
    expected, last = sequential(x, same, state)
    found, out = ChunkTransition.of(x, jnp.asarray(same), jnp.zeros(3, jnp.int32))(jnp.asarray(state, jnp.float32))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(found, last, atol=1e-5)
    step, held = jax.jit(one_step), jnp.asarray(state, jnp.float32)
    for t in range(20):
        held, out = step(Inputs(*(y[:, t : t + 1] for y in x)), held)
        np.testing.assert_allclose(out[:, 0], expected[:, t], atol=1e-5)


def test_rows_written_one_by_one_into_their_slots_have_the_bits_of_all_at_once():
    """And no other slot changes, though unused rows share one."""
    x, rng = random_inputs(1, rows=4), np.random.default_rng(3)
    pool, slots = jnp.asarray(rng.standard_normal((7, H, DK, DV)), jnp.float32), jnp.array([5, 0, 2, 0])

    @jax.jit
    def both(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        write, _ = delta_rule.step(x, pool[slots])
        return cpu.written_row_by_row(pool, slots, write, pool[slots]), write(pool[slots])

    after, states = both(pool)
    np.testing.assert_array_equal(after[slots[:3]], states[jnp.array([0, 3, 2])])
    others = np.array([1, 3, 4, 6])
    np.testing.assert_array_equal(after[others], pool[others])


def test_memory_of_the_backward_pass_grows_with_the_tokens():
    """Not with their square: twice the tokens take about twice of it."""

    def temporaries(length: int) -> int:
        shape = jax.tree.map(lambda y: jax.ShapeDtypeStruct((1, length, *y.shape[2:]), jnp.float32), random_inputs())
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = jax.grad(lambda x, segments: delta_rule.packed(x, segments).sum())
        return jax.jit(loss).lower(shape, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)
