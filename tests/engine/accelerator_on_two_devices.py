"""Run by `test_layers_apart.py` in a process with two fake CPU devices: the accelerator's ways on a mesh whose tensor
axis cuts heads, features and vocabulary in two, with kernels interpreted.

    python accelerator_on_two_devices.py <folder of the model> <folder for found.npz>

Prints what is no array as JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tests.engine.test_layers_apart import OTHER, run
from tx_async.engine import paged_kernel, prefill_kernel
from tx_async.engine.kernels import Kernels
from tx_async.engine.sharding import make_mesh
from tx_async.layers.flash_attention import flash_attention
from tx_async.wire.worker import EngineConfig


def main(model: str, folder: str) -> None:
    mesh = make_mesh(EngineConfig(tensor_parallel_size=2))
    heads: set[tuple[str, int]] = set()

    def interpreted(name: str, attend: Any) -> Any:
        def run(q: jax.Array, keys: jax.Array, *rest: Any, **options: Any) -> jax.Array:
            heads.add((name, keys.shape[2]))
            return attend(q, keys, *rest, **options, interpret=True)

        return run

    paged_kernel.fits = lambda pool, page_size: True  # also in fp32, in which a GPU would round
    paged_kernel.attend = interpreted("decode", paged_kernel.attend)
    prefill_kernel.attend = interpreted("prefill", prefill_kernel.attend)
    kernels = Kernels(paged_attention=True, paged_prefill=True)
    logprobs, gradients, tokens = run(OTHER, Path(model), Path(folder), mesh, kernels)
    arrays = {f"gradient {i}": np.asarray(x) for i, x in enumerate(gradients)} | {"logprobs": logprobs}
    arrays |= flash(None) | flash(mesh)
    np.savez(Path(folder) / "found.npz", allow_pickle=False, **arrays)
    print(json.dumps({"tokens": tokens, "num_gradients": len(gradients), "heads_of_kernels": sorted(heads)}))


def flash(mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Outputs and gradients of two packed rows."""
    rng = np.random.default_rng(0)
    q, k, v, direction = (jnp.asarray(rng.standard_normal((2, 128, n, 16)), jnp.bfloat16) for n in (4, 2, 2, 4))
    lengths = ((128,), (50, 78))
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in row]) for row in lengths], jnp.int32)
    segments = jnp.asarray([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths], jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def of(mesh: Mesh | None) -> Any:
        attend = lambda q, k, v: flash_attention(q, k, v, positions, segments, 0.25, True, mesh)  # noqa: E731
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(direction)

    names = (f"flash {name}{' on a mesh' if mesh else ''}" for name in ("out", "dq", "dk", "dv"))
    return {name: np.asarray(x, np.float32) for name, x in zip(names, of(mesh), strict=True)}


if __name__ == "__main__":
    main(*sys.argv[1:])
