"""torch.optim.AdamW, exactly, in fp32 and for one adapter at a time: decoupled weight decay, eps outside the root.

    g ← g · min(1, grad_clip_norm / (‖g‖ + 1e-6))       as torch.nn.utils.clip_grad_norm_, when grad_clip_norm > 0
    w ← w (1 - lr·weight_decay)
    m ← m + (1 - β1)(g - m)
    v ← β2 v + (1 - β2) g²
    w ← w - lr/(1 - β1^t) · m / (√v / √(1 - β2^t) + eps)

Where m = 0 no step is taken, also when eps = 0: padding stays zero, and 0/0 does not arise.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tx_async.engine.adapter_slots import TrainingState, read_state, write_state
from tx_async.layers.lora import LoraWeights
from tx_async.wire.worker import AdamParams

CLIP_EPSILON = 1e-6


class Adam(NamedTuple):
    """`AdamParams` as fp32 scalars. What fp32 would round away (1 - β, log β) is computed in double before."""

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


class StepOutcome(NamedTuple):
    taken: Array
    """bool: False when gradients, or what the step would make of them, are not finite; nothing changed then."""
    grad_norm: Array
    """Before clipping."""
    step: Array


def optim_step(
    state: TrainingState, slot: Array, adam: Adam, rank: int | None = None
) -> tuple[TrainingState, StepOutcome]:
    """Apply and clear the gradients of one slot. Every other slot keeps its bits. rank: the adapter has no more; None
    reads the slot's padding with it."""
    old = read_state(state, slot, rank)
    norm = global_norm(old.gradients)
    # A branch of its own: how its loops round must not depend on how wide the slots are that it reads from.
    new, taken = jax.lax.cond(jnp.isfinite(norm), partial(_step, adam), lambda old, _: (old, False), old, norm)
    # Always zero. Written as a choice that needs the old gradients: were it a constant, it could be stored before they
    # are read, and to prevent that the compiler would copy the gradients of every slot.
    new = new._replace(gradients=jax.tree.map(lambda g: jnp.where(new.step < 0, g, 0.0), old.gradients))
    return write_state(state, slot, new), StepOutcome(taken, norm, new.step)


def _step(adam: Adam, old: TrainingState, norm: Array) -> tuple[TrainingState, Array]:
    """-> (after the step, or as it was; whether that is finite)."""
    new = _adamw(old, norm, adam)
    taken = jax.tree.reduce(jnp.logical_and, jax.tree.map(_all_finite, new.weights, new.m, new.v))
    return jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, old), taken


def _adamw(old: TrainingState, norm: Array, adam: Adam) -> TrainingState:
    step = old.step + 1
    t = step.astype(jnp.float32)
    step_size = adam.learning_rate / -jnp.expm1(t * adam.log_beta1)
    correction2 = jnp.sqrt(-jnp.expm1(t * adam.log_beta2))
    clip = jnp.minimum(1.0, adam.grad_clip_norm / (norm + CLIP_EPSILON))
    clip = jnp.where(adam.grad_clip_norm > 0, clip, 1.0)

    def update(w: Array, m: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        g = g * clip
        # torch's lerp has these two forms, each exact at its end.
        m = jnp.where(adam.beta1 > 0.5, m + adam.one_minus_beta1 * (g - m), g - adam.beta1 * (g - m))
        v = adam.beta2 * v + adam.one_minus_beta2 * (g * g)
        move = jnp.where(m == 0, 0.0, m / (jnp.sqrt(v) / correction2 + adam.eps))
        return w * adam.decay - step_size * move, m, v

    updated = jax.tree.map(update, old.weights, old.m, old.v, old.gradients)
    weights, m, v = jax.tree.transpose(jax.tree.structure(old.weights), jax.tree.structure((0, 0, 0)), updated)
    return TrainingState(weights, m, v, old.gradients, step)


def not_taken_because(norm: float) -> str:
    """What to tell the owner of a step that was not taken. norm: of its gradients."""
    if math.isnan(norm):
        reason = "The gradients are NaN or infinite"
    elif math.isinf(norm):
        reason = "The gradients are finite, but their norm overflows fp32"
    else:
        reason = f"The gradients are finite (norm {norm:.3g}), but the step that they make overflows fp32"
    return f"{reason}. The step was not taken, the weights are as before, the gradients were cleared."


def global_norm(tree: LoraWeights) -> Array:
    """Scaled by the largest entry, so that gradients up to fp32's limit have a norm, not an overflow."""
    leaves = jax.tree.leaves(tree)
    largest = reduce(jnp.maximum, (jnp.max(jnp.abs(x)) for x in leaves))
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(sum(jnp.sum(jnp.square(x / unit)) for x in leaves))


def _all_finite(w: Array, m: Array, v: Array) -> Array:
    return jnp.all(jnp.isfinite(w) & jnp.isfinite(m) & jnp.isfinite(v))
