"""The kernels, interpreted on a CPU, give what `packed_attention` gives: outputs and gradients of any packing."""

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


def arrays(rows: int, heads: int, kv_heads: int, features: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, n, features) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    "rows", [([LENGTH], [10, 100, 90]), ([64, 64, 64], [1, 2, 3, 200, 30])], ids=["long and short", "on borders"]
)
def test_outputs_and_gradients_are_those_of_the_plain_version(rows):
    positions, segments = packed(*rows)
    q, k, v, direction = arrays(len(rows), 4, 2, 16)
    direction = direction * (segments > 0)[..., None, None]

    def of(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * direction).sum(), argnums=(0, 1, 2)))

    plain = of(lambda q, k, v: packed_attention(q, k, v, None, positions, segments, 0.3, 0, BLOCK))
    kernel = of(lambda q, k, v: flash_attention(q, k, v, positions, segments, 0.3, True))
    expected, found = plain(q, k, v), kernel(q, k, v)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


def test_gradients_of_a_long_row_come_for_some_heads_at_a_time(monkeypatch):
    q, k, v, direction = arrays(1, 8, 4, 16)
    packing = packed([100, 90])

    def gradients() -> tuple[jax.Array, ...]:
        return jax.vjp(lambda q, k, v: flash_attention(q, k, v, *packing, 0.3, True), q, k, v)[1](direction)

    together = gradients()
    monkeypatch.setattr(flash, "PART_BYTES", 4 * q.size // 2)
    assert flash._parts(q, k) == 2
    for ours, theirs in zip(gradients(), together, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_between_segments_are_skipped_in_both_directions():
    row = _row(*packed([70, 186], [LENGTH]))
    np.testing.assert_array_equal(row.first, [[0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(row.last, [[1, 3, 3, 3], [3, 3, 3, 3]])


def test_what_the_kernels_cannot_do_keeps_the_plain_way():
    of = lambda features, dtype, length=LENGTH: jax.ShapeDtypeStruct((1, length, 2, features), dtype)  # noqa: E731
    good = of(128, jnp.bfloat16)
    assert fits(good, good)
    assert not fits(of(192, jnp.bfloat16), of(128, jnp.bfloat16))  # latent attention
    assert not fits(of(128, jnp.float32), of(128, jnp.float32))
    assert not fits(of(128, jnp.bfloat16, 100), of(128, jnp.bfloat16, 100))
