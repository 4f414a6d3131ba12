"""AdamW against torch's. One slot's step never touches another, wakes padding, or becomes infinite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tx_async.engine.adapter_slots import TrainingState, read_state
from tx_async.engine.optimizer import Adam, adamw, global_norm, not_taken_because, optim_step
from tx_async.testing.engine_bench import assert_same_bits
from tx_async.wire.worker import AdamParams

SLOTS = 3
STEP = jax.jit(optim_step)

CASES = {
    "tinker's defaults": AdamParams(),
    "everything at once": AdamParams(
        learning_rate=0.02, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.3, grad_clip_norm=0.7
    ),
    "beta2 near one": AdamParams(learning_rate=1e-3, beta2=0.9999, eps=1e-8),
    "no momentum": AdamParams(learning_rate=1e-3, beta1=0.0, beta2=0.0, eps=1e-8),
}
GOLDEN = {
    "tinker's defaults": [-0.100252934, 0.20012292, 0.50023377],
    "everything at once": [-0.15432838, 0.20632349, 0.5397311],
    "beta2 near one": [-0.10253691, 0.2012244, 0.5023134],
    "no momentum": [-0.10300001, 0.199, 0.50299996],
}
"""torch 2.13: float32 parameters [-0.1, 0.2, 0.5] after three steps with `GRADIENTS`."""
GRADIENTS = np.array([[0.5, -1.0, -2.0], [0.1, 0.3, -0.2], [3.0, 1.0, -0.001]], np.float32)


def state_with(weights: np.ndarray, gradients: np.ndarray) -> TrainingState:
    """The same vector in A of every slot; B is a second leaf of zeros."""

    def stacks(values: np.ndarray):
        a = jnp.asarray(np.broadcast_to(values, (1, SLOTS, 1, len(values))))
        return {"layers": {"q": (a, jnp.zeros((1, SLOTS, 2, 2)))}}

    zeros = [stacks(np.zeros_like(weights)) for _ in range(2)]
    return TrainingState(stacks(weights), *zeros, stacks(gradients), jnp.zeros(SLOTS, jnp.int32))


def with_gradients(state: TrainingState, gradients: np.ndarray) -> TrainingState:
    return state._replace(gradients=state_with(gradients, gradients).gradients)


def steps(adam: AdamParams, weights: np.ndarray, gradients: np.ndarray, slot: int = 1):
    state, outcome = state_with(weights, gradients[0]), None
    for gradient in gradients:
        state, outcome = STEP(with_gradients(state, gradient), jnp.int32(slot), Adam.of(adam))
    return state, outcome


def vector(stack) -> np.ndarray:
    return np.asarray(stack["layers"]["q"][0][0, 1, 0])


@pytest.mark.parametrize("case", CASES)
def test_three_steps_end_where_torch_ends(case):
    state, outcome = steps(CASES[case], np.array([-0.1, 0.2, 0.5], np.float32), GRADIENTS)
    np.testing.assert_allclose(vector(state.weights), GOLDEN[case], rtol=2e-6)
    assert outcome.taken and outcome.step == 3
    np.testing.assert_allclose(outcome.grad_norm, np.linalg.norm(GRADIENTS[-1]), rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_steps_follow_torch(case):
    import torch

    adam = CASES[case]
    rng = np.random.default_rng(0)
    start = rng.standard_normal(64).astype(np.float32)
    gradients = (rng.standard_normal((100, 64)) * 10.0 ** rng.integers(-6, 3, (100, 64))).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW(
        [parameter], lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
    )
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], adam.grad_clip_norm)
        optimizer.step()
    state, _ = steps(adam, start, gradients)
    np.testing.assert_allclose(vector(state.weights), parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    moments = optimizer.state[parameter]
    np.testing.assert_allclose(vector(state.m), moments["exp_avg"].numpy(), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(vector(state.v), moments["exp_avg_sq"].numpy(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_chain_walks_beside_optax_adamw(case):
    """Hyperparameters as data on one side, constants of the transformation on the other; torch clips with an epsilon
    that optax does not have."""
    params = CASES[case]
    ours, adam = adamw(), Adam.of(params)
    clip = optax.clip_by_global_norm(params.grad_clip_norm) if params.grad_clip_norm else optax.identity()
    theirs = optax.chain(
        clip,
        optax.adamw(params.learning_rate, params.beta1, params.beta2, params.eps, weight_decay=params.weight_decay),
    )
    rng = np.random.default_rng(1)
    mine = other = {"a": jnp.asarray(rng.standard_normal(32, np.float32)), "b": jnp.ones((2, 3))}

    @jax.jit
    def both(mine, state, other, other_state, gradients, step):
        updates, state = ours.update(gradients, state, mine, adam=adam, norm=global_norm(gradients), step=step)
        more, other_state = theirs.update(gradients, other_state, other)
        return optax.apply_updates(mine, updates), state, optax.apply_updates(other, more), other_state

    state, other_state = jax.jit(ours.init)(mine), jax.jit(theirs.init)(other)
    for step in range(1, 21):
        gradients = jax.tree.map(lambda w: rng.standard_normal(w.shape, np.float32), mine)
        mine, state, other, other_state = both(mine, state, other, other_state, gradients, np.int32(step))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_the_parts_of_the_chain_have_names():
    state = adamw().init({"a": jnp.ones(2)})
    assert list(state) == ["clip_by_global_norm", "scale_by_adam", "scale_by_learning_rate", "add_decayed_weights"]


def test_beta2_of_0_999_is_not_rounded_to_one():
    """1 - 0.999 in fp32 is 5e-5 off, and in bf16 it is zero: the first step shows it."""
    adam = AdamParams(learning_rate=1.0, beta2=0.999, eps=0.0)
    state, _ = steps(adam, np.zeros(2, np.float32), np.array([[1e-3, -7.0]], np.float32))
    np.testing.assert_allclose(vector(state.weights), [-1, 1], rtol=1e-6)
    np.testing.assert_allclose(vector(state.v), [1e-9, 0.049], rtol=1e-6)


def test_a_step_touches_one_slot_and_clears_its_gradients():
    before = state_with(np.ones(4, np.float32), np.ones(4, np.float32))
    after, _ = STEP(before, jnp.int32(1), Adam.of(CASES["everything at once"]))
    for other in (0, 2):
        assert_same_bits(read_state(before, jnp.int32(other)), read_state(after, jnp.int32(other)))
    assert (vector(after.gradients) == 0).all() and (vector(after.weights) < 1).all()


def test_without_gradients_moments_decay_and_weight_decay_applies():
    adam = AdamParams(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.95)
    state, _ = steps(adam, np.ones(2, np.float32), np.array([[1.0, -1.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(vector(state.m), [0.09, -0.09], rtol=1e-6)
    fresh, outcome = steps(adam, np.ones(2, np.float32), np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(vector(fresh.weights), 0.95, rtol=1e-6)
    assert outcome.taken and outcome.grad_norm == 0


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(eps=0.0, weight_decay=0.1),
        AdamParams(eps=0.0, beta1=0.0, beta2=0.0),
        AdamParams(learning_rate=1e4, weight_decay=100.0, grad_clip_norm=1e-20),
    ],
)
def test_what_is_zero_without_gradient_stays_exactly_zero(adam):
    """Padding of lower ranks, groups that are not trained, and A's gradient while B = 0, also with eps = 0."""
    gradients = np.tile(np.array([1.0, 0.0, -1.0, 0.0], np.float32), (5, 1))
    state, outcome = steps(adam, np.array([0.5, 0.0, 0.1, 0.0], np.float32), gradients)
    assert outcome.taken
    for stack in (state.weights, state.m, state.v):
        assert vector(stack)[1] == 0 == vector(stack)[3]
        assert np.isfinite(vector(stack)).all()
        assert (np.asarray(stack["layers"]["q"][1]) == 0).all()


@pytest.mark.parametrize(
    ("gradient", "adam"),
    [
        (np.nan, AdamParams()),
        (np.inf, AdamParams(grad_clip_norm=1.0)),
        (-np.inf, AdamParams()),
        (1e30, AdamParams()),  # finite, but its square is not
        (1.0, AdamParams(learning_rate=1e300)),
        (1.0, AdamParams(learning_rate=1e30, weight_decay=1e30)),
    ],
)
def test_a_step_that_would_not_be_finite_is_not_taken(gradient, adam):
    good, _ = steps(AdamParams(), np.ones(3, np.float32), GRADIENTS)
    bad = with_gradients(good, np.array([1.0, gradient, 1.0], np.float32))
    after, outcome = STEP(bad, jnp.int32(1), Adam.of(adam))
    assert not outcome.taken and outcome.step == 3
    assert (vector(after.gradients) == 0).all()
    cleared = jax.tree.map(jnp.zeros_like, good.gradients)
    for slot in map(jnp.int32, range(SLOTS)):
        kept = read_state(good._replace(gradients=cleared), slot)
        assert_same_bits(kept, read_state(after._replace(gradients=cleared), slot))


def test_the_norm_of_large_gradients_does_not_overflow():
    tree = {"layers": {"q": (jnp.full((4, 4), 1e30), jnp.full((3,), -2e30))}}
    np.testing.assert_allclose(global_norm(tree), np.sqrt(16 + 12) * 1e30, rtol=1e-6)
    assert jax.jit(partial(global_norm))({"layers": {"q": (jnp.zeros(3), jnp.zeros(2))}}) == 0


def test_clipping_uses_the_norm_over_all_matrices():
    state = state_with(np.zeros(2, np.float32), np.array([3.0, 0.0], np.float32))
    b = jnp.zeros((1, SLOTS, 2, 2)).at[0, :, 0, 0].set(4.0)
    state = state._replace(gradients={"layers": {"q": (state.gradients["layers"]["q"][0], b)}})
    after, outcome = STEP(state, jnp.int32(1), Adam.of(AdamParams(beta1=0.0, grad_clip_norm=1.0)))
    np.testing.assert_allclose(outcome.grad_norm, 5, rtol=1e-6)
    np.testing.assert_allclose(vector(after.m), [0.6, 0], rtol=1e-6)


def test_a_step_that_leaves_the_padding_out_is_the_same_step():
    rng = np.random.default_rng(0)
    live, adam = 2, Adam.of(AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0))

    def stacks():
        a, b = (rng.standard_normal(shape, np.float32) for shape in ((2, SLOTS, 5, 4), (2, SLOTS, 4, 3)))
        a[..., live:], b[..., live:, :] = 0, 0
        return {"layers": {"q": (jnp.asarray(a), jnp.asarray(b))}}

    state = TrainingState(stacks(), stacks(), jax.tree.map(jnp.abs, stacks()), stacks(), jnp.ones(SLOTS, jnp.int32))
    whole, expected = STEP(state, jnp.int32(1), adam)
    narrow, outcome = jax.jit(partial(optim_step, rank=live))(state, jnp.int32(1), adam)
    assert outcome.taken and outcome.step == expected.step == 2
    assert outcome.grad_norm == pytest.approx(float(expected.grad_norm))
    for ours, theirs, before in zip(*map(jax.tree.leaves, (narrow, whole, state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        if ours.ndim > 1:
            np.testing.assert_array_equal(ours[:, [0, 2]], before[:, [0, 2]])
            assert not np.array_equal(ours[:, 1], before[:, 1])


@pytest.mark.parametrize(
    ("gradient", "words"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (3e38, "norm overflows")]
)
def test_the_message_tells_nan_gradients_from_a_norm_that_overflows(gradient, words):
    gradients = np.full((1, 4), gradient, np.float32)
    _, outcome = steps(AdamParams(), np.ones(4, np.float32), gradients)
    assert not outcome.taken and words in not_taken_because(float(outcome.grad_norm))


def test_the_message_of_a_step_that_overflows_gives_the_norm():
    _, outcome = steps(AdamParams(), np.ones(4, np.float32), np.full((1, 4), 1e25, np.float32))
    message = not_taken_because(float(outcome.grad_norm))
    assert not outcome.taken and "2e+25" in message and "finite" in message and "NaN" not in message
