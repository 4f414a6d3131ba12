"""The kernels, interpreted on a CPU, give what `packed_attention` gives: outputs and gradients of any packing, window,
sinks and width of heads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers import flash_attention as flash
from tx_async.layers.attention import packed_attention
from tx_async.layers.flash_attention import BLOCK, _row, fits, flash_attention

LENGTH = 4 * BLOCK


def packed(*rows: list[int]) -> tuple[jax.Array, jax.Array]:
    """(positions, segments) [R, LENGTH] of rows of sequences of these lengths; the rest is padding."""
    positions, segments = np.zeros((2, len(rows), LENGTH), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return jnp.asarray(positions), jnp.asarray(segments)


def arrays(rows: int, heads: int, kv_heads: int, features: int, values: int = 0) -> list[jax.Array]:
    """q, k, v, a direction of the output."""
    rng = np.random.default_rng(0)
    sizes = ((heads, features), (kv_heads, features), (kv_heads, values or features), (heads, values or features))
    return [jnp.asarray(rng.standard_normal((rows, LENGTH, *size)), jnp.float32) for size in sizes]


LONG_AND_SHORT = [LENGTH], [10, 100, 90]
ON_BORDERS = [64, 64, 64], [1, 2, 3, 200, 30]


def compare(rows: tuple[list[int], ...], inputs: list[jax.Array], window: int = 0, sinks: bool = False) -> None:
    positions, segments = packed(*rows)
    q, k, v, direction = inputs
    direction = direction * (segments > 0)[..., None, None]
    logits = jnp.linspace(-3.0, 4.0, q.shape[2]) if sinks else None

    def of(attend):
        def summed(q, k, v):
            return (attend(q, k, v, logits, positions, segments, 0.3, window) * direction).sum()

        return jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2)))(q, k, v)

    expected, found = of(partial(packed_attention, block=BLOCK)), of(partial(flash_attention, interpret=True))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("rows", [LONG_AND_SHORT, ON_BORDERS], ids=["long and short", "on borders"])
def test_outputs_and_gradients_are_those_of_the_plain_version(rows):
    compare(rows, arrays(2, 4, 2, 16))


@pytest.mark.parametrize("window", [1, 65])
def test_a_window_sees_no_further_back(window):
    compare(LONG_AND_SHORT, arrays(2, 2, 1, 16), window)


def test_a_sink_takes_its_share_of_each_heads_weights():
    compare(ON_BORDERS, arrays(2, 4, 2, 16), window=70, sinks=True)


def test_heads_of_no_power_of_two_and_values_of_another_width():
    compare(LONG_AND_SHORT[1:], arrays(1, 2, 1, 80, 48))


def test_gradients_of_a_long_row_come_for_some_heads_at_a_time(monkeypatch):
    q, k, v, direction = arrays(1, 8, 4, 16)
    packing = packed([100, 90])

    def gradients() -> tuple[jax.Array, ...]:
        return jax.vjp(lambda q, k, v: flash_attention(q, k, v, None, *packing, 0.3, 0, True), q, k, v)[1](direction)

    together = gradients()
    monkeypatch.setattr(flash, "PART_BYTES", 4 * q.size // 2)
    assert flash._parts(q, v) == 2
    for ours, theirs in zip(gradients(), together, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_between_segments_are_skipped_in_both_directions():
    row = _row(*packed([70, 186], [LENGTH]), 0)
    np.testing.assert_array_equal(row.first, [[0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(row.last, [[1, 3, 3, 3], [3, 3, 3, 3]])


@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 128, 130])
def test_exactly_the_blocks_that_a_window_reaches_are_read(window):
    positions, segments = packed([70, 186], [LENGTH], [20, 30, 150])
    row = _row(positions, segments, window)
    ours, theirs = positions[:, :, None], positions[:, None, :]
    sees = (segments[:, :, None] == segments[:, None, :]) & (ours >= theirs) & (ours - theirs < window)
    needed = np.asarray(sees & (segments > 0)[:, :, None]).reshape(3, 4, BLOCK, 4, BLOCK).any((2, 4))
    needed |= np.eye(4, dtype=bool)  # a block of padding sees itself
    numbers = np.arange(4)
    first, last = np.asarray(row.first)[:, :, None], np.asarray(row.last)[:, None, :]
    np.testing.assert_array_equal((numbers >= first) & (numbers <= numbers[:, None]), needed)
    np.testing.assert_array_equal((numbers[:, None] <= last) & (numbers <= numbers[:, None]), needed)


def test_what_the_kernels_cannot_do_keeps_the_plain_way():
    of = lambda features, dtype=jnp.bfloat16, length=LENGTH: jax.ShapeDtypeStruct((1, length, 2, features), dtype)  # noqa: E731
    for features, values in ((64, 64), (96, 96), (192, 128), (256, 256)):
        assert fits(of(features), of(values))
    assert not fits(of(24), of(24)) and not fits(of(128), of(24)), "Triton multiplies 16 features or more"
    assert not fits(of(320), of(128)) and not fits(of(128), of(320)), "too wide for shared memory"
    assert not fits(of(128, jnp.float32), of(128, jnp.float32))
    assert not fits(of(128, length=100), of(128, length=100))
