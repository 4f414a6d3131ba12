"""The kernel of a prefill, interpreted on a CPU, gives what the plain version gives: any starts, tables, groups,
layers, windows, sinks and latents."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine import prefill_kernel
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import PagedAttention

LAYOUT = CacheLayout.plan(cache_tokens=1600, page_size=16, max_context_length=512)
TILE = 32
STARTS = jnp.array([0, 160, 496, 64], jnp.int32)
"""The third row's tile goes on behind its table; the fourth row is not alive."""
ALIVE = jnp.array([True, True, True, False])


def case(kv_heads: int, group: int, features: int, dtype=jnp.float32, latent: bool = False):
    rng = np.random.default_rng(0)
    shape = (2 * LAYOUT.num_pages, 16, kv_heads, features)
    pools = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name in ("k" if latent else "kv")}
    tables = np.zeros((4, LAYOUT.table_pages), np.int32)
    tables[:3] = rng.permutation(np.arange(1, LAYOUT.num_pages))[: 3 * LAYOUT.table_pages].reshape(3, -1)
    q = jnp.asarray(rng.standard_normal((4, TILE, kv_heads * group, features)), dtype)
    sinks = jnp.asarray(2 * rng.standard_normal(kv_heads * group), jnp.float32)
    return q, pools, jnp.asarray(tables), sinks


def plain_attention(tables, kernel: bool = False) -> PagedAttention:
    return PagedAttention(LAYOUT, tables, STARTS[:, None] + jnp.arange(TILE), ALIVE, kernel=kernel)


@pytest.mark.parametrize(
    ("kv_heads", "group", "features", "window", "has_sinks", "block", "values"),
    [(2, 4, 32, 0, False, 128, 0), (1, 3, 16, 40, True, 16, 0), (1, 3, 48, 0, False, 16, 32)],
)
def test_the_kernel_is_the_plain_attention(kv_heads, group, features, window, has_sinks, block, values, monkeypatch):
    monkeypatch.setattr(prefill_kernel, "BLOCK_QUERIES", block)
    q, pools, tables, sinks = case(kv_heads, group, features, latent=bool(values))
    pools, sinks = list(pools.values()), sinks if has_sinks else None
    expected = plain_attention(tables).attend(pools, jnp.int32(1), q, 0.3, values, window, sinks)
    where = tables, jnp.where(ALIVE, STARTS, -TILE), jnp.int32(LAYOUT.num_pages)
    options = {"scale": 0.3, "window": window, "v_features": values, "interpret": True}
    found = prefill_kernel.attend(q, pools, *where, sinks, **options)
    np.testing.assert_allclose(found[:2], expected[:2], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[2, :16], expected[2, :16], rtol=2e-5, atol=2e-6)
    assert np.isfinite(found).all() and not found[3].any()


def test_what_stands_behind_a_row_or_in_other_pages_changes_nothing():
    q, pools, tables, _ = case(1, 2, 16)
    starts = jnp.array([0, 48, -TILE, -TILE], jnp.int32)
    run = lambda pools: prefill_kernel.attend(  # noqa: E731
        q, list(pools.values()), tables, starts, jnp.int32(0), scale=0.3, interpret=True
    )
    used = np.zeros((2 * LAYOUT.num_pages, 16), bool)
    for row, stop in enumerate((TILE, 48 + TILE)):
        used[tables[row, : stop // 16]] = True
    other = {name: jnp.where(used[:, :, None, None], pool, 1e4) for name, pool in pools.items()}
    np.testing.assert_array_equal(run(pools), run(other))


def test_a_prefill_runs_in_the_kernel_where_it_can(monkeypatch):
    q, pools, tables, sinks = case(2, 2, 64, jnp.bfloat16)
    k, v = q[:, :, :2], q[:, :, 2:]
    calls = []

    def interpreted(*inputs, **options):
        calls.append(inputs)
        return attend(*inputs, **options)

    attend = partial(prefill_kernel.attend, interpret=True)
    monkeypatch.setattr(prefill_kernel, "attend", interpreted)
    inputs = pools, jnp.int32(1), q, k, v, 0.1
    plain, cache = plain_attention(tables)(*inputs, sinks=sinks)
    assert not calls
    out, cache_too = plain_attention(tables, kernel=True)(*inputs, sinks=sinks)
    assert len(calls) == 1
    np.testing.assert_allclose(out[:2].astype(jnp.float32), plain[:2].astype(jnp.float32), atol=2e-2)
    assert all((cache[name] == cache_too[name]).all() for name in "kv")
    latents = {"k": pools["k"][:, :, :1]}
    plain_attention(tables, kernel=True)(latents, jnp.int32(1), q, k[:, :, :1], None, 0.1, v_features=32)
    assert len(calls) == 2


def test_what_does_not_fit_keeps_the_plain_way():
    fits = lambda length, features, dtype=jnp.bfloat16: prefill_kernel.fits(  # noqa: E731
        jnp.zeros((1, length, 2, features), dtype), jnp.zeros((1, 16, 1, features), dtype), 16
    )
    assert fits(128, 128) and fits(16, 256)
    assert not fits(128, 96) and not fits(96, 128) and not fits(8, 128)
    assert not fits(128, 128, jnp.float32)
