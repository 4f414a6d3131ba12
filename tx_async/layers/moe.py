"""Mixture of experts: a router, gated SiLU experts with LoRA on each, and shared experts that every token visits.

On a mesh each device computes the assignments of its own experts (`expert` axis) with its share of their features
(`tensor` axis) for its own rows (`fsdp` axis), and the results are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from tx_async.layers.block import ForwardPass, LayerWeights
from tx_async.layers.grouped import Activation, RowBlocks, block_shape, dispatch, experts_mlp, rearrange
from tx_async.layers.lora import ExpertLora, LayerLora
from tx_async.layers.mlp import GatedMlp, silu_gated
from tx_async.layers.residuals import keep
from tx_async.layers.router import ChosenSoftmaxRouter, SigmoidRouter, SoftmaxRouter
from tx_async.layers.sharding import row_axis
from tx_async.layers.weights import Dim, Stack, Weight

NAMES = ("gate", "up", "down")
BIASES = tuple(f"{name}_bias" for name in NAMES)
ROUTER = ("router", "router_bias")
Share = Callable[[LayerWeights, ExpertLora, Array], Array]
"""(w, lora, x) -> what a device adds to the output."""


@dataclass(frozen=True)
class MoeMlp:
    """Experts behind a router, with or without shared ones. An `Mlp`."""

    hidden_size: int
    intermediate_size: int
    """The features of one expert."""
    router: SoftmaxRouter | SigmoidRouter | ChosenSoftmaxRouter
    shared: GatedMlp | None = None
    bias: bool = False
    """Whether the experts' projections have biases."""
    activation: Activation = silu_gated
    shared_gate: bool = False
    """The shared expert's output is scaled by a sigmoid of the token (Qwen3-Next)."""

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, inner = Dim(self.hidden_size, "embed"), Dim(self.intermediate_size, "mlp")
        yield from self.router.weights(stack)
        for name, dims in zip(NAMES, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            yield stack.experts(name, f"mlp.experts.{{}}.{name}_proj", dims, self.router.num_experts)
            if self.bias:
                yield stack.expert_vectors(
                    f"{name}_bias", f"mlp.experts.{{}}.{name}_proj.bias", dims[1], self.router.num_experts
                )
        if self.shared:
            yield from self.shared.weights(stack)
        if self.shared_gate:
            yield stack.matrix("shared_share", "mlp.shared_expert_gate", (Dim(self.hidden_size), Dim(1)), None)

    def __call__(self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        routed = {name: w[name] for name in (*NAMES, *BIASES, *ROUTER) if name in w}
        lora = forward.lora.of_experts({name: adapters[name] for name in NAMES if name in adapters})
        cuts = _Cuts.of(forward.mesh, self.router.num_experts, self.intermediate_size, x.shape[0])
        out = cuts.summed(partial(self._share, forward.grouped_kernel, cuts), routed, lora, x)
        if self.shared is None:
            return out
        shared = self.shared(forward, w, adapters, x)
        if self.shared_gate:
            shared = shared * jax.nn.sigmoid(x @ w["shared_share"])
        return out + shared

    def features_of_a_device(self, mesh: Mesh | None) -> int:
        """How many of an expert's features each device of the mesh has."""
        cuts = _Cuts.of(mesh, self.router.num_experts, self.intermediate_size)
        return self.intermediate_size // (mesh.shape[cuts.features] if mesh and cuts.features else 1)

    def _share(self, kernel: bool, cuts: _Cuts, w: LayerWeights, lora: ExpertLora, x: Array) -> Array:
        """What one device adds to the output, with its own experts and features, for its own rows. Each device routes
        for itself: so the gradient by x is one sum over the devices, the router's part included."""
        experts, weights = self.router(w, x)
        if cuts.experts:
            experts = experts - jax.lax.axis_index(cuts.experts) * w["gate"].shape[0]
        if cuts.features and "down_bias" in w:  # every device would add it, and their results are summed
            w = w | {"down_bias": w["down_bias"] / jax.lax.axis_size(cuts.features)}
        num_devices = jax.lax.axis_size(cuts.experts) if cuts.experts else 1
        return routed(w, lora, x, experts, weights, self.activation, num_devices, kernel)


class _Cuts(NamedTuple):
    """The mesh axis that cuts each kind of axis here; None where it does not divide, and without a mesh."""

    mesh: Mesh | None = None
    rows: str | None = None
    experts: str | None = None
    features: str | None = None

    @classmethod
    def of(cls, mesh: Mesh | None, num_experts: int, intermediate_size: int, num_rows: int = 1) -> _Cuts:
        if mesh is None:
            return cls()
        return cls(
            mesh,
            rows=row_axis(mesh, num_rows),
            experts=None if num_experts % mesh.shape["expert"] else "expert",
            features=None if intermediate_size % mesh.shape["tensor"] else "tensor",
        )

    def summed(self, share: Share, w: LayerWeights, lora: ExpertLora, x: Array) -> Array:
        """The sum of share(w, lora, x) over the devices that have others' experts or features."""
        if self.mesh is None:
            return share(w, lora, x)
        lora = lora.of_layer  # a stack may be cut along `fsdp`: of one layer alone less is gathered
        axes = tuple(axis for axis in (self.experts, self.features) if axis)
        rows, shares = PartitionSpec(self.rows), PartitionSpec(axes or None, self.rows)
        # Interpreted kernels cannot be checked. The sum stands by itself, checked: so its gradient costs nothing.
        made = jax.shard_map(
            lambda *inputs: share(*inputs)[None],
            mesh=self.mesh,
            in_specs=(self._weights(w), self._lora(lora), rows),
            out_specs=shares,
            check_vma=False,
        )(w, lora, x)
        add = lambda share: jax.lax.psum(share[0], axes)  # noqa: E731
        return jax.shard_map(add, mesh=self.mesh, in_specs=shares, out_specs=rows)(made)

    def _weights(self, w: LayerWeights) -> dict[str, PartitionSpec]:
        """A bias is cut like the output of its matrix. The router is whole."""
        return {
            name: PartitionSpec(self.experts, *self._matrix(name.removesuffix("_bias"))[name.endswith("_bias") :])
            if name not in ROUTER
            else PartitionSpec()
            for name in w
        }

    def _lora(self, lora: ExpertLora) -> ExpertLora:
        """The adapters with specs in place of arrays."""
        adapters = self.rows if lora.row_adapter is None else None
        lead = (adapters, self.experts)
        pairs: Any = {
            name: (PartitionSpec(*lead, self._matrix(name)[0], None), PartitionSpec(*lead, None, self._matrix(name)[1]))
            for name in lora.weights
        }
        row_adapter: Any = None if lora.row_adapter is None else PartitionSpec(self.rows)
        return ExpertLora(pairs, PartitionSpec(adapters), row_adapter)  # type: ignore[arg-type]

    def _matrix(self, name: str) -> tuple[str | None, str | None]:
        return (self.features, None) if name == "down" else (None, self.features)


def routed(
    w: LayerWeights,
    lora: ExpertLora,
    x: Array,
    experts: Array,
    weights: Array,
    activation: Activation = silu_gated,
    num_devices: int = 1,
    kernel: bool = False,
) -> Array:
    """The experts' output, or one device's share of it. w: gate, up [E, D, F], down [E, F, D]; x [R, L, D];
    experts int32, weights fp32 [R, L, k]; out [R, L, D]. Experts outside of [0, E) contribute nothing. kernel: whether
    `grouped_kernel.py` computes it where it can."""
    (R, L, D), k, num_experts = x.shape, experts.shape[-1], w["gate"].shape[0]
    run, least = _experts_program(kernel, x, w)
    if L == 1:
        out = _of_one_token(partial(run, activation), least, w, lora, x, experts)
        return jnp.einsum("rlk,rlkd->rld", weights, out.astype(jnp.float32)).astype(x.dtype)
    blocks = block_shape(L * k, num_experts, num_devices, least)
    plan = dispatch(experts.reshape(R, L * k), num_experts, blocks)
    repeated = jnp.broadcast_to(x[:, :, None], (R, L, k, D)).reshape(R, L * k, D)
    inputs = rearrange(repeated, plan.source, plan.slot).reshape(-1, blocks[1], D)
    rows = jnp.arange(R, dtype=jnp.int32) if lora.row_adapter is None else lora.row_adapter
    made_with = RowBlocks(plan.expert.reshape(-1), jnp.repeat(rows, blocks[0]), plan.used.reshape(-1))
    out = keep(run(activation, inputs, made_with, w, lora._replace(row_adapter=None)))
    out = rearrange(out.reshape(R, -1, D), plan.slot, plan.source).reshape(R, L, k, D)
    return jnp.einsum("rlk,rlkd->rld", weights, out.astype(jnp.float32)).astype(x.dtype)


def _of_one_token(run: Any, height: int, w: LayerWeights, lora: ExpertLora, x: Array, experts: Array) -> Array:
    """Each expert's output [R, 1, k, D] for rows of one token. Its experts differ, so each gets a block of `height`
    rows to itself, of which the token is the first: there is nothing to sort."""
    (R, _, D), k = x.shape, experts.shape[-1]
    inputs = jnp.pad(
        jnp.broadcast_to(x[:, :, None], (R, 1, k, D)).reshape(R * k, 1, D), ((0, 0), (0, height - 1), (0, 0))
    )
    here = (experts >= 0) & (experts < w["gate"].shape[0])
    rows = jnp.arange(R, dtype=jnp.int32) if lora.row_adapter is None else lora.row_adapter
    blocks = RowBlocks(jnp.where(here, experts, 0).reshape(-1), jnp.repeat(rows, k), here.reshape(-1))
    return run(inputs, blocks, w, lora._replace(row_adapter=None))[:, 0].reshape(R, 1, k, D)


def _experts_program(kernel: bool, x: Array, w: LayerWeights) -> tuple[Any, int]:
    """(what computes the blocks, the least rows that a block has for it)"""
    if kernel:
        # Here, because a CPU that never needs Pallas should not wait for its import.
        from tx_async.layers import grouped_kernel

        if grouped_kernel.fits(x, w):
            return grouped_kernel.experts_mlp, grouped_kernel.ROWS_MIN
    return lambda activation, x, blocks, w, lora: experts_mlp(activation, x, blocks, w, lora.of_layer), 1
