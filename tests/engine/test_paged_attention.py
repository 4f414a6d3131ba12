"""Attention over pages is attention; whose pages they are, and what lies beside them, cannot be seen."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import DecodeAttention, PagedAttention
from tx_async.engine.paging import Paging

LAYOUT = CacheLayout.plan(cache_tokens=1000, page_size=16, max_context_length=200, paging=Paging.of({0: 2}))
LAYER = np.int32(1)


class Model:
    window_layers: ClassVar[dict] = {0: 2}
    state_layers = 0
    state_shapes: ClassVar[dict] = {}

    def __init__(self, kv_heads=2, features=8, shared=False):
        self.cache_shapes = {"k": (kv_heads, features)} if shared else {n: (kv_heads, features) for n in "kv"}


@partial(jax.jit, static_argnames=("kind", "v_features", "window"))
def attended(kind, tables, positions, alive, pools, q, k, v, v_features=0, window=0, sinks=None):
    """-> (what the layer's attention gives, the pools after it)."""
    attend = kind(LAYOUT, tables, positions, alive)
    return attend(pools, LAYER, q, k, v, 0.3, v_features, window, sinks)


def dense(q, k, v, scale, window=0, sinks=None):
    """q [L, H, D] at the last L positions of k, v [T, Hkv, D]: softmax attention in float64."""
    L, H, _ = q.shape
    T, groups = len(k), H // k.shape[1]
    out = np.zeros((L, H, v.shape[-1]))
    for i in range(L):
        for h in range(H):
            stop = T - L + i + 1
            seen = slice(max(0, stop - window) if window else 0, stop)
            scores = k[seen, h // groups].astype(np.float64) @ q[i, h] * scale
            weights = np.exp(scores - scores.max())
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h]) - scores.max()))
            out[i, h] = (weights / total) @ v[seen, h // groups]
    return out


def filled_pools(model, contents, fill=0.0):
    """Pools in which sequence i has `contents[i]` [T, Hkv, D] (k, v) on pages of its own; elsewhere is `fill`."""
    pools = {name: np.full(p.shape, fill, np.float32) for name, p in LAYOUT.new_pools(model, jnp.float32).items()}
    tables = np.zeros((len(contents), LAYOUT.table_pages), np.int32)
    free = iter(np.random.default_rng(0).permutation(np.arange(1, LAYOUT.num_pages)))
    for row, arrays in enumerate(contents):
        num_pages = LAYOUT.pages_for(len(arrays[0]))
        tables[row, :num_pages] = [next(free) for _ in range(num_pages)]
        for pool, array in zip(pools.values(), arrays, strict=True):
            for position, value in enumerate(array):
                page = tables[row, position // 16] + int(LAYER) * LAYOUT.num_pages
                pool[page, position % 16] = value
    return pools, tables


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
def test_decode_attends_to_all_that_came_before(kv_heads):
    rng = np.random.default_rng(kv_heads)
    model, lengths = Model(kv_heads), [1, 16, 17, 64, 65, 130]
    contents = [rng.standard_normal((2, n, kv_heads, 8)).astype(np.float32) for n in lengths]
    pools, tables = filled_pools(model, contents)
    q = rng.standard_normal((6, 1, 16, 8)).astype(np.float32)
    position = np.array(lengths)[:, None] - 1
    k, v = (np.stack([c[i, -1:] for c in contents]) for i in (0, 1))
    out, new = jax.device_get(attended(DecodeAttention, tables, position, np.ones(6, bool), pools, q, k, v))
    for row, c in enumerate(contents):
        assert np.allclose(out[row], dense(q[row], c[0], c[1], 0.3), atol=1e-5)
    assert all((new[name] == pools[name]).all() for name in pools)


@pytest.mark.parametrize(("window", "has_sinks"), [(1, False), (20, True), (100, False), (0, True)])
def test_decode_sees_a_window_and_sinks(window, has_sinks):
    rng = np.random.default_rng(window)
    lengths, sinks = [1, 16, 65, 190], rng.standard_normal(4) if has_sinks else None
    contents = [rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in lengths]
    pools, tables = filled_pools(Model(), contents)
    q = rng.standard_normal((4, 1, 4, 8)).astype(np.float32)
    position = np.array(lengths)[:, None] - 1
    k, v = (np.stack([c[i, -1:] for c in contents]) for i in (0, 1))
    given = None if sinks is None else sinks.astype(np.float32)
    out, _ = attended(DecodeAttention, tables, position, np.ones(4, bool), pools, q, k, v, window=window, sinks=given)
    for row, c in enumerate(contents):
        assert np.allclose(out[row], dense(q[row], c[0], c[1], 0.3, window, sinks), atol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_prefill_in_tiles_attends_to_the_tiles_before_it(window):
    """Three rows are one prompt of 40 tokens behind a cached page; one is another's."""
    rng = np.random.default_rng(1)
    model = Model()
    one, other = (rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (56, 16))
    pools, tables = filled_pools(model, [one, other], fill=1e30)
    rows = np.array([0, 0, 0, 1])
    positions = np.array([16, 32, 48, 0])[:, None] + np.arange(16)
    q = rng.standard_normal((4, 16, 4, 8)).astype(np.float32)
    k, v = (np.zeros((4, 16, 2, 8), np.float32) for _ in "kv")
    for row, (sequence, first) in enumerate([(one, 16), (one, 32), (one, 48), (other, 0)]):
        for target, source in ((k, sequence[0]), (v, sequence[1])):
            target[row, : len(source[first : first + 16])] = source[first : first + 16]
    out, _ = attended(PagedAttention, tables[rows], positions, np.ones(4, bool), pools, q, k, v, window=window)
    out = np.asarray(out)
    for row, stop in ((0, 32), (1, 48), (3, 16)):
        sequence = other if row == 3 else one
        assert np.allclose(out[row], dense(q[row], sequence[0][:stop], sequence[1][:stop], 0.3, window), atol=1e-5)
    assert np.allclose(out[2, :8], dense(q[2, :8], one[0], one[1], 0.3, window), atol=1e-5)


def test_values_that_are_the_first_features_of_keys():
    """MLA's latents: one pool, one head, v_features of each key are its value."""
    rng = np.random.default_rng(2)
    latent = rng.standard_normal((1, 20, 1, 8)).astype(np.float32)
    pools, tables = filled_pools(Model(1, shared=True), [latent])
    q = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)
    alive = np.ones(1, bool)
    out, _ = attended(DecodeAttention, tables, np.array([[19]]), alive, pools, q, latent[:, -1:], None, v_features=5)
    assert out.shape == (1, 1, 4, 5)
    assert np.allclose(out[0], dense(q[0], latent[0], latent[0, ..., :5], 0.3), atol=1e-5)


def test_longer_neighbours_change_no_bit():
    """The loop runs as often as the longest row needs; for the others the further turns do exactly nothing."""
    rng = np.random.default_rng(3)
    contents = [rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (30, 190)]
    pools, tables = filled_pools(Model(), contents)
    q, k, v = (rng.standard_normal((2, 1, h, 8)).astype(np.float32) for h in (4, 2, 2))

    def beside(position):
        positions = np.array([[29], [position]])
        return np.asarray(attended(DecodeAttention, tables, positions, np.ones(2, bool), pools, q, k, v)[0])[0]

    assert (beside(0) == beside(189)).all()


def test_what_is_not_finite_is_never_written():
    pools = LAYOUT.new_pools(Model(), jnp.float32)
    bad = np.array([np.nan, np.inf, -np.inf, 1.0] * 2, np.float32).reshape(1, 1, 1, 8).repeat(2, 2)
    tables, ones = np.ones((1, LAYOUT.table_pages), np.int32), np.ones((1, 1, 2, 8), np.float32)
    _, pools = attended(DecodeAttention, tables, np.array([[3]]), np.ones(1, bool), pools, ones, bad, bad)
    assert all(np.isfinite(pool).all() for pool in pools.values())
    assert any((np.asarray(pool) == 1.0).any() for pool in pools.values()), "what is finite is written"


def test_rows_that_are_not_alive_write_to_the_null_page_only():
    pools = LAYOUT.new_pools(Model(), jnp.float32)
    tables, ones = np.full((1, LAYOUT.table_pages), 5, np.int32), np.ones((1, 1, 2, 8), np.float32)
    _, pools = attended(DecodeAttention, tables, np.array([[3]]), np.zeros(1, bool), pools, ones, ones, ones)
    written = {int(page) for page in np.flatnonzero(np.asarray(pools["k"]).any((1, 2, 3)))}
    assert written == {LAYOUT.num_pages}


def test_layers_of_every_window_have_pages_of_their_own():
    """Two layers see everything, three a window: a page holds two layers, and a sequence has three tables."""
    paging = Paging((0, 20, 20), page_layers=2)
    layout = CacheLayout.plan(cache_tokens=200, page_size=16, max_context_length=64, paging=paging)
    pools = {name: jnp.zeros((2 * layout.num_pages, 16, 2, 8)) for name in "kv"}
    pages = np.random.default_rng(0).permutation(np.arange(1, layout.num_pages))[: 3 * 3].reshape(3, 1, 3)
    tables = np.pad(pages, ((0, 0), (0, 0), (0, layout.table_pages - 3))).astype(np.int32)
    rng = np.random.default_rng(1)
    layers = [(window, layer) for window, count in ((20, 3), (0, 2)) for layer in range(count)]
    made = {layer: rng.standard_normal((2, 33, 2, 8)).astype(np.float32) for layer in layers}
    q = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)

    @partial(jax.jit, static_argnames=("kind", "window", "start", "count"))
    def run(kind, pools, layer, q, k, v, window, start, count):
        attend = kind(layout, jnp.asarray(tables), jnp.arange(start, start + count)[None], jnp.ones(1, bool))
        return attend(pools, layer, q, k, v, 0.3, 0, window)

    for window, layer in layers:
        k, v = made[window, layer][:, None, :32]
        given = (np.int32(layer), np.zeros((1, 32, 4, 8), np.float32), k, v)
        _, pools = run(PagedAttention, pools, *given, window=window, start=0, count=32)
    for window, layer in layers:
        k, v = made[window, layer]
        out, pools = run(
            DecodeAttention, pools, np.int32(layer), q, k[None, 32:], v[None, 32:], window=window, start=32, count=1
        )
        assert np.allclose(out[0], dense(q[0], k, v, 0.3, window), atol=1e-5)
