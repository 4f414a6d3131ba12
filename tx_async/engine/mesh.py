"""Makes one mesh of the processes: join the others, count the devices, and trust no collective before it has been
tried.

Every process of a mesh runs this, then the same programs in the order of the command stream. The engine itself
exchanges nothing: a program's inputs are host arrays that every process has (the stream brought them), its results come
back whole on every device, and process 0 answers for all.

A mesh that cannot work is a `ConfigError`: it is the last message that this process sends to the server, and the
operator reads it in the logs of both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.engine import compilation, platform
from tx_async.engine.platform import Platform
from tx_async.engine.sharding import make_mesh
from tx_async.errors import ConfigError
from tx_async.layers.lora import by_path
from tx_async.layers.sharding import AXES, axes_of, spec_of
from tx_async.models.decoder import Decoder
from tx_async.wire.worker import EngineConfig
from tx_async.worker.engine_api import ReportProgress

JOIN_S = 300
"""How long a process waits for the others of its mesh."""
SELF_TEST_SIZES = (4, 65_536)
"""Elements per device: a message that travels alone, and one that is cut into pieces."""
Collective = Callable[[jax.Array, str], jax.Array]
"""(one device's values [n], axis) -> what that device has afterwards; n is a multiple of the axis's size."""

#: by name: XLA's own names, under which each is tried
COLLECTIVES: dict[str, Collective] = {
    "all-reduce": jax.lax.psum,
    "all-gather": partial(jax.lax.all_gather, tiled=True),
    "reduce-scatter": partial(jax.lax.psum_scatter, tiled=True),
    "all-to-all": partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
}

log = logging.getLogger(__name__)


def build(config: EngineConfig, process_id: int, progress: ReportProgress) -> Mesh | None:
    """The mesh of all devices of all processes, tried out; None for one device alone. Call before any use of JAX.

    Raises `ConfigError` when processes, devices and parallel sizes do not fit together, or a collective is wrong.
    """
    if config.num_processes > 1:
        _join(config, process_id, progress)
    mesh = _mesh_of_all(config)
    compilation.keep_cache_on_every_host()
    if mesh is not None:
        progress("testing collectives", 0, 1)
        here = platform.current()
        _refuse_wrong(wrong_collectives(mesh), here)
        log.info("the mesh is %s, %s of %d devices", dict(mesh.shape), here.name, mesh.size)
    return mesh


def _mesh_of_all(config: EngineConfig) -> Mesh | None:
    try:
        return make_mesh(config)
    except ConfigError:
        if config.num_processes > 1:
            # The first process that fails closes the connection: the others must have counted before, to know why.
            multihost_utils.sync_global_devices("counted devices")
        raise


def _join(config: EngineConfig, process_id: int, progress: ReportProgress) -> None:
    if not config.coordinator_address:
        raise ConfigError(
            f"num_processes is {config.num_processes}, so backend_config needs coordinator_address: host:port, "
            "free on the host of process 0 and reachable from every other."
        )
    progress("joining the mesh", 0, config.num_processes)
    # Only the CPU's client reads it; the other implementations would need MPI.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take the handling of SIGTERM from the worker, which knows how to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator_address, config.num_processes, process_id, initialization_timeout=JOIN_S
        )
    except ValueError as error:
        raise ConfigError(f"coordinator_address {config.coordinator_address!r} does not work: {error}") from error


def _refuse_wrong(wrong: list[str], here: Platform) -> None:
    """Except for a reduce-scatter that is not trusted anyway: `compilation.py` lets no program use it."""
    for line in wrong:
        log.error("wrong on this mesh: %s", line)
    if fatal := [line for line in wrong if here.reduce_scatter or not line.startswith("reduce-scatter")]:
        raise ConfigError(f"The devices of this mesh do not compute together: {'; '.join(fatal)}.")


# ---- the self-test


def wrong_collectives(mesh: Mesh) -> list[str]:
    """Every collective over every axis of more than one device, with values whose results are exact: one line for
    each that is wrong on a device of this process, "all-reduce over tensor gives …"."""
    wrong: dict[str, None] = {}
    for axis in (axis for axis in AXES if mesh.shape[axis] > 1):
        for size in SELF_TEST_SIZES:
            wrong |= dict.fromkeys(_wrong_over(mesh, axis, size))
    return list(wrong)


def _wrong_over(mesh: Mesh, axis: str, size: int) -> Iterator[str]:
    count = mesh.shape[axis]
    inputs = (np.arange(mesh.size * count * size) % 1021).astype(np.float32).reshape(*mesh.devices.shape, -1)
    results = _collectives(mesh, axis)(to_mesh(inputs, NamedSharding(mesh, PartitionSpec(*AXES))))
    expected = _expected(inputs, AXES.index(axis))
    for name, result, right in zip(COLLECTIVES, results, expected, strict=True):
        for shard in result.addressable_shards:
            found = np.asarray(shard.data)
            if not np.array_equal(found, right[shard.index]):
                first = int(np.flatnonzero((found != right[shard.index]).ravel())[0])
                yield (
                    f"{name} over {axis} gives {found.flat[first]} instead of {right[shard.index].flat[first]} "
                    f"(element {first} of {found.size} on {shard.device})"
                )


def _collectives(mesh: Mesh, axis: str) -> Any:
    def each(x: jax.Array) -> tuple[jax.Array, ...]:
        one = x.reshape(-1)
        return tuple(collective(one, axis).reshape(1, 1, 1, -1) for collective in COLLECTIVES.values())

    spec = PartitionSpec(*AXES)
    # What comes out is equal along `axis`, and is looked at on every device all the same.
    return jax.jit(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _expected(inputs: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """inputs [fsdp, expert, tensor, n]: what each device has afterwards, in the same layout."""
    total = np.broadcast_to(inputs.sum(axis, keepdims=True), inputs.shape)
    gathered = np.moveaxis(inputs, axis, -2)
    gathered = np.expand_dims(gathered.reshape(*gathered.shape[:-2], -1), axis)
    gathered = np.broadcast_to(gathered, (*inputs.shape[:3], gathered.shape[-1]))
    count = inputs.shape[axis]
    pieces = np.moveaxis(total.reshape(*inputs.shape[:3], count, -1), axis, 0)
    scattered = np.stack([piece[..., rank, :] for rank, piece in enumerate(pieces)], axis)
    sent = np.moveaxis(inputs, axis, 0)  # [sender, …, n]
    exchanged = np.moveaxis(sent.reshape(*sent.shape[:3], count, -1), (3, 0), (0, 3)).reshape(sent.shape)
    return total, gathered, scattered, np.moveaxis(exchanged, 0, axis)


# ---- between the hosts and the mesh


def to_mesh(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, equal on every process, as global arrays: each device gets its piece."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


AdapterShardings = dict[str, dict[str, tuple[NamedSharding, NamedSharding]]]


def adapter_shardings(model: Decoder, mesh: Mesh) -> AdapterShardings:
    """How (A, B) of every adapted matrix lie: cut where their base weight is, whole along slots and rank. The
    unembedding's A is whole."""
    whole = NamedSharding(mesh, PartitionSpec(None, None, None, None))
    vocab = spec_of(model.unembedding_weight, mesh)[0]
    of_head = whole, NamedSharding(mesh, PartitionSpec(None, None, None, vocab))
    shardings = by_path(lambda path, target: of_head, model.lora_targets())
    for weight in model.weights:
        if weight.stack and weight.group:
            _, *experts, inputs, outputs = spec_of(weight, mesh)
            a = PartitionSpec(None, None, *experts, inputs, None)
            b = PartitionSpec(None, None, *experts, None, outputs)
            shardings[weight.stack][weight.name] = NamedSharding(mesh, a), NamedSharding(mesh, b)
    return shardings


def training_shardings(model: Decoder, mesh: Mesh) -> AdapterShardings:
    """The same of what is trained: besides, `fsdp` cuts the inputs of every A and the outputs of every B, where it
    divides them. A training step takes whole adapters out of such pieces, once for each row (`adapter_rows.py`)."""
    targets = model.lora_targets()

    def cut(sharding: NamedSharding, axis: int, size: int) -> NamedSharding:
        names = [*sharding.spec]
        there = axes_of(names[axis])
        if mesh.shape["fsdp"] == 1 or "fsdp" in there or size % math.prod(mesh.shape[x] for x in (*there, "fsdp")):
            return sharding
        names[axis] = (*there, "fsdp")
        return NamedSharding(mesh, PartitionSpec(*names))

    def pair(path: tuple[str, str], ab: tuple[NamedSharding, NamedSharding]) -> tuple[NamedSharding, NamedSharding]:
        target = targets[path[0]][path[1]]
        return cut(ab[0], -2, target.in_features), cut(ab[1], -1, target.out_features)

    return by_path(pair, adapter_shardings(model, mesh))
