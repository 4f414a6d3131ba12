"""How an engine gets its arrays: made on the device, or only described, for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

Allocate = Callable[[Callable[[], Any], Any], Any]
"""(what makes a tree of arrays; their shardings, whole subtrees in one, or None) -> the arrays."""


def on_device(make: Callable[[], Any], shardings: Any = None) -> Any:
    """Make the arrays where they will lie, with one program."""
    return jax.jit(make, out_shardings=shardings)()


def described_on(device: Any) -> Allocate:
    """Make shapes instead of arrays, on `device` unless a sharding says otherwise. An engine made of them has every
    program that it would have on the device, and `bench/gpu_programs.py` compiles those without the device."""

    def allocate(make: Callable[[], Any], shardings: Any = None) -> Any:
        shapes = jax.eval_shape(make)
        given = SingleDeviceSharding(device) if shardings is None else shardings
        full = jax.tree.broadcast(given, shapes, is_leaf=lambda x: isinstance(x, Sharding))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, full)

    return allocate
