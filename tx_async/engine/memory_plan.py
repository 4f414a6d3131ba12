"""Plans the memory of one device before anything is put there.

    weights + training slots + samplers + temporaries + margin + KV cache ≤ memory

The weights and the slots are counted from the model's own table of parameters, cut as the mesh cuts them. Temporaries
are bounded by formulas (`temporaries.py`) that a test holds against compiled programs. What is left belongs to the KV
cache, where layers with a window keep little of a long sequence. Row shapes with large temporaries recompute
activations; shapes that still do not fit are not offered. A plan that does not fit names the setting that would help.

It is pure arithmetic on `config.json`: it runs without an accelerator and without weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from msgspec import structs

from tx_async.engine.cut_sizes import CutSizes
from tx_async.engine.devices import in_mesh
from tx_async.engine.kernel_uses import KernelUse
from tx_async.engine.kernels import ALL_KERNELS, Kernels
from tx_async.engine.kv_cache import CACHE_PART, state_bytes, state_slots, token_bytes
from tx_async.engine.paging import Paging, tokens_ahead
from tx_async.engine.platform import Platform
from tx_async.engine.row_shapes import row_shapes
from tx_async.engine.temporaries import Temporaries
from tx_async.engine.transfers import axes_within_a_host
from tx_async.errors import ConfigError
from tx_async.layers.residuals import NOTHING, Recompute
from tx_async.layers.sharding import AXES
from tx_async.models.decoder import Decoder
from tx_async.wire.ranks import rank_classes, slot_rank
from tx_async.wire.worker import EngineConfig, MemoryPart

GIB = 2**30
MARGIN_BYTES = GIB
"""Left free for fragmentation and for what a bound has missed."""
ACTIVATIONS_SHARE = 9.1
"""A row shape recomputes so much that it takes at most one part in ACTIVATIONS_SHARE of the device's memory (8 GiB of
80 GB), or what nothing else wants, unless `activation_memory_gib` says otherwise."""
WORTH_A_PASS = 1.25
"""Computing layers again in groups, a third forward pass, must save at least this factor."""
CONTEXT_MIN = 512
"""A KV cache that cannot hold one sequence of this length is no use."""
CONTEXT_USEFUL = 8192
"""Slots give way until sequences of this length can be trained and sampled."""
DEVICES_MAX = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowShape:
    """A shape of training micro-batches, with what it costs."""

    rows: int
    length: int
    recompute: Recompute
    """What the backward pass computes again."""
    temporaries: int
    """Bytes on each device while such a micro-batch runs, with the most targets for each token."""

    def __str__(self) -> str:
        layers, _, keeping = self.recompute
        what = f" {layers} layers together" if layers > 1 else f" all but {keeping} layers" if keeping else ""
        return f"{self.rows}x{self.length}{' recomputing' * bool(layers)}{what}"


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one device; every device of a mesh has the same."""

    memory: int
    """Bytes that the worker may use."""
    parts: tuple[MemoryPart, ...]
    row_shapes: tuple[RowShape, ...]
    """The shapes that are offered, ascending."""
    context: int
    """Tokens of the longest sequence: what the configuration says, or as much of it as the KV cache can hold."""
    kv_cache_tokens: int
    num_training_slots: int
    num_sampler_slots: int
    """As configured, or as many as leave room for the rest."""
    wanted_context: int = 0
    """The context that configuration and model ask for."""
    kernels: tuple[KernelUse, ...] = ()
    """What the device's kernels do for the model."""
    problem: str = ""
    """Why it does not fit, and what to set; "" = it fits."""

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def longest_row(self) -> int:
        return max((shape.length for shape in self.row_shapes), default=0)

    def lines(self) -> Iterator[str]:
        """A table for people: the GiB of each part and what it is for."""
        for part in (*self.parts, MemoryPart("in all", sum(part.num_bytes for part in self.parts), "")):
            yield f"{part.num_bytes / GIB:8.2f} GiB  {part.name:<15} {part.note}".rstrip()
        yield f"{self.memory / GIB:8.2f} GiB  {'usable':<15} of one device"
        shorter = f" (of {self.wanted_context}: more does not fit)" if self.context < self.wanted_context else ""
        yield f"slots for {_adapters(self.num_training_slots)} in training and {self.num_sampler_slots} in sampling"
        yield f"context {self.context}{shorter}, KV cache {self.kv_cache_tokens} tokens"
        if self.row_shapes:
            yield "rows " + ", ".join(map(str, self.row_shapes))
        yield from map(str, self.kernels)
        if self.problem:
            yield self.problem


def plan(
    model: Decoder,
    config: EngineConfig,
    platform: Platform,
    memory: int,
    devices: int = 0,
    kernels: Kernels = ALL_KERNELS,
) -> MemoryPlan:
    """memory: bytes of one device that may be used. devices: how many there are, 0 = as many as are needed. kernels:
    those that run on the device. A plan that does not fit says so in `problem`."""
    found = _with_slots_that_fit(model, config, platform, memory, kernels)
    if found.fits:
        return found
    return replace(found, problem=_what_helps(model, config, platform, memory, devices, kernels, found))


def of_device(model: Decoder, config: EngineConfig, here: Platform, memory: int, kernels: Kernels) -> MemoryPlan | None:
    """Plan this device's memory and log the plan; None where the device, like a CPU, does not say how much it has.
    Raises a `ConfigError` that names the setting to change where the plan does not fit."""
    if not memory:
        return None
    planned = plan(model, config, here, memory, kernels=kernels)
    for line in ("Memory of each device:", *planned.lines()):
        log.info("%s", line)
    if not planned.fits:
        raise ConfigError(planned.problem)
    return planned


def with_slots_for(config: EngineConfig, rank: int = 0) -> EngineConfig:
    """The configuration whose `max_lora_rank` is the rank of slots for adapters up to `rank`; 0 = nobody has asked."""
    return structs.replace(config, max_lora_rank=slot_rank(config.max_lora_rank, rank))


def temporaries_of(
    model: Decoder, config: EngineConfig, platform: Platform, kernels: Kernels = ALL_KERNELS
) -> Temporaries:
    """The bounds that a plan relies on. The rank of slots is `config.max_lora_rank`."""
    return _Planner(model, config, platform, 0, kernels).temporaries


def lora_rank_limit(model: Decoder, config: EngineConfig, platform: Platform, memory: int, left: int = 0) -> int:
    """The highest rank, up to `config.max_lora_rank`, with whose slots a plan fits; at least that of slots at first.

    memory: as for `plan`, or 0 where no plan is made, as on a CPU. Then slots may take half of the bytes that are
    `left` to this process beside the weights, so that nobody's rank ends the process; 0 = nobody knows.
    """
    at_first = slot_rank(config.max_lora_rank)
    wider = [rank for rank in rank_classes(config.max_lora_rank) if rank > at_first]

    def fits(rank: int) -> bool:
        wide = structs.replace(config, max_lora_rank=rank)
        if memory:
            return plan(model, wide, platform, memory).fits
        return not left or _Planner(model, wide, platform, 0).slot_bytes() <= left // 2

    return next((rank for rank in reversed(wider) if fits(rank)), at_first)


def _with_slots_that_fit(
    model: Decoder, config: EngineConfig, platform: Platform, memory: int, kernels: Kernels
) -> MemoryPlan:
    """Slots are a cache: with fewer of them adapters change places more often, and that is all. So where adapters are
    large, as those of experts are, there are only as many slots as leave room for a useful context."""
    plans = [_Planner(model, fewer, platform, memory, kernels).plan() for fewer in _with_fewer_slots(config)]
    fitting = [made for made in plans if made.fits]
    useful = (
        made for made in fitting if min(made.context, made.longest_row) >= min(made.wanted_context, CONTEXT_USEFUL)
    )
    return next(useful, (fitting or plans[-1:])[0])


def _with_fewer_slots(config: EngineConfig) -> Iterator[EngineConfig]:
    """As configured, then fewer of both kinds, down to one."""
    training, samplers = config.max_lora_adapters, config.max_sampler_adapters
    for count in range(max(training, samplers), 0, -1):
        yield structs.replace(config, max_lora_adapters=min(training, count), max_sampler_adapters=min(samplers, count))


# ---- what helps


def _what_helps(
    model: Decoder,
    config: EngineConfig,
    platform: Platform,
    memory: int,
    devices: int,
    kernels: Kernels,
    found: MemoryPlan,
) -> str:
    """One line that says what is lacking, and which setting to change."""
    lead = f"It does not fit: {found.problem}."
    setting = "expert_parallel_size" if _has_experts(model) else "tensor_parallel_size"
    for name in dict.fromkeys((setting, "tensor_parallel_size", "fully_sharded_data_parallel_size")):
        for size in _sizes_to_try(config, name, devices):
            if _with_slots_that_fit(model, structs.replace(config, **{name: size}), platform, memory, kernels).fits:
                on = f"on the {devices} devices" if _mesh_size(config, name, size) == devices else "on as many devices"
                return f"{lead} Set {name} to {size} in backend_config, {on}."
    return f"{lead} Raise {setting} and fully_sharded_data_parallel_size in backend_config, or take a smaller model."


def _sizes_to_try(config: EngineConfig, name: str, devices: int) -> Iterator[int]:
    """Larger sizes of one axis of the mesh: what uses all devices that there are, then the smallest first."""
    size = 2 * getattr(config, name)
    if devices:
        of_others = _mesh_size(config, name, 1)
        if devices % of_others == 0 and devices // of_others >= size:
            yield devices // of_others
    while size <= DEVICES_MAX:
        yield size
        size *= 2


def _mesh_size(config: EngineConfig, name: str, size: int) -> int:
    """How many devices the mesh has when one of its axes has that size."""
    return in_mesh(structs.replace(config, **{name: size}))


def _has_experts(model: Decoder) -> bool:
    return any(weight.num_experts for weight in model.weights)


# ---- one plan


@dataclass(frozen=True)
class _Planner:
    model: Decoder
    config: EngineConfig
    platform: Platform
    memory: int
    kernels: Kernels = ALL_KERNELS

    def plan(self) -> MemoryPlan:
        sampling = self.temporaries.of_sampling
        fixed = self._fixed_parts()
        left = self.memory - MARGIN_BYTES - sum(part.num_bytes for part in fixed)
        wanted = self._wanted_context()
        shapes = self._offered(wanted, left)
        temporaries = max([sampling, *(shape.temporaries for shape in shapes)])
        cache = max(0, min(left - temporaries, self._kv_wanted(wanted)))
        tokens = cache // self._token_bytes
        context = self._paging.longest(tokens, self._ahead, wanted)
        parts = (
            *fixed,
            MemoryPart("temporaries", temporaries, "of the largest program that is offered"),
            MemoryPart("KV cache", cache, self._kv_note(cache, context)),
            MemoryPart("margin", MARGIN_BYTES, "fragmentation, and what the bounds have missed"),
        )
        slots = self.config.max_lora_adapters, self.config.max_sampler_adapters
        made = MemoryPlan(self.memory, parts, shapes, context, tokens, *slots, wanted, self.temporaries.kernel_uses)
        return replace(made, problem=self._problem(made, left))

    def _problem(self, made: MemoryPlan, left: int) -> str:
        lacking = (
            f"weights, slots and margin take {_gib(self.memory - left)} of {_gib(self.memory)} on each device, "
            "and the smallest programs and a KV cache do not fit beside them"
        )
        if left < 0 or not made.row_shapes or made.context < min(CONTEXT_MIN, self.model.max_position_embeddings):
            return lacking
        if made.context < self.config.max_context_length:
            return f"the KV cache holds {made.context} tokens, less than max_context_length"
        if made.kv_cache_tokens < self.config.kv_cache_tokens:
            return f"the KV cache holds {made.kv_cache_tokens} tokens, less than kv_cache_tokens"
        return ""

    # -- parts

    def _fixed_parts(self) -> tuple[MemoryPart, ...]:
        config, sizes, rank = self.config, self._sizes, self.config.max_lora_rank
        adapter = sizes.of_adapter(rank, fsdp=True)
        sampler = jnp.dtype(self._dtype).itemsize * sizes.of_layers(rank) + 4 * sizes.of_head(rank)
        slots = config.max_lora_adapters + 1
        return (
            MemoryPart("weights", sizes.weight_bytes(self._dtype), f"{self._dtype} base model"),
            *self._gathered(),
            MemoryPart(
                "training slots",
                4 * 4 * slots * adapter,
                f"{_adapters(config.max_lora_adapters)} of rank {rank} and one for unused rows: A, B, m, v, gradients",
            ),
            MemoryPart(
                "samplers", config.max_sampler_adapters * sampler, f"{_adapters(config.max_sampler_adapters)}: A, B"
            ),
            MemoryPart("checkpoint", 4 * 4 * self._of_one_host(rank), "an adapter between its slot and a file"),
            *self._recurrent_state(),
        )

    def _of_one_host(self, rank: int) -> int:
        """Numbers of an adapter on each device, where every host has all of it."""
        within = axes_within_a_host(self._mesh.shape, self.config.num_processes)
        mesh = AbstractMesh(tuple(self._mesh.shape[axis] if axis in within else 1 for axis in AXES), AXES)
        return CutSizes(self.model, mesh).of_adapter(rank, fsdp=True)

    def _gathered(self) -> Iterator[MemoryPart]:
        if size := self._sizes.gathered_bytes(self._dtype):
            yield MemoryPart("gathered", size, "while training uses it: the head, a layer and the one that comes next")

    def slot_bytes(self) -> int:
        """Bytes of all slots, for training and sampling."""
        return sum(part.num_bytes for part in self._fixed_parts() if part.name in ("training slots", "samplers"))

    def _recurrent_state(self) -> Iterator[MemoryPart]:
        if self.model.state_layers:
            running, kept = state_slots(self.model, self._dtype, self.config, self.memory // CACHE_PART)
            size = (1 + running + kept) * state_bytes(self.model, self._dtype, self._mesh.shape["tensor"])
            yield MemoryPart("recurrent state", size, f"{running} sequences that run, {kept} snapshots of prefixes")

    @cached_property
    def _sizes(self) -> CutSizes:
        return CutSizes(self.model, self._mesh)

    @cached_property
    def _mesh(self) -> Any:
        config = self.config
        sizes = (config.fully_sharded_data_parallel_size, config.expert_parallel_size, config.tensor_parallel_size)
        return AbstractMesh(sizes, AXES)

    @property
    def _dtype(self) -> str:
        return self.config.dtype or self.platform.dtype

    # -- KV cache

    @cached_property
    def _token_bytes(self) -> int:
        """One token's keys and values on one device."""
        whole = token_bytes(self.model, self._dtype)
        heads = [heads for heads, _ in self.model.cache_shapes.values()]
        tensor = self._mesh.shape["tensor"]
        return max(1, whole // tensor if heads and all(number % tensor == 0 for number in heads) else whole)

    @cached_property
    def _paging(self) -> Paging:
        return Paging.of(self.model.window_layers)

    @cached_property
    def _ahead(self) -> int:
        return tokens_ahead(self.config, self.platform)

    def _kv_bytes(self, length: int, count: int = 1) -> int:
        """Of so many sequences of that length."""
        return self._paging.cache_for(count, length, self._ahead) * self._token_bytes

    def _kv_note(self, cache: int, context: int) -> str:
        note, layers = "keys and values of sequences and of cached prefixes", self.model.window_layers
        if not any(layers):
            return note
        windowed, longest = sum(layers.values()) - layers.get(0, 0), cache // max(1, self._kv_bytes(context))
        return f"{note}, {longest} of the whole context: {windowed} of {sum(layers.values())} layers keep a window"

    def _kv_wanted(self, context: int) -> int:
        if tokens := self.config.kv_cache_tokens:
            return max(tokens * self._token_bytes, self._kv_bytes(context))
        return self._kv_bytes(context, self.config.sample_max_num_sequences)

    def _wanted_context(self) -> int:
        limit = self.model.max_position_embeddings
        return min(limit, self.config.max_context_length or limit)

    # -- temporaries

    def _offered(self, context: int, room: int) -> tuple[RowShape, ...]:
        """The row shapes beside which the cache still holds a sequence of that length, so that what is trained can be
        sampled. What the largest of them needs in any case, the others have as well."""
        unwanted = room - self._kv_wanted(context)
        shapes = [
            (self._row_shape(rows, length, left, self._allowed(rows, length, unwanted)), left)
            for rows, length in row_shapes(self.config, context, self.platform)
            if (left := room - self._kv_bytes(length)) > 0
        ]
        offered = [(shape, left) for shape, left in shapes if shape.temporaries <= left]
        most = max((shape.temporaries for shape, _ in offered), default=0)
        few = max((shape.temporaries - self._wide(shape.rows, shape.length) for shape, _ in offered), default=0)
        return tuple(
            self._row_shape(x.rows, x.length, min(left, most), max(few, self._allowed(x.rows, x.length, unwanted)))
            for x, left in offered
        )

    def _allowed(self, rows: int, length: int, unwanted: int) -> float:
        """For activations, where less would do. unwanted: bytes that the largest cache would leave."""
        if self.config.activation_memory_gib:
            return self.config.activation_memory_gib * GIB
        return max(self.memory / ACTIVATIONS_SHARE, unwanted - self._wide(rows, length))

    def _wide(self, rows: int, length: int) -> int:
        return self.temporaries.of_wide_targets(rows, length)

    def _row_shape(self, rows: int, length: int, room: int, allowed: float) -> RowShape:
        """allowed: for activations; more only where it must be."""
        bounds, ways = self.temporaries, self.temporaries.ways
        wide, few = self._wide(rows, length), partial(bounds.of_training, rows, length)
        again = ways[1:]
        if not self.config.gradient_checkpointing:
            most = min(room - wide, allowed)
            again = bounds.keeping_most(rows, length, int(most)), *again
            if few(NOTHING) <= most:
                return RowShape(rows, length, NOTHING, few(NOTHING) + wide)
        enough = min(room - wide, max(allowed, WORTH_A_PASS * few(ways[-1])))
        chosen = next((way for way in again if few(way) <= enough), ways[-1])
        return RowShape(rows, length, chosen, few(chosen) + wide)

    @cached_property
    def temporaries(self) -> Temporaries:
        mesh, kernels = self._mesh, self.kernels
        of_layer = self._token_bytes // (self._paging.num_tables * self._paging.page_layers)
        sizes = of_layer, self._sizes.of_adapter(self.config.max_lora_rank, fsdp=False)
        return Temporaries(self.model, self.config, self.platform, kernels, mesh, *sizes)


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count != 1)}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
