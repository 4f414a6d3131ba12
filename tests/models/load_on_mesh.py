"""Run by `test_load.py` with eight fake CPU devices: a model loaded onto a mesh is the model loaded whole.

Prints JSON: whether all values are equal, and whether every leaf lies as `param_shardings` says.
"""

import json
import sys

import jax
import numpy as np

from tx_async.engine.sharding import make_mesh, param_shardings
from tx_async.models.load import load_model
from tx_async.wire.worker import EngineConfig


def main(folder: str) -> None:
    mesh = make_mesh(EngineConfig(fully_sharded_data_parallel_size=2, expert_parallel_size=2, tensor_parallel_size=2))
    _, whole = load_model(folder)
    model, params = load_model(folder, mesh=mesh)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True))
    shardings = jax.tree.leaves(param_shardings(model, mesh))
    print(
        json.dumps(
            {
                "equal": all(np.array_equal(a, b) for a, b in pairs),
                "placed": all(a.sharding == s for (a, _), s in zip(pairs, shardings, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
