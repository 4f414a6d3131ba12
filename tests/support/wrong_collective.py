"""The engine on a mesh where one collective computes something else on the last device, as broken links have done.

`WRONG_COLLECTIVE` names it, as `engine/mesh.py` does.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from tx_async.engine import engine, mesh
from tx_async.wire.worker import Welcome
from tx_async.worker.engine_api import ReportProgress

WRONG_VARIABLE = "WRONG_COLLECTIVE"


def create(welcome: Welcome, progress: ReportProgress) -> engine.JaxEngine:
    name = os.environ[WRONG_VARIABLE]
    mesh.COLLECTIVES[name] = _wrong(mesh.COLLECTIVES[name])
    return engine.create(welcome, progress)


def _wrong(collective: mesh.Collective) -> mesh.Collective:
    def compute(x: jax.Array, axis: str) -> jax.Array:
        right = collective(x, axis)
        is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
        return jnp.where(is_last, right.at[3].add(1.0), right)

    return compute
