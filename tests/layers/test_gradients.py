"""Gradients that are written out are those of the formula that they belong to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers.cpu import joined
from tx_async.layers.mlp import gated
from tx_async.layers.norm import rms_norm


def arrays(*shapes, scale=1.0):
    rng = np.random.default_rng(len(shapes))
    return [np.float32(scale * rng.standard_normal(shape)) for shape in shapes]


def plain_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def compare(function, formula, arguments, dout):
    @partial(jax.jit, static_argnums=0)
    def run(function, arguments, dout):
        values, pullback = jax.vjp(function, *arguments)
        return values, pullback(dout)

    (values, mine), (expected, theirs) = (run(f, arguments, dout) for f in (function, formula))
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 7, 3, 16)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_gradients_of_the_norm(shape, eps):
    x, weight, dout = arrays(shape, shape[-1:], shape)
    compare(lambda x, w: rms_norm(x, w, eps), lambda x, w: plain_norm(x, w, eps), (x, weight), dout)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_of_the_gate(scale):
    gate, up, dout = arrays((2, 5, 48), (2, 5, 48), (2, 5, 48), scale=scale)
    compare(gated, lambda gate, up: jax.nn.silu(gate) * up, (gate, up), dout)


def test_gradients_of_the_joined_product():
    x, low, w, b, dout = arrays((7, 48), (7, 4), (48, 20), (4, 20), (7, 20))
    compare(lambda x, low, b: joined(x, low, w, b), lambda x, low, b: x @ w + low @ b, (x, low, b), dout)


@pytest.mark.parametrize("function", [lambda x: rms_norm(x, x[0, 0], 1e-6), lambda x: gated(x, x)])
def test_gradients_have_the_dtype_of_the_values(function):
    def run(x):
        values, pullback = jax.vjp(function, x)
        return values, *pullback(values)

    values, gradient = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4, 8), jnp.bfloat16))
    assert values.dtype == gradient.dtype == jnp.bfloat16
