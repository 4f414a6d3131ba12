"""Pages of every layer belong to whoever has their number; there are enough for one longest sequence."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from tx_async.engine.kv_cache import CacheLayout, copy_pages, token_bytes

LAYOUT = CacheLayout.plan(cache_tokens=1000, page_size=16, max_context_length=200)


class TwoLayers:
    window_layers: ClassVar[dict] = {0: 2}
    state_layers = 0
    state_shapes: ClassVar[dict] = {}

    def __init__(self):
        self.cache_shapes = {"k": (2, 8), "v": (2, 8)}


def test_pages_are_copied_in_every_layer():
    rng = np.random.default_rng(4)
    pools = {"k": jnp.asarray(rng.standard_normal((2 * LAYOUT.num_pages, 16, 2, 8)), jnp.float32)}
    new = copy_pages(pools, jnp.array([3, 3, 0]), jnp.array([7, 9, 0]), LAYOUT.num_pages)["k"].reshape(2, -1, 16, 2, 8)
    old = pools["k"].reshape(2, -1, 16, 2, 8)
    assert (new[:, 7] == old[:, 3]).all()
    assert (new[:, 9] == old[:, 3]).all()
    untouched = [page for page in range(LAYOUT.num_pages) if page not in (7, 9)]
    assert (new[:, np.array(untouched)] == old[:, np.array(untouched)]).all()


def test_a_cache_always_holds_one_longest_sequence():
    layout = CacheLayout.plan(cache_tokens=10, page_size=16, max_context_length=1000)
    assert layout.num_pages - 1 >= layout.pages_for(1000)
    assert layout.table_pages % layout.chunk_pages == 0
    assert layout.table_pages >= layout.pages_for(1000)
    assert token_bytes(TwoLayers(), "float32") == 2 * 2 * 2 * 8 * 4
