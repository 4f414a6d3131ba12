"""The three forms of a chunk's products are one arithmetic; which is taken depends on shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine.page_products import BLOCK_DIAGONAL, IN_PLACE, PLAIN, of_one_token

PAGES = np.array([[1, 4], [3, 2], [5, 0]])


def pool_of(num_heads: int, features: int):
    pages = np.random.default_rng(num_heads).standard_normal((6, 16, num_heads, features))
    return jnp.asarray(pages, jnp.float32)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_every_form_gives_the_plain_products(group):
    """One program of all forms: the queries, then the weights, meet the same pages in each."""
    q = jnp.asarray(np.random.default_rng(group).standard_normal((3, 1, 4, group, 16)), jnp.float32)

    @jax.jit
    def run(q, pool, pages):
        scores = [form.scores(q, pool, pages) for form in (PLAIN, IN_PLACE, BLOCK_DIAGONAL)]
        weights = jnp.exp(scores[0] - scores[0].max(-1, keepdims=True))
        return scores, [form.weighted(weights, pool, pages) for form in (PLAIN, IN_PLACE, BLOCK_DIAGONAL)]

    (scores, *others), (weighted, *other_weighted) = run(q, pool_of(4, 16), PAGES)
    assert scores.shape == (3, 4, 1, group, 32)
    assert weighted.shape == (3, 4, 1, group, 16)
    for form, other, other_weight in zip(("in place", "block diagonal"), others, other_weighted, strict=True):
        assert np.allclose(other, scores, atol=1e-5), form
        assert np.allclose(other_weight, weighted, atol=1e-5), form


def test_the_form_is_chosen_by_shapes():
    assert of_one_token(pool_of(4, 16), group=2, in_place=True) is IN_PLACE
    assert (
        of_one_token(pool_of(4, 12), group=2, in_place=True) is BLOCK_DIAGONAL
    )  # features that do not fill a CPU's lanes
    assert of_one_token(pool_of(4, 16), group=4, in_place=True) is BLOCK_DIAGONAL
    assert of_one_token(pool_of(16, 16), group=4, in_place=True) is PLAIN
    assert of_one_token(pool_of(1, 16), group=16, in_place=True) is PLAIN


def test_an_accelerator_never_reads_pages_in_place():
    assert of_one_token(pool_of(4, 16), group=2, in_place=False) is BLOCK_DIAGONAL
