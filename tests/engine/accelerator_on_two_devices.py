"""Run by `test_layers_apart.py` in a process with two fake CPU devices: the accelerator's ways, with kernels
interpreted, on a mesh whose tensor axis cuts heads, features and vocabulary in two, and on one whose fsdp axis cuts
rows and weights.

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
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import DecodeAttention
from tx_async.engine.sharding import make_mesh
from tx_async.layers.flash_attention import flash_attention
from tx_async.wire.worker import EngineConfig


def main(model: str, folder: str) -> None:
    mesh = make_mesh(EngineConfig(tensor_parallel_size=2))
    heads: set[tuple[str, int, int]] = set()

    def interpreted(name: str, attend: Any) -> Any:
        def run(q: jax.Array, pools: list[jax.Array], *rest: Any, **options: Any) -> jax.Array:
            heads.add((name, q.shape[-2], pools[0].shape[2]))
            return attend(q, pools, *rest, **options, interpret=True)

        return run

    paged_kernel.fits = lambda *shape: True  # also in fp32, in which a GPU would round
    paged_kernel.attend = interpreted("decode", paged_kernel.attend)
    prefill_kernel.attend = interpreted("prefill", prefill_kernel.attend)
    kernels = Kernels(paged_attention=True, paged_prefill=True)
    arrays, of_model, tokens, num_gradients = {}, [], {}, 0
    for way, of_way in (("tensor", mesh), ("fsdp", make_mesh(EngineConfig(fully_sharded_data_parallel_size=2)))):
        logprobs, gradients, tokens[way] = run(OTHER, Path(model), Path(folder) / way, of_way, kernels)
        arrays |= {f"{way} gradient {i}": np.asarray(x) for i, x in enumerate(gradients)}
        arrays |= {f"{way} logprobs": logprobs}
        of_model, num_gradients = of_model or sorted(heads), len(gradients)
    arrays |= flash(None) | flash(mesh) | latents(None) | latents(mesh)
    np.savez(Path(folder) / "found.npz", allow_pickle=False, **arrays)
    print(json.dumps({"tokens": tokens, "num_gradients": num_gradients, "heads_of_kernels": of_model}))


def flash(mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Outputs and gradients of two packed rows, with a window and sinks."""
    rng = np.random.default_rng(0)
    q, k, v, direction = (jnp.asarray(rng.standard_normal((2, 128, n, 16)), jnp.bfloat16) for n in (4, 2, 2, 4))
    sinks, lengths = jnp.linspace(-2.0, 4.0, 4), ((128,), (50, 78))
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in row]) for row in lengths], jnp.int32)
    segments = jnp.asarray([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths], jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def of(mesh: Mesh | None) -> Any:
        attend = lambda q, k, v: flash_attention(q, k, v, sinks, positions, segments, 0.25, 40, True, mesh)  # noqa: E731
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(direction)

    names = (f"flash {name}{' on a mesh' if mesh else ''}" for name in ("out", "dq", "dk", "dv"))
    return {name: np.asarray(x, np.float32) for name, x in zip(names, of(mesh), strict=True)}


def latents(mesh: Mesh | None) -> dict[str, np.ndarray]:
    """What two rows of latent attention see, decoded: the kernel's heads are cut in two, its pool is not."""
    rng = np.random.default_rng(0)
    layout = CacheLayout.plan(cache_tokens=256, page_size=16, max_context_length=128)
    pool = jnp.asarray(rng.standard_normal((layout.num_pages, 16, 1, 48)), jnp.float32)
    q, k = (jnp.asarray(rng.standard_normal((2, 1, n, 48)), jnp.float32) for n in (4, 1))
    tables = jnp.asarray(rng.permutation(np.arange(1, 17)).reshape(2, 8), jnp.int32)
    positions = jnp.array([[3], [90]], jnp.int32)

    @jax.jit
    def of(pool: jax.Array) -> jax.Array:
        attend = DecodeAttention(layout, tables, positions, jnp.ones(2, bool), kernel=True, mesh=mesh)
        return attend({"k": pool}, jnp.int32(0), q, k, None, 0.3, v_features=32)[0]

    return {"latents on a mesh" if mesh else "latents": np.asarray(of(pool))}


if __name__ == "__main__":
    main(*sys.argv[1:])
