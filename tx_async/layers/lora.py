"""LoRA beside a frozen linear layer: y = x W + (x A) B · scale, with the adapter chosen per row.

`weights[stack][name] = (A, B)`: stacked over the layers of a stack, then over adapters, so that a scan over layers
slices both. A: [layers, adapters, in, rank], B: [layers, adapters, rank, out], both fp32. Experts have one more axis:
A [layers, adapters, experts, in, rank]. Where the base model's layers are a list, A and B may be lists of layers, too;
those of sampler slots have another layout (`layers_apart`).

There are two ways to apply them, with one interface (`deltas`):
- `LoraRows` (training): the adapter axis is the row axis, A is already gathered per row; differentiable per row.
- `LoraActive` (sampling): a loop over the adapters that are active in this batch; each row selects its own result, so
  no row's bits depend on another adapter, and a batch without adapters costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import path_aware_map
from jax import Array
from jax.sharding import PartitionSpec

from tx_async.layers.residuals import keep

LoraWeights = dict[str, dict[str, tuple[Any, Any]]]
LayerLora = dict[str, tuple[Array, Array]]
"""One layer's slice: name -> (A [adapters, in, rank], B [adapters, rank, out])."""


LoraGroup = Literal["attn", "mlp", "unembed"]
"""The parts of a model that `AdapterConfig` switches on and off."""


@dataclass(frozen=True)
class LoraTarget:
    """One family of adapted matrices: the same projection in every layer of a stack."""

    group: LoraGroup
    in_features: int
    out_features: int
    hf_names: tuple[str, ...]
    """Hugging Face module path of each layer's matrix, for example `model.layers.0.self_attn.q_proj`."""
    num_experts: int = 0


RowFunction = Callable[[Array, Array, Array, Array], Array]
"""(A [in, rank], B [rank, out], scale [], x [L, …]) of one row -> [L, …]."""


class ExpertLora(NamedTuple):
    """The adapters of one layer's experts, for `layers/moe.py`."""

    weights: LayerLora
    """name -> (A [adapters, experts, in, rank], B [adapters, experts, rank, out])."""
    scale: Array
    """[adapters] fp32."""
    row_adapter: Array | None
    """[R] int32, -1 = none; None where the adapter axis is the row axis."""
    layer: Array | None = None
    """Set where the weights hold every layer of a stack, on an axis before the adapters': the layer that is meant."""

    @property
    def of_layer(self) -> ExpertLora:
        """The same with the weights of its layer alone."""
        if self.layer is None:
            return self
        index = partial(jax.lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return ExpertLora(jax.tree.map(index, self.weights), self.scale, self.row_adapter)


class Lora(Protocol):
    """The adapters of a batch, whichever way they are applied."""

    @property
    def weights(self) -> Any:
        """stack -> name -> what a scan over layers slices and hands to the methods below."""
        ...

    def of_experts(self, layer: LayerLora) -> ExpertLora:
        """Nothing is copied: where adapters are stacked over layers, so they stay (`ExpertLora.layer`)."""
        ...

    def per_row(self, ab: tuple[Array, Array], function: RowFunction, x: Array) -> Array:
        """Call `function` on each row with its adapter's matrices; rows without one give zeros. For arithmetic that is
        no plain (x A) B."""
        ...

    def deltas(self, layer: LayerLora, names: tuple[str, ...], x: Array) -> list[Array]:
        """x [R, L, in] -> for each name [R, L, out] in x's dtype. Names that the layer does not have give zeros at no
        cost."""
        ...

    def by_inputs(self, layer: LayerLora, name: str) -> tuple[tuple[Any, LayerLora], Any]:
        """((self, layer) with no more than `deltas` reads for that name, their specs on a mesh whose tensor axis cuts
        the inputs)."""
        ...


@struct.dataclass
class LoraRows:
    """Training: row r has the adapter at index r of the adapter axis."""

    weights: LoraWeights
    scale: Array
    """[R] fp32: LORA_ALPHA / rank of the row's adapter."""
    joined: bool = struct.field(pytree_node=False, default=False)
    """Set for one row alone: `linear.project` forms x W + (x A) B as one product."""

    def of_experts(self, layer: LayerLora) -> ExpertLora:
        return ExpertLora(layer, self.scale, None)

    def per_row(self, ab: tuple[Array, Array], function: RowFunction, x: Array) -> Array:
        a, b = (w.astype(x.dtype) for w in ab)
        return jax.vmap(function)(a, b, self.scale, x)

    def deltas(self, layer: LayerLora, names: tuple[str, ...], x: Array) -> list[Array]:
        return [self._delta(layer[name], x) for name in names]

    def _delta(self, ab: tuple[Array, Array], x: Array) -> Array:
        a, b = ab
        return jnp.einsum("rlk,rko->rlo", self.low(a, x), b.astype(x.dtype))

    def from_low(self, low: Array, b: Array) -> Array:
        """low [R, L, rank], x A in x's dtype -> (x A) B · scale [R, L, out]."""
        return jnp.einsum("rlk,rko->rlo", self._scaled(low, low.dtype), b.astype(low.dtype))

    def by_inputs(self, layer: LayerLora, name: str) -> tuple[tuple[Any, LayerLora], Any]:
        lora, whole = replace(self, weights={}), PartitionSpec()
        specs = replace(lora, scale=whole), {name: (PartitionSpec(None, "tensor"), whole)}
        return (lora, {name: layer[name]}), specs

    def by_outputs(self, layer: LayerLora, names: tuple[str, ...]) -> tuple[tuple[Any, LayerLora], Any]:
        """Like `by_inputs`, where the tensor axis cuts the outputs."""
        lora, whole = replace(self, weights={}), PartitionSpec()
        specs = replace(lora, scale=whole), dict.fromkeys(names, (whole, PartitionSpec(None, None, "tensor")))
        return (lora, {name: layer[name] for name in names}), specs

    def low(self, a: Array, x: Array) -> Array:
        """x A · scale [R, L, rank] in x's dtype."""
        return self._scaled(self.unscaled_low(a, x), x.dtype)

    @staticmethod
    def unscaled_low(a: Array, x: Array) -> Array:
        """x A [R, L, rank] in fp32."""
        return jnp.einsum("rld,rdk->rlk", x, a.astype(x.dtype), preferred_element_type=jnp.float32)

    def _scaled(self, low: Array, dtype: Any) -> Array:
        return keep((low * self.scale[:, None, None]).astype(dtype))


def _low_rank(a: Array, b: Array, scale: Array, x: Array) -> Array:
    """The plain (x A) B · scale of one row."""
    low = jnp.einsum("ld,dk->lk", x, a, preferred_element_type=jnp.float32)
    return jnp.einsum("lk,ko->lo", (low * scale).astype(x.dtype), b)


TILE_ROWS = 4


def tiles(row_adapter: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(tile_start, tile_adapter, num_tiles) of `LoraActive` for int32 [R]; there are fewest when rows are in order of
    their adapters."""
    num_rows, count = len(row_adapter), 0
    height, covered = min(TILE_ROWS, num_rows), np.zeros(num_rows, bool)
    start, adapter = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    for row in np.flatnonzero(row_adapter >= 0):
        if not covered[row]:
            first = min(int(row), num_rows - height)
            tile = slice(first, first + height)
            start[count], adapter[count], count = first, row_adapter[row], count + 1
            covered[tile] |= row_adapter[tile] == row_adapter[row]
    return start, adapter, count


@struct.dataclass
class InStack:
    """Where one layer's A and B lie in their stacks. A scan over layers slices these numbers, not the adapters of every
    slot."""

    layer: Array
    stack: str = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)


PairOfLayer = InStack | tuple[Array, Array]
"""One layer's A and B as `layers_apart` leaves them, or where they lie."""


@struct.dataclass
class LoraActive:
    """Sampling: rows choose among the adapters in the sampler slots."""

    slots: LoraWeights
    """A and B of every slot: stacks of layers, or what `layers_apart` makes of them."""
    scale: Array
    """[adapters] fp32."""
    active: Array
    """[adapters] int32: the first `num_active` entries are the adapters of this batch."""
    num_active: Array
    tile_start: Array
    """[R] int32: the first `num_tiles` entries are the tiles of this batch, TILE_ROWS consecutive rows each. A tile
    serves those of its rows that have its adapter; together the tiles serve every row that has one."""
    tile_adapter: Array
    num_tiles: Array
    row_adapter: Array
    """[R] int32: the adapter of each row; -1 = none."""

    @property
    def weights(self) -> dict[str, dict[str, Any]]:
        """What models go over layer by layer: lists as they are, and in place of stacks the numbers of their layers, so
        that only active adapters are ever read from them."""

        def of_layers(path: tuple[str, str], ab: tuple[Any, Any]) -> Any:
            return ab if isinstance(ab[0], list) else InStack(jnp.arange(ab[0].shape[0]), *path)

        return by_path(of_layers, self.slots)

    def of_experts(self, layer: dict[str, PairOfLayer]) -> ExpertLora:
        pairs = {name: self._matrices(pair)[:2] for name, pair in layer.items()}
        places = (self._matrices(pair)[2] for pair in layer.values())
        return ExpertLora(pairs, self.scale, self.row_adapter, *next(places, ()))

    def per_row(self, pair: PairOfLayer, function: RowFunction, x: Array) -> Array:
        def rows_of(adapter: Array) -> Array:
            pair_of_one = self._adapter(pair, adapter, x.dtype, self._widest([pair]))
            return jax.vmap(partial(function, *pair_of_one, self.scale[adapter]))(x)

        def add_one(i: Array, total: Array) -> Array:
            adapter = self.active[i]
            return jnp.where(self._mine(adapter, total.ndim), rows_of(adapter), total)

        shape = jax.eval_shape(rows_of, self.active[0]).shape
        return jax.lax.fori_loop(0, self.num_active, add_one, jnp.zeros(shape, x.dtype))

    def deltas(self, layer: dict[str, PairOfLayer], names: tuple[str, ...], x: Array) -> list[Array]:
        """One adapter takes the whole batch at once; several take tiles of a few rows, so that each row is computed
        about once."""
        pairs = [layer[name] for name in names]
        height = min(TILE_ROWS, x.shape[0])
        zeros = [jnp.zeros_like(x, shape=(*x.shape[:-1], self._out_features(pair))) for pair in pairs]

        def whole() -> list[Array]:
            mine = self._mine(self.active[0], x.ndim)
            return [jnp.where(mine, delta, 0) for delta in self._deltas(pairs, self.active[0], x)]

        def add_tile(i: Array, totals: list[Array]) -> list[Array]:
            start, adapter = self.tile_start[i], self.tile_adapter[i]
            rows = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=height)
            mine, here = (rows(self.row_adapter) == adapter)[:, None, None], rows(x)
            deltas = self._deltas(pairs, adapter, here)
            new = [jnp.where(mine, delta, rows(total)) for delta, total in zip(deltas, totals, strict=True)]
            return [jax.lax.dynamic_update_slice_in_dim(t, n, start, 0) for t, n in zip(totals, new, strict=True)]

        def in_tiles() -> list[Array]:
            return jax.lax.fori_loop(0, self.num_tiles, add_tile, zeros)

        return jax.lax.cond(self.num_active == 1, whole, in_tiles)

    def by_inputs(self, layer: dict[str, PairOfLayer], name: str) -> tuple[tuple[Any, Any], Any]:
        pair = layer[name]
        stack = {pair.stack: {pair.name: self.slots[pair.stack][pair.name]}} if isinstance(pair, InStack) else {}
        lora = replace(self, slots=stack)
        specs: Any = jax.tree.map(lambda _: PartitionSpec(), (lora, {name: pair}))
        if isinstance(pair, InStack):
            stacks = by_path(lambda *_: (PartitionSpec(None, None, "tensor"), PartitionSpec()), lora.slots)
            return (lora, {name: pair}), (replace(specs[0], slots=stacks), specs[1])
        return (lora, {name: pair}), (specs[0], {name: (PartitionSpec(None, None, "tensor"), PartitionSpec())})

    def _deltas(self, pairs: list[PairOfLayer], adapter: Array, x: Array) -> list[Array]:
        return self._deltas_of_rank(pairs, adapter, x, self._widest(pairs))

    def _deltas_of_rank(self, pairs: list[PairOfLayer], adapter: Array, x: Array, rank: int) -> list[Array]:
        return [self._delta(pair, adapter, x, rank) for pair in pairs]

    def _widest(self, pairs: list[PairOfLayer]) -> int:
        return self._matrices(pairs[0])[0].shape[-1]

    def _delta(self, pair: PairOfLayer, adapter: Array, x: Array, rank: int) -> Array:
        a, b = self._adapter(pair, adapter, x.dtype, rank)
        low = jnp.einsum("rld,dk->rlk", x, a, preferred_element_type=jnp.float32)
        low = (low * self.scale[adapter]).astype(x.dtype)
        return jnp.einsum("rlk,ko->rlo", low, b)

    def _out_features(self, pair: PairOfLayer) -> int:
        return self._matrices(pair)[1].shape[-1]

    def _mine(self, adapter: Array, ndim: int) -> Array:
        return (self.row_adapter == adapter).reshape(-1, *[1] * (ndim - 1))

    def _adapter(self, pair: PairOfLayer, adapter: Array, dtype: Any, rank: int) -> list[Array]:
        """A [in, rank] and B [rank, out] of one adapter in one layer."""
        a, b, place = self._matrices(pair)
        at = (*place, adapter)

        def read(w: Array, shape: tuple[int, int]) -> Array:
            piece = jax.lax.dynamic_slice(w, (*at, 0, 0), (*[1] * len(at), *shape))
            return piece.reshape(shape).astype(dtype)

        return [read(a, (a.shape[-2], rank)), read(b, (rank, b.shape[-1]))]

    def _matrices(self, pair: PairOfLayer) -> tuple[Array, Array, tuple[Array, ...]]:
        """(A [..., in, rank], B [..., rank, out], where the layer is in them: of a stack its number, else nothing)"""
        if isinstance(pair, InStack):
            return *self.slots[pair.stack][pair.name], (pair.layer,)
        a, b = pair
        return turned(a), b, ()


@struct.dataclass
class LoraGrouped(LoraActive):
    """Without a branch, so that a step is one stretch of work for an accelerator. Rows of one token: all A's multiply
    every row, each row keeps what its own adapter made of it and zeros for the others, and one product with all B's
    adds up what is kept. Rows of many tokens: each brings its adapter. No row's NaN reaches another: rows are never
    added up, and zeros hide other adapters because the values of sampler slots are finite
    (`adapter_slots.write_finite`)."""

    def deltas(self, layer: dict[str, PairOfLayer], names: tuple[str, ...], x: Array) -> list[Array]:
        if x.shape[1] > 1:
            return [self.per_row(layer[name], _low_rank, x) for name in names]
        return [self._of_all(layer[name], x[:, 0])[:, None] for name in names]

    def per_row(self, pair: PairOfLayer, function: RowFunction, x: Array) -> Array:
        own = jnp.maximum(self.row_adapter, 0)
        *matrices, place = self._matrices(pair)
        a, b = (w[*place, own].astype(x.dtype) for w in matrices)
        rows = jax.vmap(function)(a, b, self.scale[own], x)
        return jnp.where(self._adapted(rows.ndim), rows, 0)

    def _of_all(self, pair: PairOfLayer, x: Array) -> Array:
        """x [R, in] -> [R, out]"""
        adapters, places = self._adapters_here(x.shape[0])
        *matrices, layer = self._matrices(pair)
        a, b = (w[layer] if adapters is None else w[layer][adapters] for w in matrices)
        scale = self.scale if adapters is None else self.scale[adapters]
        low = jnp.einsum("rd,sdk->rsk", x, a.astype(x.dtype), preferred_element_type=jnp.float32)
        low = (low * scale[:, None]).astype(x.dtype)
        mine = self._adapted(2) & (jnp.arange(scale.shape[0]) == places[:, None])
        low = jnp.where(mine[:, :, None], low, 0)
        return jnp.einsum("rk,ko->ro", low.reshape(x.shape[0], -1), b.astype(x.dtype).reshape(-1, b.shape[-1]))

    def _adapted(self, ndim: int) -> Array:
        """Which rows have an adapter."""
        return (self.row_adapter >= 0).reshape(-1, *[1] * (ndim - 1))

    def _adapters_here(self, num_rows: int) -> tuple[Array | None, Array]:
        """(the adapters to compute, None = those of every slot; the place of each row's adapter among them): no more
        adapters than rows."""
        if num_rows >= self.scale.shape[0]:
            return None, jnp.maximum(self.row_adapter, 0)
        adapters = self.active[:num_rows]
        return adapters, jnp.argmax(adapters == self.row_adapter[:, None], axis=1)


def init_weights(targets: dict[str, dict[str, LoraTarget]], num_adapters: int, rank: int) -> LoraWeights:
    """Zeros for `num_adapters` slots. A new adapter's values come from `engine/adapter_slots.py`."""

    def pair(target: LoraTarget) -> tuple[Array, Array]:
        experts = (target.num_experts,) if target.num_experts else ()
        lead = (len(target.hf_names) // max(1, target.num_experts), num_adapters, *experts)
        return jnp.zeros((*lead, target.in_features, rank)), jnp.zeros((*lead, rank, target.out_features))

    return jax.tree.map(pair, targets, is_leaf=lambda node: isinstance(node, LoraTarget))


def layer_slice(weights: Any, layer: int = 0) -> Any:
    """One layer's part of stacked arrays, or of lists of layers; by default of a stack of one layer (the
    unembedding)."""
    return jax.tree.map(lambda w: w[layer], weights, is_leaf=is_list)


def layers_apart(weights: LoraWeights) -> LoraWeights:
    """Stacked A and B of slots as lists of layers, A turned: [adapters, rank, in], and [adapters, rank, out]. So a
    product of all adapters reads A as it lies; from [adapters, in, rank] a GPU would copy it first, in every step."""
    return by_path(lambda _, ab: ([turned(a) for a in ab[0]], list(ab[1])), weights)


def turned(a: Array) -> Array:
    """[adapters, in, rank] as [adapters, rank, in], and back. Experts' matrices stay as they are: their kernels read
    each as it lies."""
    return a.swapaxes(1, 2) if a.ndim == 3 else a


def is_list(node: Any) -> bool:
    """Whether it holds layers one by one."""
    return isinstance(node, list)


def by_path(function: Callable[[tuple[str, str], Any], Any], tree: Any) -> Any:
    """The tree of function((stack, name), leaf) over all adapted matrices; a leaf is a pair (A, B) or whatever stands
    in its place."""
    visit: Any = function
    return path_aware_map(visit, tree)
