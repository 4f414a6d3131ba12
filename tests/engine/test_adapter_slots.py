"""New adapters: A ~ U(±1/√in) from the seed alone, B = 0; and what a slot costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.engine.adapter_slots import SamplerAdapters, slot_bytes
from tx_async.layers.lora import LoraTarget, layers_apart
from tx_async.testing.engine_bench import assert_same_bits


def test_a_is_uniform_within_its_bound_and_b_is_zero(bench):
    bench.create(0, rank=8, seed=3)
    state = bench.state(0)
    for stack, targets in bench.engine.targets.items():
        for name, target in targets.items():
            a, b = state.weights[stack][name]
            bound = target.in_features**-0.5
            assert (b == 0).all() and np.abs(a).max() < bound
            assert np.abs(a).max() > 0.9 * bound and abs(a.mean()) < 0.1 * bound
            np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
    drawn = np.concatenate([a.ravel() for name, (a, _) in state.weights["layers"].items() if name != "down"])
    assert len(np.unique(drawn)) > 0.99 * len(drawn)  # no projection and no layer repeats another's draw
    assert all((x == 0).all() for x in jax.tree.leaves(state._replace(weights=None)))


def test_the_seed_decides_and_nothing_else(make_bench):
    """Neither the slot, nor other adapters, nor the server's maximum rank; a higher rank adds columns."""
    bench, other = make_bench(max_lora_rank=8), make_bench(max_lora_rank=5)
    bench.create(0, rank=4, seed=3)
    bench.create(1, rank=8, seed=3)
    bench.create(2, rank=4, seed=4)
    bench.create(3, rank=4, seed=3 + 2**32)
    other.create(2, rank=4, seed=3)

    def drawn(bench, slot, rank=4):
        return bench.state(slot).weights["layers"]["gate"][0][..., :rank]

    assert_same_bits(drawn(bench, 0), drawn(other, 2))
    assert_same_bits(drawn(bench, 0), drawn(bench, 1))
    assert (drawn(bench, 0) != drawn(bench, 2)).mean() > 0.99
    assert (drawn(bench, 0) != drawn(bench, 3)).mean() > 0.99


def test_groups_that_are_not_trained_are_zero(bench):
    bench.create(0, rank=4, train_attn=False, train_unembed=False)
    weights = bench.state(0).weights
    assert (weights["head"]["head"][0] == 0).all() and (weights["layers"]["q"][0] == 0).all()
    assert (weights["layers"]["up"][0][..., :4] != 0).all()


def test_a_slot_costs_a_b_two_moments_and_one_gradient(bench):
    """Device memory per live adapter: what the stacks hold for one slot, measured on the arrays themselves."""
    held = sum(x.nbytes for x in jax.tree.leaves(bench.engine.training[:4]))
    assert bench.engine.info().adapter_bytes == held // (bench.engine.num_slots + 1)
    one = sum(x.size for x in jax.tree.leaves(bench.state(0).weights)) * 4
    assert slot_bytes(bench.engine.targets, 8) == 4 * one


def test_the_two_hundredth_adapter_costs_what_the_first_did(bench):
    bench.create(0)
    arrays, compiled = len(jax.live_arrays()), bench.engine.num_compilations
    for number in range(200):
        bench.create(number % 4, seed=number)
    assert bench.engine.num_compilations == compiled
    assert len(jax.live_arrays()) <= arrays + 2


@pytest.mark.parametrize("apart", [False, True])
def test_a_sampler_slot_is_loaded_in_place(apart):
    """Whether its layers are stacked or a list, no array is copied, and the other slots stay as they were."""
    targets = {"layers": {"q": LoraTarget("attn", 8, 16, ("a", "b", "c"))}}
    slots = SamplerAdapters(targets, num_slots=4, rank=2, apart=apart)
    load = jax.jit(slots.write, donate_argnums=0)
    rng = np.random.default_rng(0)
    loaded = []
    for slot in (2, 0):
        adapter = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 2), (3, 2, 16)))
        where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(slots.weights)]
        slots.load(slot, load(slots.weights, np.int32(slot), {"layers": {"q": adapter}}), 0.5)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(slots.weights)] == where
        loaded.append((slot, adapter))
    expected = tuple(np.zeros((3, 4, *x.shape[1:]), np.float32) for x in loaded[0][1])
    for slot, adapter in loaded:
        for stack, one in zip(expected, adapter, strict=True):
            stack[:, slot] = one
    whole: Any = {"layers": {"q": expected}}
    jax.tree.map(np.testing.assert_array_equal, slots.weights, layers_apart(whole) if apart else whole)
    assert slots.scale.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("apart", [False, True])
def test_what_a_narrow_sampler_slot_cannot_hold_is_its_largest_value(apart):
    """An infinity times the zeros of other rows would be a NaN in them."""
    targets = {"layers": {"q": LoraTarget("attn", 8, 16, ("a",))}}
    slots = SamplerAdapters(targets, num_slots=2, rank=2, dtype=jnp.bfloat16, apart=apart)
    largest = np.finfo(np.float32).max
    adapter: Any = np.full((1, 8, 2), largest), np.full((1, 2, 16), -largest)
    weights = slots.write(slots.weights, jnp.int32(1), {"layers": {"q": adapter}})
    assert all(np.isfinite(np.asarray(x, np.float32)).all() and x.any() for x in jax.tree.leaves(weights))
