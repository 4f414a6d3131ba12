"""What an accelerator runs without branch or loop decides as what a CPU runs: the same tokens, the same adapters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine import sampler
from tx_async.engine.sampler import Choices, sample, stream_key
from tx_async.engine.vocabulary import VocabularyParts
from tx_async.layers.lora import LoraActive, LoraGrouped, layer_slice, layers_apart, tiles

ROWS, VOCAB = 8, 1003


def choices(top_k: list[int], top_p: list[float], temperature: float = 1.0) -> Choices:
    seeds = np.arange(2 * ROWS, dtype=np.uint32).reshape(ROWS, 2)
    temperatures = np.full(ROWS, temperature, np.float32)
    temperatures[0] = 0.0
    key = jax.jit(stream_key)(seeds, np.zeros(ROWS, np.int32))
    return Choices(temperatures, np.int32(top_k), np.float32(top_p), key)


@jax.jit
def kept_both_ways(logits, some):
    v = VocabularyParts(VOCAB)
    z = v.lay_out(logits)
    weights = jnp.exp(z - z.max((1, 2), keepdims=True))
    limits = (of(v, weights, some) for of in (sampler._limit, sampler._limit_in_fixed_passes))
    return [sampler._kept(v, weights, limit) for limit in limits]


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        ([0] * 8, [1.0] * 8),
        ([1, 2, 3, 50, 0, VOCAB, 7, 7], [1.0] * 8),
        ([0, 5] * 4, [0.1, 0.5, 0.9, 0.99, 1.0, 0.0, 0.3, 0.7]),
    ],
)
def test_the_same_tokens_stay_by_search_and_by_fixed_passes(top_k, top_p):
    """Logits of few values, so that ties stand at every edge."""
    rng = np.random.default_rng(0)
    for levels in (3, 40, 10**6):
        logits = np.float32(rng.integers(0, levels, (ROWS, VOCAB)) / levels * 8)
        np.testing.assert_array_equal(*kept_both_ways(logits, choices(top_k, top_p)))


def test_a_draw_is_the_same_draw():
    logits = np.random.default_rng(1).standard_normal((ROWS, VOCAB)).astype(np.float32)
    some = choices([0, 3, 0, 40, 0, 0, 9, 0], [1.0, 1.0, 0.4, 0.9, 1.0, 1.0, 0.2, 1.0])
    run = jax.jit(sample, static_argnums=3)
    both = (run(logits, some, np.arange(ROWS), fixed_passes) for fixed_passes in (True, False))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def lora(row_adapter: np.ndarray, slots: int = 5):
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, slots, 16, 4), (2, slots, 4, 24)))
    a[:, 3], b[:, 3] = 3e38, -3e38  # finite, as all slots are; what it makes of a row is not
    used = np.unique(row_adapter[row_adapter >= 0])
    active = np.zeros(slots, np.int32)
    active[: len(used)] = used
    scale = np.arange(1, slots + 1, dtype=np.float32)
    data = ({"s": {"q": (a, b)}}, scale, active, np.int32(len(used)), *tiles(row_adapter), row_adapter)
    return data


@partial(jax.jit, static_argnums=0)
def deltas(kind, data, x):
    adapters = kind(*data)
    return adapters.deltas(layer_slice(adapters.weights["s"], 1), ("q",), x)[0]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("rows", [[-1, -1, -1], [2, -1, 0], [0], [3, 1, -1, 1, 0, 2, 4]])
def test_grouped_adapters_give_each_row_its_own(rows, length):
    row_adapter = np.array(rows, np.int32)
    x = np.random.default_rng(3).standard_normal((len(rows), length, 16)).astype(np.float32)
    plain, grouped = (np.asarray(deltas(kind, lora(row_adapter), x)) for kind in (LoraActive, LoraGrouped))
    overflows = row_adapter == 3
    np.testing.assert_allclose(grouped[~overflows], plain[~overflows], rtol=1e-5, atol=1e-5)
    assert not np.isfinite(grouped[overflows]).any() and np.isfinite(grouped[~overflows]).all()
    assert (grouped[row_adapter == -1] == 0).all()


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", [LoraActive, LoraGrouped])
def test_adapters_in_lists_of_layers_are_those_in_stacks(kind, length):
    row_adapter = np.array([3, 1, -1, 1, 0, 2, 4], np.int32)
    x = np.random.default_rng(3).standard_normal((len(row_adapter), length, 16)).astype(np.float32)
    stacks, *rest = lora(row_adapter)
    in_lists = layers_apart(jax.tree.map(jnp.asarray, stacks))
    np.testing.assert_array_equal(deltas(kind, (in_lists, *rest), x), deltas(kind, (stacks, *rest), x))
