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


def case(rows: int, kv_heads: int, group: int, features: int, latent: bool = False):
    """latent: there is one pool, whose features are more than a power of two."""
    rng = np.random.default_rng(0)
    features += 16 if latent else 0
    shape = (2 * LAYOUT.num_pages, 16, kv_heads, features)
    pools = [rng.standard_normal(shape).astype(np.float32) for _ in range(1 if latent else 2)]
    tables = np.zeros((rows, LAYOUT.table_pages), np.int32)
    tables[:, :12] = rng.permutation(np.arange(1, LAYOUT.num_pages))[: rows * 12].reshape(rows, 12)
    positions = rng.integers(0, 12 * 16, rows).astype(np.int32)
    q = rng.standard_normal((rows, kv_heads * group, features)).astype(np.float32)
    return q, pools, tables, positions


@partial(jax.jit, static_argnames=("window", "v_features"))
def kernel(q, pools, tables, positions, layer, sinks=None, window=0, v_features=0):
    where = tables, positions, layer * LAYOUT.num_pages
    options = {"scale": 0.3, "window": window, "v_features": v_features, "interpret": True}
    return paged_kernel.attend(q, pools, *where, sinks, **options)


@partial(jax.jit, static_argnames=("window", "v_features"))
def plain(q, pools, tables, positions, layer, sinks=None, window=0, v_features=0):
    attend = DecodeAttention(LAYOUT, tables, positions[:, None], jnp.ones(len(q), bool))
    return attend.attend(pools, layer, q[:, None], 0.3, v_features, window, sinks)[:, 0]


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "features", "window", "has_sinks", "latent"),
    [
        (3, 2, 4, 32, 0, False, False),
        (1, 2, 1, 64, 0, True, False),
        (4, 1, 16, 16, 0, False, False),
        (3, 2, 3, 16, 40, True, False),
        (3, 1, 4, 32, 0, False, True),
        (2, 1, 80, 16, 0, False, True),  # more heads than one program takes
    ],
)
def test_the_kernel_is_the_plain_attention(rows, kv_heads, group, features, window, has_sinks, latent):
    q, pools, tables, positions = case(rows, kv_heads, group, features, latent)
    sinks = jnp.linspace(-2, 6, kv_heads * group) if has_sinks else None
    options = {"window": window, "v_features": features if latent else 0}
    for layer in np.arange(2, dtype=np.int32):
        found, expected = (of(q, pools, tables, positions, layer, sinks, **options) for of in (kernel, plain))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("latent", [False, True])
def test_what_stands_behind_a_row_or_in_other_pages_changes_nothing(latent):
    q, pools, tables, _ = case(3, 1 if latent else 2, 4, 32, latent)
    positions = np.array([5, 70, 150], np.int32)
    sinks = jnp.ones(q.shape[1])
    run = lambda pools: kernel(q, pools, tables, positions, np.int32(0), sinks, v_features=32 * latent)  # noqa: E731
    mine, used = np.zeros((2, 2 * LAYOUT.num_pages, 16), bool)
    mine[0] = mine[tables] = True  # the null page is everybody's
    for row, position in enumerate(positions):
        for token in range(position + 1):
            used[tables[row, token // 16], token % 16] = True
    garbage = np.where(mine, np.float32(1e4), np.float32(np.nan))[:, :, None, None]
    np.testing.assert_array_equal(run(pools), run([np.where(used[:, :, None, None], x, garbage) for x in pools]))


def test_a_row_of_nan_stays_alone():
    q, pools, tables, positions = map(jax.tree.map, [jnp.asarray] * 4, case(3, 1, 4, 32, latent=True))
    attend = DecodeAttention(LAYOUT, tables, positions[:, None], jnp.ones(3, bool))
    q = q.at[1].set(jnp.nan)
    written = attend.write(pools[0], jnp.int32(0), q[:, None, :1], 0)
    out = np.asarray(kernel(q, [written], tables, positions, jnp.int32(0), v_features=32))
    assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()


def test_a_long_row_alone_is_split_and_many_rows_are_not():
    assert paged_kernel._splits(num_programs=8, blocks=640) == 32
    assert paged_kernel._splits(num_programs=1024, blocks=640) == 1
    assert paged_kernel._splits(num_programs=8, blocks=1) == 1


def test_features_that_are_no_power_of_two_and_fp32_keep_the_plain_way():
    fits = lambda features, values=0, dtype=jnp.bfloat16, page_size=16: paged_kernel.fits(  # noqa: E731
        jnp.zeros((1, page_size, 1, features), dtype), page_size, values
    )
    assert fits(128) and fits(576, 512) and fits(320, 256)
    assert not fits(576) and not fits(512) and not fits(520, 512) and not fits(1088, 1024) and not fits(160, 96)
    assert not fits(128, dtype=jnp.float32) and not fits(576, 512, jnp.float32)
    assert fits(128, page_size=64) and not fits(576, 512, page_size=64)
