"""Experts: dispatched row by row, so that no row can touch another's bits, NaNs or gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_async.layers import grouped
from tx_async.layers.grouped import block_shape, rearrange
from tx_async.layers.lora import ExpertLora
from tx_async.layers.moe import NAMES, routed

R, L, D, F, E, K, RANK = 4, 12, 16, 8, 6, 2, 3

dispatch = jax.jit(grouped.dispatch, static_argnums=(1, 2))


def normal(seed: int, *shape: int):
    return jnp.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs(row_adapter=None, adapters: int = R):
    w = {name: normal(i, E, *((F, D) if name == "down" else (D, F))) for i, name in enumerate(NAMES)}
    pairs = {
        name: (normal(10 + i, adapters, *w[name].shape[:2], RANK), normal(20 + i, adapters, E, RANK, w[name].shape[2]))
        for i, name in enumerate(NAMES)
    }
    lora = ExpertLora(pairs, jnp.array(np.arange(1.0, adapters + 1), jnp.float32), row_adapter)
    experts = np.random.default_rng(3).permuted(np.tile(np.arange(E), (R, L, 1)), axis=-1)[..., :K].astype(np.int32)
    weights = np.exp(np.asarray(normal(5, R, L, K)))
    return w, lora, normal(4, R, L, D), jnp.array(experts), jnp.array(weights / weights.sum(-1, keepdims=True))


def plainly(w, lora, x, experts, weights):
    """Token by token and expert by expert, as the formula says it."""

    def project(name, row, e, x):
        adapter = row if lora.row_adapter is None else int(np.asarray(lora.row_adapter)[row])
        y = x @ w[name][e]
        if adapter < 0:
            return y
        a, b = lora.weights[name]
        return y + (x @ a[adapter, e]) @ b[adapter, e] * lora.scale[adapter]

    rows = []
    for r in range(x.shape[0]):
        out = jnp.zeros(x.shape[1:])
        for e in range(E):
            inner = jax.nn.silu(project("gate", r, e, x[r])) * project("up", r, e, x[r])
            share = jnp.where(experts[r] == e, weights[r], 0).sum(-1, keepdims=True)
            out += share * project("down", r, e, inner)
        rows.append(out)
    return jnp.stack(rows)


@pytest.mark.parametrize("row_adapter", [None, jnp.array([1, -1, 0, 1], jnp.int32)], ids=["rows", "active"])
def test_experts_with_lora_equal_the_formula_and_so_do_all_gradients(row_adapter):
    w, lora, x, experts, weights = inputs(row_adapter, R if row_adapter is None else 2)
    direction = normal(6, R, L, D)

    def loss(function, weights_of_lora, x, weights):
        return (function(w, lora._replace(weights=weights_of_lora), x, experts, weights) * direction).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2)))(lora.weights, x, weights)
        for f in (routed, plainly)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


def test_a_row_has_the_same_bits_whatever_its_neighbours_hold():
    """Results and LoRA gradients of row 2, beside other neighbours and beside NaNs."""
    w, lora, x, experts, weights = inputs()

    @jax.jit
    def run(x, experts):
        def loss(pairs, x):
            out = routed(w, lora._replace(weights=pairs), x, experts, weights)
            return (out[2] ** 2).sum(), out

        (_, out), (pairs, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lora.weights, x)
        return jax.tree.map(lambda a: a[2], (out, pairs, dx))

    alone = run(x, experts)
    for neighbours in (np.asarray(normal(7, 3, L, D)), np.full((3, L, D), np.nan, np.float32)):
        other_x, other_experts = np.array(x), np.array(experts)
        other_x[[0, 1, 3]], other_experts[[0, 1, 3]] = neighbours, other_experts[2][::-1]
        beside = run(other_x, other_experts)
        jax.tree.map(np.testing.assert_array_equal, beside, alone)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_experts_of_a_mesh_divide_the_blocks_between_them(shards):
    """Every assignment has exactly one slot on exactly one device, and no device computes another's blocks."""
    experts = np.random.default_rng(0).integers(0, E, (R, L * K)).astype(np.int32)
    local = E // shards
    whole = dispatch(experts, E, block_shape(L * K, E))
    shape = block_shape(L * K, local, shards)
    plans = [jax.device_get(dispatch(experts - np.int32(i * local), local, shape)) for i in range(shards)]
    assert sum(int(plan.used.sum()) for plan in plans) == int(whole.used.sum())
    homes = sum((plan.slot < plan.source.shape[1]).astype(int) for plan in plans)
    assert (homes == 1).all()
    for plan in plans:
        there = jax.jit(rearrange)(np.ones((R, L * K, 1), np.float32), plan.source, plan.slot)
        assert np.sum(there) == (plan.slot < plan.source.shape[1]).sum()


@pytest.mark.parametrize("fall", ["even", "one", "two"])
@pytest.mark.parametrize("length", [1, 65, 700])
def test_blocks_hold_every_assignment_however_they_fall(fall, length):
    experts = {"even": np.arange(length) % 8, "one": np.full(length, 5), "two": np.where(np.arange(length) % 3, 7, 0)}
    blocks = block_shape(length, 8)
    plan = jax.device_get(dispatch(np.int32(experts[fall])[None], 8, blocks))
    held = plan.source[0][plan.source[0] < length]
    np.testing.assert_array_equal(np.sort(held), np.arange(length))
    block_of_slot = np.arange(blocks[0] * blocks[1]) // blocks[1]
    filled = np.asarray(plan.source[0] < length)
    np.testing.assert_array_equal(plan.expert[0][block_of_slot[filled]], experts[fall][held])
    assert plan.used[0][block_of_slot[filled]].all()


def test_a_row_of_one_token_equals_the_formula_too():
    """Each of its experts has a block of its own. One of them is on another device."""
    w, lora, x, experts, weights = inputs(jnp.array([1, -1, 0, 1], jnp.int32), 2)
    x, experts, weights = x[:, :1], experts[:, :1].at[0, 0, 1].set(E), weights[:, :1]
    with jax.default_matmul_precision("highest"):
        found, formula = jax.jit(routed)(w, lora, x, experts, weights), plainly(w, lora, x, experts, weights)
    np.testing.assert_allclose(found, formula, rtol=1e-5, atol=1e-5)
