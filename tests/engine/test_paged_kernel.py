"""The kernel, interpreted on a CPU, gives what the plain version gives: any lengths, tables, groups and layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine import paged_kernel
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import DecodeAttention

LAYOUT = CacheLayout.plan(cache_tokens=1600, page_size=16, max_context_length=512)


def case(rows: int, kv_heads: int, group: int, features: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    pools = {
        name: rng.standard_normal((2 * LAYOUT.num_pages, 16, kv_heads, features)).astype(np.float32) for name in "kv"
    }
    pages = rng.permutation(np.arange(1, LAYOUT.num_pages))[: rows * 12].reshape(rows, 12)
    tables = np.zeros((rows, LAYOUT.table_pages), np.int32)
    tables[:, :12] = pages
    positions = rng.integers(0, 12 * 16, rows).astype(np.int32)
    q = rng.standard_normal((rows, kv_heads * group, features)).astype(np.float32)
    return q, pools, tables, positions


@partial(jax.jit, static_argnames="window")
def kernel(q, pools, tables, positions, layer, window=0):
    first = layer * LAYOUT.num_pages
    return paged_kernel.attend(q, pools["k"], pools["v"], tables, positions, first, 0.3, window, interpret=True)


@partial(jax.jit, static_argnames="window")
def plain(q, pools, tables, positions, layer, window):
    attend = DecodeAttention(LAYOUT, tables, positions[:, None], jnp.ones(len(q), bool))
    return attend.attend([pools["k"], pools["v"]], layer, q[:, None], 0.3, 0, window)[:, 0]


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "features", "window"),
    [(3, 2, 4, 32, 0), (1, 2, 1, 64, 0), (4, 1, 16, 16, 0), (3, 2, 2, 16, 40)],
)
def test_the_kernel_is_the_plain_attention(rows, kv_heads, group, features, window):
    arguments = case(rows, kv_heads, group, features)
    for layer in np.arange(2, dtype=np.int32):
        found, expected = (of(*arguments, layer, window=window) for of in (kernel, plain))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_what_stands_behind_a_row_or_in_other_pages_changes_nothing():
    q, pools, tables, _ = case(3, 2, 4, 32)
    positions = np.array([5, 70, 150], np.int32)
    run = lambda pools: kernel(q, pools, tables, positions, np.int32(0))  # noqa: E731
    used = np.zeros((2 * LAYOUT.num_pages, 16), bool)
    for row, position in enumerate(positions):
        for token in range(position + 1):
            used[tables[row, token // 16], token % 16] = True
    other = {name: np.where(used[:, :, None, None], pool, np.float32(1e4)) for name, pool in pools.items()}
    np.testing.assert_array_equal(run(pools), run(other))


def test_a_long_row_alone_is_split_and_many_rows_are_not():
    assert paged_kernel._splits(num_programs=8, tokens=40_960) == 32
    assert paged_kernel._splits(num_programs=1024, tokens=40_960) == 1
    assert paged_kernel._splits(num_programs=8, tokens=64) == 1


def test_features_that_are_no_power_of_two_and_fp32_keep_the_plain_way():
    assert paged_kernel.fits(jnp.zeros((1, 16, 1, 128), jnp.bfloat16), 16)
    assert not paged_kernel.fits(jnp.zeros((1, 16, 1, 576), jnp.bfloat16), 16)
    assert not paged_kernel.fits(jnp.zeros((1, 16, 1, 128)), 16)
