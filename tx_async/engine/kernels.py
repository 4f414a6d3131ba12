"""Which kernels run: at start, each is compiled and compared with the plain version on the device itself.

Where one fails or differs the plain version runs, and the log says so in one line. What that means for a model, whose
shapes may be none of a kernel's, is in `kernel_uses.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import DecodeAttention, PagedAttention
from tx_async.engine.platform import ACCELERATOR, Platform
from tx_async.layers.attention import packed_attention
from tx_async.layers.grouped import RowBlocks, experts_mlp
from tx_async.layers.lora import ExpertLora
from tx_async.layers.mlp import silu_gated

TOLERANCE = 2e-2
"""The largest difference allowed in bf16, relative to the largest value."""
PLAIN = "plain"
HEADS = (64, 128, 256)
"""Features of a head with which kernels over pages are tried: of wide ones, blocks may not fit in a device's shared
memory. For a model with others it is the first."""


class Paged(NamedTuple):
    """What a model's attention over pages has, and its kernels are tried with."""

    heads: int = 8
    features: int = HEADS[0]
    """Of a key."""
    v_features: int = 0
    """Set for latent attention: as in `Attend`."""
    has_sinks: bool = False

    def make_pools(self, layout: CacheLayout, rng: np.random.Generator) -> list[Array]:
        """Of two layers."""
        pools, kv_heads = (1, 1) if self.v_features else (2, 2)
        shape = (2 * layout.num_pages, layout.page_size, kv_heads, self.features)
        return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(pools)]

    def make_sinks(self, rng: np.random.Generator) -> Array | None:
        return jnp.asarray(rng.standard_normal(self.heads), jnp.float32) if self.has_sinks else None


class TrainedHeads(NamedTuple):
    """What the heads of a layer have in training, and its kernel is tried with."""

    features: int = HEADS[0]
    """Of a query or a key."""
    values: int = HEADS[0]
    has_window: bool = False
    has_sinks: bool = False


class Differences(NamedTuple):
    """The largest differences between a kernel and the plain version, relative to the largest value."""

    forward: float
    gradients: float = 0.0

    @property
    def largest(self) -> float:
        return float(np.max(self))  # a NaN is the largest


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The kernels that run in place of plain versions."""

    flash_attention: bool = False
    """Whether `layers/flash_attention.py` runs in training."""
    paged_attention: bool = False
    """Whether `paged_kernel.py` runs in decode steps."""
    paged_prefill: bool = False
    """Whether `prefill_kernel.py` runs in prefill."""
    grouped_product: bool = False
    """Whether `layers/grouped_kernel.py` computes the products of experts."""


NO_KERNELS = Kernels()
ALL_KERNELS = Kernels(flash_attention=True, paged_attention=True, paged_prefill=True, grouped_product=True)


def choose(
    here: Platform, paged: Sequence[Paged] = (Paged(),), trained: Sequence[TrainedHeads] = (TrainedHeads(),)
) -> Kernels:
    """The kernels that run on this device; on a mesh, on every device: of its processes each tries its first. paged,
    trained: what the model's layers have in the KV cache and in training."""
    of_training = partial(_largest, flash_difference, trained)
    of_decode, of_prefill = (partial(_largest, of, paged) for of in (paged_difference, prefill_difference))
    return Kernels(
        flash_attention=here.flash_kernel and _is_right_everywhere("flash_attention", of_training),
        paged_attention=here.paged_kernel and _is_right_everywhere("paged_attention", of_decode),
        paged_prefill=here.paged_kernel and _is_right_everywhere("paged_prefill", of_prefill),
        grouped_product=here.grouped_kernel and _is_right_everywhere("grouped_product", grouped_difference),
    )


def _is_right_everywhere(name: str, difference: Callable[[], float]) -> bool:
    """Whether every process found it right: all of a mesh must run the same programs."""
    found = _is_right(name, difference)
    if jax.process_count() == 1:
        return found
    everywhere = bool(np.all(multihost_utils.process_allgather(np.array(found))))
    if found and not everywhere:
        log.warning("%s does not run on another host of the mesh: the plain version runs on all", name)
    return everywhere


def _is_right(name: str, difference: Callable[[], float]) -> bool:
    try:
        found = difference()
    except Exception as error:  # however a compiler or a driver fails, the plain version runs
        log.warning("%s does not run here, the plain version does: %s", name, str(error).splitlines()[:1])
        return False
    if not found <= TOLERANCE:
        log.warning("%s differs by %.3g from the plain version, which runs instead", name, found)
    return found <= TOLERANCE


def _largest(difference: Callable[[Any], float], cases: Sequence[Any]) -> float:
    return float(np.max([difference(case) for case in cases]))  # a NaN among them is the largest


def flash_difference(trained: TrainedHeads = TrainedHeads(), interpret: bool = False) -> float:
    return flash_differences(trained, interpret).largest


def flash_differences(trained: TrainedHeads = TrainedHeads(), interpret: bool = False) -> Differences:
    """The differences between the kernels and plain attention, in outputs and gradients of two packed rows."""
    from tx_async.layers.flash_attention import flash_attention

    rng = np.random.default_rng(0)
    sizes = ((4, trained.features), (2, trained.features), (2, trained.values), (4, trained.values))
    q, k, v, direction = (jnp.asarray(rng.standard_normal((2, 256, *size)), jnp.bfloat16) for size in sizes)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32) if trained.has_sinks else None
    lengths = ((256,), (100, 156))
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in row]) for row in lengths], jnp.int32)
    segments = jnp.asarray([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths], jnp.int32)
    scale, window = trained.features**-0.5, 70 if trained.has_window else 0

    def of(attend: Any, option: Any) -> tuple[Array, ...]:
        def run(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, sinks, positions, segments, scale, window, option)

        out, back = jax.vjp(run, q, k, v)
        return out, *back(direction)

    @jax.jit
    def both() -> Array:
        plain, kernel = of(packed_attention, 64), of(flash_attention, interpret)
        return jnp.stack([_gap(a, b) for a, b in zip(plain, kernel, strict=True)])

    return _differences(both())


def _differences(gaps: Array) -> Differences:
    """gaps: of the output, then of each gradient."""
    forward, *gradients = np.asarray(gaps)
    return Differences(float(forward), float(np.max(gradients)))


def _gap(plain: Array, kernel: Array) -> Array:
    """The largest difference, relative to the largest value."""
    plain, kernel = plain.astype(jnp.float32), kernel.astype(jnp.float32)
    return jnp.max(jnp.abs(plain - kernel)) / jnp.max(jnp.abs(plain))


def paged_difference(paged: Paged = Paged(), interpret: bool = False) -> float:
    """The difference between the kernel and plain attention, on a tiny case, also with a window."""
    from tx_async.engine import paged_kernel

    layout = CacheLayout.plan(cache_tokens=1024, page_size=16, max_context_length=256)
    rng = np.random.default_rng(0)
    pools, sinks, v_features = paged.make_pools(layout, rng), paged.make_sinks(rng), paged.v_features
    q = jnp.asarray(rng.standard_normal((3, paged.heads, paged.features)), jnp.bfloat16)
    tables = jnp.asarray(rng.permutation(np.arange(1, 49)).reshape(3, 16), jnp.int32)
    tables = jnp.pad(tables, ((0, 0), (0, layout.table_pages - 16)))
    positions, scale = jnp.array([0, 100, 255], jnp.int32), paged.features**-0.5
    where = tables, positions, jnp.int32(layout.num_pages)
    attend = DecodeAttention(layout, tables, positions[:, None], jnp.ones(3, bool))

    @jax.jit
    def both(q: Array, pools: list[Array]) -> Array:
        def gap(window: int) -> Array:
            plain = attend.attend(pools, jnp.int32(1), q[:, None], scale, v_features, window, sinks)[:, 0]
            options = {"scale": scale, "v_features": v_features, "window": window, "interpret": interpret}
            return _gap(plain, paged_kernel.attend(q, pools, *where, sinks, **options))

        return jnp.maximum(gap(0), gap(100))

    return float(both(q, pools))


def prefill_difference(paged: Paged = Paged(), interpret: bool = False) -> float:
    """The difference between the kernel and plain attention, also with a window: two tiles of one prompt, the first of
    another."""
    from tx_async.engine import prefill_kernel

    layout = CacheLayout.plan(cache_tokens=1024, page_size=16, max_context_length=512, platform=ACCELERATOR)
    rng = np.random.default_rng(0)
    pools, sinks, v_features = paged.make_pools(layout, rng), paged.make_sinks(rng), paged.v_features
    q = jnp.asarray(rng.standard_normal((3, 128, paged.heads, paged.features)), jnp.bfloat16)
    prompts = rng.permutation(np.arange(1, 65)).reshape(2, layout.table_pages)
    tables, starts = jnp.asarray(prompts[[0, 0, 1]], jnp.int32), jnp.array([16, 144, 0], jnp.int32)
    where, scale = (tables, starts, jnp.int32(layout.num_pages)), paged.features**-0.5
    attend = PagedAttention(layout, tables, starts[:, None] + jnp.arange(128), jnp.ones(3, bool))

    @jax.jit
    def both(q: Array, pools: list[Array]) -> Array:
        def gap(window: int) -> Array:
            plain = attend.attend(pools, jnp.int32(1), q, scale, v_features, window, sinks)
            options = {"scale": scale, "v_features": v_features, "window": window, "interpret": interpret}
            return _gap(plain, prefill_kernel.attend(q, pools, *where, sinks, **options))

        return jnp.maximum(gap(0), gap(100))

    return float(both(q, pools))


def grouped_difference(interpret: bool = False) -> float:
    return grouped_differences(interpret).largest


def grouped_differences(interpret: bool = False) -> Differences:
    """The differences between the kernels and the plain loop over blocks, in outputs and all gradients of two rows'
    experts with adapters, one block unused."""
    from tx_async.layers import grouped_kernel

    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)  # noqa: E731
    sides = {"gate": (128, 96), "up": (128, 96), "down": (96, 128)}
    w: dict[str, Array] = {name: normal(3, *side) for name, side in sides.items()}
    w |= {f"{name}_bias": normal(3, side[1]) for name, side in sides.items()}
    pairs = {
        name: (normal(2, 3, side[0], 16).astype(jnp.float32), normal(2, 3, 16, side[1]).astype(jnp.float32))
        for name, side in sides.items()
    }
    blocks = RowBlocks(
        expert=jnp.array([0, 0, 2, 1, 2, 2], jnp.int32),
        adapter=jnp.array([0, 0, 0, 1, 1, 1], jnp.int32),
        used=jnp.array([True, True, True, True, True, False]),
    )
    x, direction = normal(6, 16, 128), normal(6, 16, 128)
    x = jnp.where(blocks.used[:, None, None], x, 0)

    def of(experts: Any) -> tuple[Array, ...]:
        lora = lambda pairs: ExpertLora(pairs, jnp.array([1.0, 0.5]), None)  # noqa: E731
        out, back = jax.vjp(lambda x, pairs: experts(silu_gated, x, blocks, w, lora(pairs)), x, pairs)
        return out, *jax.tree.leaves(back(direction))

    @jax.jit
    def both() -> Array:
        kernel = of(lambda *inputs: grouped_kernel.experts_mlp(*inputs, interpret=interpret))
        return jnp.stack([_gap(a, b) for a, b in zip(of(experts_mlp), kernel, strict=True)])

    return _differences(both())
