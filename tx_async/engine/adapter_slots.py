"""Adapters on the device: training slots and sampler slots, which share nothing.

A slot's index is an axis of every array (`[layers, slots, in, rank]`), so which adapter a program touches is data.
Sampler slots are lists of layers (`[slots, in, rank]` each) where the base model's layers are. Ranks below the slots'
are padded with zeros, as are the matrices of a group that is not trained. They stay zero: A = 0 makes B's gradient zero
and the other way round, and the optimizer takes no step where its moment is zero. Every change replaces the arrays
(donated, so in place); a slot that is created or loaded is overwritten whole.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from tx_async.engine.allocation import Allocate, on_device
from tx_async.layers.lora import LoraTarget, LoraWeights, by_path, init_weights, layers_apart
from tx_async.layers.sharding import of_one_layer
from tx_async.wire.worker import LORA_ALPHA, AdapterConfig

Targets = dict[str, dict[str, LoraTarget]]
HostWeights = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
"""One adapter as `LoraWeights`, without the adapter axis."""


class TrainingState(NamedTuple):
    """All state of training adapters, in fp32: stacked over the slots, or one adapter's slice without that axis."""

    weights: LoraWeights
    m: LoraWeights
    v: LoraWeights
    gradients: LoraWeights
    """The sum since the last optimizer step."""
    step: Array
    """int32: how many optimizer steps were taken."""


def zeros(
    targets: Targets, num_slots: int, rank: int, sharding: Any = None, allocate: Allocate = on_device
) -> TrainingState:
    """`num_slots` empty slots: A and B of zeros at this rank, no steps taken. sharding: a `TrainingState` of shardings;
    None is the default device."""

    def make() -> TrainingState:
        weights, m, v, gradients = (init_weights(targets, num_slots, rank) for _ in range(4))
        return TrainingState(weights, m, v, gradients, jnp.zeros(num_slots, jnp.int32))

    return allocate(make, sharding)


def slot_bytes(targets: Targets, rank: int) -> int:
    """Device bytes of one training slot: A, B, m, v and one gradient."""
    one = jax.eval_shape(partial(init_weights, targets, 1, rank))
    return 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))


# ---- one slot of a stack: the slot axis is 1, and 0 for the step


def read_slot(stack: LoraWeights, slot: Array, rank: int | None = None) -> LoraWeights:
    """The adapter in a slot; with `rank`, without the padding above that rank."""

    def read(x: Array, axis: int) -> Array:
        sizes = list(x.shape)
        sizes[1], sizes[axis] = 1, sizes[axis] if rank is None else rank
        return jax.lax.dynamic_slice(x, at(slot, x), sizes).squeeze(1)

    return by_path(lambda _, ab: (read(ab[0], -1), read(ab[1], -2)), stack)


def write_slot(stack: LoraWeights, slot: Array, adapter: LoraWeights) -> LoraWeights:
    """Write an adapter into a slot. What lies above its rank stays as it is."""

    def write(x: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, one[:, None].astype(x.dtype), at(slot, x))

    return jax.tree.map(write, stack, adapter)


def write_layers(layers: LoraWeights, slot: Array, adapter: LoraWeights) -> LoraWeights:
    """`write_finite` for slots that are lists of layers."""
    one = layers_apart(jax.tree.map(lambda w: w[:, None], adapter))
    write: Any = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=0)
    return jax.tree.map(lambda layer, mine: write(layer, _finite(mine, layer.dtype)), layers, one)


def write_finite(stack: LoraWeights, slot: Array, adapter: LoraWeights) -> LoraWeights:
    """Write an adapter into a sampler slot. What its dtype would round to an infinity becomes the largest value: a zero
    times any value of any slot is a zero (`LoraGrouped`)."""
    return write_slot(stack, slot, jax.tree.map(lambda x, one: _finite(one, x.dtype), stack, adapter))


def _finite(x: Array, dtype: Any) -> Array:
    return jnp.nan_to_num(x.astype(dtype))


def at(slot: Array, stack: Array) -> list[Array | int]:
    """The index at which a slot begins in a stack [layers, slots, ...]."""
    return [0, slot, *[0] * (stack.ndim - 2)]


def read_state(state: TrainingState, slot: Array, rank: int | None = None) -> TrainingState:
    """All that one slot holds; rank: as in `read_slot`."""
    weights, m, v, gradients = (read_slot(stack, slot, rank) for stack in state[:4])
    return TrainingState(weights, m, v, gradients, state.step[slot])


def write_state(state: TrainingState, slot: Array, one: TrainingState) -> TrainingState:
    """The inverse of `read_state`. What lies above the rank of `one` stays as it is."""
    pairs = zip(state[:4], one[:4], strict=True)
    weights, m, v, gradients = (write_slot(stack, slot, adapter) for stack, adapter in pairs)
    return TrainingState(weights, m, v, gradients, state.step.at[slot].set(one.step))


def load_weights(state: TrainingState, slot: Array, weights: LoraWeights) -> TrainingState:
    """Put these weights into a slot and set its moments, step and gradients to zero."""
    empty = jax.tree.map(jnp.zeros_like, read_state(state, slot))
    return write_state(state, slot, empty._replace(weights=weights))


# ---- a new adapter


class Creation(NamedTuple):
    """An `AdapterConfig` as data."""

    seed: Array
    """uint32 [2], low word first."""
    rank: Array
    groups: dict[str, Array]
    """bool per group: attn, mlp, unembed."""

    @classmethod
    def of(cls, config: AdapterConfig) -> Creation:
        words = np.array([config.seed & 0xFFFFFFFF, (config.seed >> 32) & 0xFFFFFFFF], np.uint32)
        flags = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}
        return cls(words, np.int32(config.rank), {name: np.bool_(flag) for name, flag in flags.items()})  # type: ignore[arg-type]


def create_adapter(targets: Targets, state: TrainingState, slot: Array, creation: Creation) -> TrainingState:
    """Clear a slot and put a new adapter in it: A ~ U(±1/√in), B = 0, everything else zero."""
    pairs: dict[Any, Any] = flatten_dict(jax.tree.map(jnp.zeros_like, read_slot(state.weights, slot)))
    rank = jax.tree.leaves(pairs)[0].shape[-1]
    live = jnp.arange(rank) < creation.rank
    described: dict[Any, Any] = flatten_dict(targets)
    draws = _draws(creation, [a.shape[:-1] for a, _ in pairs.values()], rank)
    for (path, (_, b)), draw in zip(pairs.items(), draws, strict=True):
        target = described[path]
        a = jnp.where(live & creation.groups[target.group], draw * target.in_features**-0.5, 0.0)
        pairs[path] = (a, b)
    return load_weights(state, slot, unflatten_dict(pairs))


def _draws(creation: Creation, shapes: list[tuple[int, ...]], rank: int) -> list[Array]:
    """U(±1) of each shape [...] as [..., rank]. Every column has its own key, so a value depends on the seed, its
    target and its place: not on the slot or the maximum rank. One draw makes them all: random bits are slow to compile.
    """
    key = jax.random.fold_in(jax.random.key(creation.seed[0]), creation.seed[1])
    sizes = [math.prod(shape) for shape in shapes]

    def column(index: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, index), (sum(sizes),), jnp.float32, -1, 1)

    drawn = jnp.split(jax.vmap(column, out_axes=-1)(jnp.arange(rank)), list(accumulate(sizes))[:-1])
    return [part.reshape(*shape, rank) for part, shape in zip(drawn, shapes, strict=True)]


# ---- between slots and files: an adapter at its own rank, on the host


def trim(weights: LoraWeights, rank: int) -> HostWeights:
    """The first `rank` columns of A and rows of B: all that is not padding."""
    return by_path(lambda _, ab: (np.asarray(ab[0])[..., :rank], np.asarray(ab[1])[..., :rank, :]), weights)


def pad(targets: Targets, weights: HostWeights, rank: int) -> HostWeights:
    """The inverse of `trim`: zeros for missing ranks, and for matrices that `weights` lacks."""

    def widen(shape: jax.ShapeDtypeStruct, x: np.ndarray | None) -> np.ndarray:
        wide = np.zeros(shape.shape, np.float32)
        if x is not None:
            wide[tuple(slice(n) for n in x.shape)] = x
        return wide

    given: dict[Any, Any] = flatten_dict(weights)

    def pair(path: tuple[str, ...], shapes: tuple[Any, Any]) -> tuple[Any, Any]:
        a, b = given.get(path, (None, None))
        return widen(shapes[0], a), widen(shapes[1], b)

    shapes = jax.eval_shape(lambda: read_slot(init_weights(targets, 1, rank), jnp.int32(0)))
    return by_path(pair, shapes)


def lora_scale(rank: int) -> float:
    """The factor of (x A) B: alpha / rank."""
    return LORA_ALPHA / rank


def _sampler_zeros(targets: Targets, num_slots: int, rank: int, dtype: Any, apart: bool = False) -> LoraWeights:
    narrow = lambda path, ab: ab if path[0] == "head" else tuple(x.astype(dtype) for x in ab)  # noqa: E731
    zeros = by_path(narrow, init_weights(targets, num_slots, rank))
    return layers_apart(zeros) if apart else zeros


def _layers_apart(_: Any, stacks: tuple[Any, Any]) -> tuple[Any, Any]:
    """The shardings of each layer's A and B, from those of their stacks."""
    a, b = of_one_layer(stacks[0]), of_one_layer(stacks[1])
    if isinstance(a, NamedSharding) and len(a.spec) == 3:  # `layers_apart` turns it
        a = NamedSharding(a.mesh, PartitionSpec(a.spec[0], a.spec[2], a.spec[1]))
    return a, b


class SamplerAdapters:
    """The adapter versions in the sampler slots. Both fields are replaced, never changed: running quanta may read
    them."""

    def __init__(
        self,
        targets: Targets,
        num_slots: int,
        rank: int,
        sharding: Any = None,
        allocate: Allocate = on_device,
        dtype: Any = jnp.float32,
        apart: bool = False,
    ):
        """sharding: of stacks, `LoraWeights` of shardings; None is the default device. dtype: the base model's; its
        products take A and B in it. The unembedding's products are in fp32, so its A and B stay in fp32. apart: the
        layers are lists, as the base model's are; out of stacks each step would copy every layer of every slot, since a
        kernel takes whole arrays."""
        make = partial(_sampler_zeros, targets, num_slots, rank, dtype, apart)
        self.sharding = by_path(_layers_apart, sharding) if apart and sharding else sharding
        #: the program that writes an adapter into a slot
        self.write = write_layers if apart else write_finite
        self.weights: LoraWeights = allocate(make, self.sharding)
        #: fp32 [slots], on the host: each quantum takes it as data
        self.scale: Any = np.zeros(num_slots, np.float32)

    def load(self, slot: int, weights: LoraWeights, scale: float) -> None:
        """Replace the arrays. weights: with the adapter already in `slot`; scale: the adapter's (`lora_scale`)."""
        self.weights, self.scale = weights, self.scale.copy()
        self.scale[slot] = scale
