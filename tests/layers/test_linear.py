"""One matrix, stored either way."""

import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers.cpu import OutFirst
from tx_async.layers.linear import product


@pytest.mark.parametrize("lead", [(16,), (4, 1), (2, 3)])
def test_a_matrix_stored_by_outputs_gives_the_same_product(lead):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*lead, 48)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((48, 80)), jnp.float32)
    expected = product(x, w)
    assert expected.shape == (*lead, 80)
    np.testing.assert_allclose(product(x, OutFirst(w.T)), expected, rtol=1e-5, atol=1e-5)


def test_the_product_has_the_dtype_that_is_asked_for():
    x, w = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    for matrix in (w, OutFirst(w.T)):
        assert product(x, matrix).dtype == jnp.bfloat16
        assert product(x, matrix, jnp.float32).dtype == jnp.float32
