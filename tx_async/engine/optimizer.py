"""The optimizer: torch.optim.AdamW, exactly, in fp32, for one adapter at a time, as a chain of optax.

    clip_by_global_norm     g ← g · min(1, grad_clip_norm / (‖g‖ + 1e-6))       torch's clip_grad_norm_, when > 0
    scale_by_adam           m ← m + (1 - β1)(g - m);  v ← β2 v + (1 - β2) g²
                            u ← m / (√v / √(1 - β2^t) + eps)                    eps outside the root
    scale_by_learning_rate  u ← -lr/(1 - β1^t) · u                              torch corrects the rate, not m
    add_decayed_weights     u ← w (1 - lr·weight_decay) + u - w                 decoupled
    optax.apply_updates     w ← w + u

Every part reads its hyperparameters from `adam`, an argument of the update: they are data, so one program serves every
learning rate. Where m = 0 no step is taken, even when eps = 0: padding stays zero, and 0/0 does not arise. Another
optimizer is another `GradientTransformationExtraArgs` with the same arguments in place of `adamw`.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tx_async.engine.adapter_slots import TrainingState, read_state, write_state
from tx_async.layers.lora import LoraWeights
from tx_async.wire.worker import AdamParams

CLIP_EPSILON = 1e-6


class Adam(NamedTuple):
    """`AdamParams` as fp32 scalars. What fp32 would round away (1 - β, log β) is first computed in double precision."""

    learning_rate: np.float32
    decay: np.float32
    """1 - learning_rate · weight_decay"""
    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    log_beta1: np.float32
    log_beta2: np.float32
    eps: np.float32
    grad_clip_norm: np.float32

    @classmethod
    def of(cls, params: AdamParams) -> Adam:
        values = (
            params.learning_rate,
            1 - params.learning_rate * params.weight_decay,
            params.beta1,
            1 - params.beta1,
            params.beta2,
            1 - params.beta2,
            math.log(params.beta1) if params.beta1 > 0 else -math.inf,
            math.log(params.beta2) if params.beta2 > 0 else -math.inf,
            params.eps,
            params.grad_clip_norm,
        )
        with np.errstate(over="ignore"):
            return cls(*(np.float32(value) for value in values))


class Moments(NamedTuple):
    """State of `scale_by_adam`; trees like the weights."""

    m: LoraWeights
    v: LoraWeights


class StepOutcome(NamedTuple):
    """What a step reports, as scalars on the device."""

    taken: Array
    """bool: False when the gradients, or the state after the step, are not finite; nothing has changed then."""
    grad_norm: Array
    """The norm before clipping."""
    step: Array
    """int32: how many steps the adapter has taken, this one included if it was."""


# ---- the chain. Every update takes adam, the hyperparameters; norm, the gradients' norm; step, counted from 1.


def adamw() -> optax.GradientTransformationExtraArgs:
    """The whole chain. Its state is {"clip_by_global_norm": (), "scale_by_adam": `Moments`, …}: only Adam keeps a
    state."""
    return optax.named_chain(
        ("clip_by_global_norm", clip_by_global_norm()),
        ("scale_by_adam", scale_by_adam()),
        ("scale_by_learning_rate", scale_by_learning_rate()),
        ("add_decayed_weights", add_decayed_weights()),
    )


def clip_by_global_norm() -> optax.GradientTransformationExtraArgs:
    """torch's clip_grad_norm_, where grad_clip_norm is above 0."""

    def update(updates: Any, state: Any, params: Any = None, *, adam: Adam, norm: Array, **_: Any) -> tuple[Any, Any]:
        clip = jnp.minimum(1.0, adam.grad_clip_norm / (norm + CLIP_EPSILON))
        clip = jnp.where(adam.grad_clip_norm > 0, clip, 1.0)
        return jax.tree.map(lambda g: g * clip, updates), state

    return _part(update)


def scale_by_adam() -> optax.GradientTransformationExtraArgs:
    """torch's Adam without the bias correction of m, which torch applies to the learning rate."""

    def init(params: Any) -> Moments:
        return Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in Moments._fields))

    def update(
        updates: Any, state: Moments, params: Any = None, *, adam: Adam, step: Array, **_: Any
    ) -> tuple[Any, Moments]:
        # torch's lerp has these two forms, each exact at its end.
        first = lambda m, g: jnp.where(  # noqa: E731
            adam.beta1 > 0.5, m + adam.one_minus_beta1 * (g - m), g - adam.beta1 * (g - m)
        )
        m = jax.tree.map(first, state.m, updates)
        v = jax.tree.map(lambda v, g: adam.beta2 * v + adam.one_minus_beta2 * (g * g), state.v, updates)
        correction = jnp.sqrt(_bias_correction(adam.log_beta2, step))
        move = lambda m, v: jnp.where(m == 0, 0.0, m / (jnp.sqrt(v) / correction + adam.eps))  # noqa: E731
        return jax.tree.map(move, m, v), Moments(m, v)

    return _part(update, init)


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """-lr / (1 - β1^t): the rate, with the bias correction of m in it."""

    def update(updates: Any, state: Any, params: Any = None, *, adam: Adam, step: Array, **_: Any) -> tuple[Any, Any]:
        step_size = adam.learning_rate / _bias_correction(adam.log_beta1, step)
        return jax.tree.map(lambda u: -step_size * u, updates), state

    return _part(update)


def add_decayed_weights() -> optax.GradientTransformationExtraArgs:
    """torch decays a weight and then moves it: the update is the difference to that result, so that it rounds as torch
    does."""

    def update(updates: Any, state: Any, params: Any = None, *, adam: Adam, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, w: (w * adam.decay + u) - w, updates, params), state

    return _part(update)


def _part(update: Any, init: Any = optax.init_empty_state) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(init, update)


def _bias_correction(log_beta: Array | np.float32, step: Array) -> Array:
    """1 - β^step"""
    return -jnp.expm1(step.astype(jnp.float32) * log_beta)


# ---- one slot's step


def optim_step(
    state: TrainingState, slot: Array, adam: Adam, rank: int | None = None
) -> tuple[TrainingState, StepOutcome]:
    """Apply and clear the gradients of one slot. Every other slot keeps its bits. rank: no less than the adapter's;
    None reads the slot's padding as well."""
    old = read_state(state, slot, rank)
    norm = global_norm(old.gradients)
    # A branch of its own: how its loops round must not depend on the width of the slots that it reads from.
    new, taken = jax.lax.cond(jnp.isfinite(norm), partial(_step, adam), lambda old, _: (old, False), old, norm)
    # Always zero, but written as a choice that needs the old gradients: a constant could be stored before they are
    # read, and to prevent that the compiler would copy the gradients of every slot.
    new = new._replace(gradients=jax.tree.map(lambda g: jnp.where(new.step < 0, g, 0.0), old.gradients))
    return write_state(state, slot, new), StepOutcome(taken, norm, new.step)


def _step(adam: Adam, old: TrainingState, norm: Array) -> tuple[TrainingState, Array]:
    """-> (the state after the step, or as it was; whether the step was finite)."""
    new = _updated(adamw(), adam, old, norm)
    taken = jax.tree.reduce(jnp.logical_and, jax.tree.map(_all_finite, new.weights, new.m, new.v))
    return jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, old), taken


def _updated(
    optimizer: optax.GradientTransformationExtraArgs, adam: Adam, old: TrainingState, norm: Array
) -> TrainingState:
    before: Any = jax.eval_shape(optimizer.init, old.weights)
    before["scale_by_adam"] = Moments(old.m, old.v)
    gradients: Any = old.gradients
    step = old.step + 1
    after: Any
    updates, after = optimizer.update(gradients, before, old.weights, adam=adam, norm=norm, step=step)  # type: ignore[arg-type]
    weights: Any = optax.apply_updates(old.weights, updates)  # type: ignore[arg-type]
    m, v = after["scale_by_adam"]
    return TrainingState(weights, m, v, gradients, step)


def not_taken_because(norm: float) -> str:
    """What to tell the owner of a step that was not taken. norm: the norm of its gradients."""
    if math.isnan(norm):
        reason = "The gradients are NaN or infinite"
    elif math.isinf(norm):
        reason = "The gradients are finite, but their norm overflows fp32"
    else:
        reason = f"The gradients are finite (norm {norm:.3g}), but the step that they make overflows fp32"
    return f"{reason}. The step was not taken, the weights are as before, the gradients were cleared."


def global_norm(tree: LoraWeights) -> Array:
    """The L2 norm of all leaves together. Entries are first scaled by the largest one, so that gradients up to fp32's
    limit have a norm and do not overflow."""
    leaves = jax.tree.leaves(tree)
    largest = reduce(jnp.maximum, (jnp.max(jnp.abs(x)) for x in leaves))
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(sum(jnp.sum(jnp.square(x / unit)) for x in leaves))


def _all_finite(w: Array, m: Array, v: Array) -> Array:
    return jnp.all(jnp.isfinite(w) & jnp.isfinite(m) & jnp.isfinite(v))
