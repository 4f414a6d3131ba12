"""Models with random weights, made on the device, and engines for them, made as a worker makes its own: kernels that
passed their self-tests, and a plan of the memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.engine import memory_plan, platform
from tx_async.engine.engine import JaxEngine
from tx_async.engine.kernel_uses import choose_for
from tx_async.engine.kernels import Kernels
from tx_async.engine.platform import Platform, device_memory
from tx_async.layers.weights import Weight
from tx_async.models.decoder import Decoder, Params, layers_apart, tree_of
from tx_async.models.load import from_config
from tx_async.storage.store import Store
from tx_async.testing.models import QWEN3_TINY
from tx_async.wire.worker import EngineConfig

QWEN3 = QWEN3_TINY | {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": QWEN3_TINY,
}
RANK = 32
TINY_MEMORY = 4 * 2**30
"""The memory for which a tiny model's plan is made."""
TINY_CONFIG = {"train_row_lengths": (64, 256), "train_micro_batch_tokens": 256}


class Model:
    """One model, its weights, and what runs it here."""

    def __init__(self, name: str):
        self.is_tiny = name == "tiny"
        self.here: Platform = platform.current()
        self.decoder: Decoder = from_config(SHAPES[name])
        self.params = random_params(self.decoder, self.here)
        self.kernels: Kernels = choose_for(self.decoder, self.here)

    @property
    def num_params(self) -> int:
        return sum(weight.size for weight in jax.tree.leaves(self.params))

    @property
    def num_in_layers(self) -> int:
        """Parameters of all that a prompt's token runs through: no embedding, no head."""
        ends = sum(self.params[name].size for name in ("embed", "head") if name in self.params)
        return self.num_params - ends

    @property
    def attention_width(self) -> int:
        """Query features of all layers."""
        mixers: list[Any] = [layer.mixer for layer in self.decoder.layers]
        return sum(mixer.num_heads * mixer.head_dim for mixer in mixers)

    def delete(self) -> None:
        _delete(self.params)

    @contextmanager
    def engine(self, **config: Any) -> Iterator[JaxEngine]:
        """With slots of RANK, and otherwise as a server starts by default. Its memory is free afterwards."""
        wanted = EngineConfig(max_lora_rank=RANK, **(TINY_CONFIG if self.is_tiny else {}), **config)
        memory = TINY_MEMORY if self.is_tiny else device_memory()[1]
        planned = memory_plan.of_device(self.decoder, wanted, self.here, memory, self.kernels)
        with tempfile.TemporaryDirectory() as folder:
            engine = JaxEngine(
                self.decoder,
                self.params,
                wanted,
                Path(folder),
                Store(folder),
                on=self.here,
                planned=planned,
                kernels=self.kernels,
            )
            try:
                yield engine
            finally:
                engine.close()
                _delete((engine.training, engine.samplers.weights, engine.sampling.pools))


def _delete(arrays: Any) -> None:
    """Free their memory now, whoever still refers to them."""
    for array in jax.tree.leaves(arrays):
        array.delete()


def random_params(model: Decoder, here: Platform) -> Params:
    """Norms are one, matrices keep the size of what goes through them. Weight by weight, and with a generator whose
    random bits take twice the memory of what is made of them."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(model.weights))
    leaves = {weight: _random(weight, here.dtype, key) for weight, key in zip(model.weights, keys, strict=True)}
    params = jax.block_until_ready(tree_of(leaves))
    return layers_apart(params) if here.layers_apart else params


def _random(weight: Weight, dtype: str, key: Array) -> Array:
    if len(weight.dims) == 1:
        return jnp.ones(weight.shape, dtype)
    fan_in = weight.dims[1 if weight.name in ("embed", "head") else 0].size
    return uniform(key, jnp.asarray((3 / fan_in) ** 0.5, dtype), weight.shape, dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def uniform(key: Array, widest: Array, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.uniform(key, shape, dtype, -1, 1) * widest
