"""Grouped-query attention (Llama, Qwen): optional biases, optional RMSNorm on each head's query and key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jax import Array

from tx_async.layers.attention import Cache
from tx_async.layers.block import LayerWeights, Run
from tx_async.layers.linear import project
from tx_async.layers.lora import LayerLora
from tx_async.layers.norm import rms_norm
from tx_async.layers.rope import rotate
from tx_async.layers.weights import Dim, Stack, Weight


@dataclass(frozen=True)
class GroupedQueryAttention:
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    head_norm_eps: float = 0.0
    """Epsilon of the norms of queries and keys; 0 = the model has none."""

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]:
        return {"k": (self.num_kv_heads, self.head_dim), "v": (self.num_kv_heads, self.head_dim)}

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden = Dim(self.hidden_size, "embed")
        queries = Dim(self.num_heads * self.head_dim, "heads", self.num_heads)
        keys = Dim(self.num_kv_heads * self.head_dim, "kv_heads", self.num_kv_heads)
        yield from stack.linear("q", "self_attn.q_proj", (hidden, queries), "attn", self.bias)
        yield from stack.linear("k", "self_attn.k_proj", (hidden, keys), "attn", self.bias)
        yield from stack.linear("v", "self_attn.v_proj", (hidden, keys), "attn", self.bias)
        yield from stack.linear("o", "self_attn.o_proj", (queries, hidden), "attn", self.bias)
        if self.head_norm_eps:
            yield stack.vector("q_norm", "self_attn.q_norm.weight", Dim(self.head_dim))
            yield stack.vector("k_norm", "self_attn.k_norm.weight", Dim(self.head_dim))

    def __call__(
        self, run: Run, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        heads = partial(_heads, features=self.head_dim)
        q, k, v = map(heads, project(run.lora, adapters, w, ("q", "k", "v"), x))
        if self.head_norm_eps:
            q, k = rms_norm(q, w["q_norm"], self.head_norm_eps), rms_norm(k, w["k_norm"], self.head_norm_eps)
        q, k = rotate(q, *run.rotary), rotate(k, *run.rotary)
        out, cache = run.attend(cache, layer, q, k, v, self.head_dim**-0.5)
        return project(run.lora, adapters, w, ("o",), out.reshape(*x.shape[:2], -1))[0], cache


def _heads(x: Array, features: int) -> Array:
    return x.reshape(*x.shape[:2], -1, features)
