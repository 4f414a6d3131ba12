"""Linear layers: a frozen base weight, an optional bias, and LoRA beside them."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from tx_async.layers.cpu import OutFirst, joined
from tx_async.layers.lora import LayerLora, Lora, LoraRows
from tx_async.layers.residuals import keep
from tx_async.layers.sharding import is_cut
from tx_async.layers.weights import Dim


def product(x: Array, w: Array | OutFirst, dtype: Any = None) -> Array:
    """x [..., in] W -> [..., out] in `dtype`, by default x's own."""
    if isinstance(w, OutFirst):
        return w.product(x, dtype)
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def project(lora: Lora, adapters: LayerLora, w: dict[str, Any], names: tuple[str, ...], x: Array) -> list[Array]:
    """x [R, L, in] -> for each name x W + bias + (x A) B · scale, [R, L, out]."""
    adapted = tuple(name for name in names if name in adapters)
    row = lora if isinstance(lora, LoraRows) and lora.joined else None
    deltas = {} if row or not adapted else dict(zip(adapted, lora.deltas(adapters, adapted, x), strict=True))

    def one(name: str) -> Array:
        if row and name in adapted:
            a, b = adapters[name]
            y = joined(x[0], row.low(a, x)[0], w[name], b[0].astype(x.dtype))[None]
        else:
            y = product(x, w[name])
        return keep(_add(_add(y, w.get(f"{name}_bias")), deltas.get(name)))

    return [one(name) for name in names]


def project_out(
    mesh: Mesh | None,
    outputs: tuple[Dim, ...],
    lora: Lora,
    adapters: LayerLora,
    w: dict[str, Any],
    names: tuple[str, ...],
    x: Array,
) -> list[Array]:
    """`project` for matrices that lead away from the hidden features, whose `outputs` the tensor axis may cut. Only in
    training do devices exchange anything, in the backward pass: a row alone sums its gradient by x once, for all these
    matrices and their adapters, and A's gradients, which can wait."""
    row = lora if isinstance(lora, LoraRows) and x.shape[0] == 1 else None
    are_cut = all(is_cut(dim, mesh) for dim in outputs)
    if row is None or not are_cut or not all(name in adapters for name in names):
        return project(lora, adapters, w, names, x)

    def share(x: Array, matrices: list[Array], adapter: tuple[Any, LayerLora]) -> list[Array]:
        x, (lora, layer) = _vary(whole, x), jax.tree.map(_vary, of_adapter, adapter)
        deltas = lora.deltas(layer, names, x)
        return [product(x, matrix) + delta for matrix, delta in zip(matrices, deltas, strict=True)]

    whole, cut = PartitionSpec(), PartitionSpec(None, None, "tensor")
    adapter, of_adapter = row.by_outputs(adapters, names)
    specs = (whole, [PartitionSpec(None, "tensor")] * len(names), of_adapter)
    run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=[cut] * len(names), axis_names={"tensor"})
    made = run(x, [w[name] for name in names], adapter)
    return [keep(_add(y, w.get(f"{name}_bias"))) for name, y in zip(names, made, strict=True)]


def project_back(
    mesh: Mesh | None, inputs: Dim, lora: Lora, adapters: LayerLora, w: dict[str, Any], name: str, x: Array
) -> Array:
    """`project` for the matrix that leads back to the hidden features, whose `inputs` the tensor axis may cut. Then
    each device adds its shares of the product and of the adapter's part, and one sum over the devices is all that they
    exchange. In training that sums B's gradients instead of what A makes: of several rows, each with a B, that is more,
    so theirs is the sum of two."""
    if not is_cut(inputs, mesh) or name not in adapters:
        return project(lora, adapters, w, (name,), x)[0]
    if isinstance(lora, LoraRows) and x.shape[0] > 1:
        y = _summed_rows(mesh, lora, adapters[name], w[name], x)
        return keep(_add(y, w.get(f"{name}_bias")))

    def share(x: Array, matrix: Array, adapter: tuple[Any, LayerLora]) -> Array:
        # What is whole on every device, too: so the gradients of B are summed as they are kept, in fp32.
        lora, layer = jax.tree.map(_vary, of_adapter, adapter)
        return jax.lax.psum(product(x, matrix) + lora.deltas(layer, (name,), x)[0], "tensor")

    adapter, of_adapter = lora.by_inputs(adapters, name)
    specs = (PartitionSpec(None, None, "tensor"), PartitionSpec("tensor"), of_adapter)
    whole = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names={"tensor"})
    return keep(_add(whole(x, w[name], adapter), w.get(f"{name}_bias")))


def _summed_rows(mesh: Mesh | None, rows: LoraRows, ab: tuple[Array, Array], matrix: Any, x: Array) -> Array:
    """x W + (x A) B · scale of several rows, whose features the tensor axis cuts. What W and A make is summed over the
    devices at once, in one dtype: the compiler joins no others."""

    def share(x: Array, matrix: Any, a: Array) -> tuple[Array, Array]:
        return jax.lax.psum((product(x, matrix), rows.unscaled_low(a, x).astype(x.dtype)), "tensor")

    (a, b), whole = ab, PartitionSpec()
    specs = PartitionSpec(None, None, "tensor"), PartitionSpec("tensor"), PartitionSpec(None, "tensor")
    run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=(whole, whole), axis_names={"tensor"})
    y, low = run(x, matrix, a)
    return y + rows.from_low(low, b)


def _vary(spec: PartitionSpec, x: Array) -> Array:
    return x if "tensor" in spec else jax.lax.pcast(x, "tensor", to="varying")


def _add(x: Array, y: Array | None) -> Array:
    return x if y is None else x + y
