"""Gated DeltaNet (Qwen3-Next, Qwen3.5): a causal convolution over queries, keys and values, then the gated delta rule,
then a norm with a gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers import delta_rule
from tx_async.layers.attention import Cache
from tx_async.layers.block import ForwardPass, Keeps, LayerWeights
from tx_async.layers.delta_rule import Chunks, ChunkTransition, Inputs, Write
from tx_async.layers.linear import project, project_back
from tx_async.layers.lora import LayerLora
from tx_async.layers.norm import rms_norm
from tx_async.layers.rope import Rope
from tx_async.layers.weights import Dim, Stack, Weight

L2_EPS = 1e-6


class Mixed(NamedTuple):
    """The inputs that a token brings, before the convolution."""

    qkv: Array
    """[R, L, channels]"""
    g: Array
    """fp32 [R, L, value heads]"""
    beta: Array


@dataclass(frozen=True)
class GatedDeltaNet:
    """See the module, and `delta_rule.py` for the recurrence. A `Mixer`."""

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Features of a key head."""
    value_dim: int
    kernel: int
    """How many tokens the convolution sees."""
    eps: float
    interleaved: bool
    """Qwen3-Next has two projections, whose outputs are ordered by key head; the others have four."""

    @property
    def rope(self) -> Rope | None:
        return None

    @property
    def keeps(self) -> Keeps:
        state = (self.num_value_heads, self.key_dim, self.value_dim)
        return Keeps(state={"conv": ((self.kernel - 1, self.channels), False), "state": (state, True)})

    @property
    def channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def _values(self) -> Dim:
        return Dim(self.values, "heads", self.num_value_heads)

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, number, by_key = Dim(self.hidden_size, "embed"), self.num_value_heads, self.num_key_heads
        heads, values = Dim(number, "heads"), self._values
        made = {"qkv": Dim(self.channels, "mixed"), "z": values, "b": heads, "a": heads}
        if self.interleaved:
            made = {"qkvz": Dim(self.channels + self.values, "heads", by_key), "ba": Dim(2 * number, "heads", by_key)}
        for name, outputs in made.items():
            yield from stack.linear(name, f"linear_attn.in_proj_{name}", (hidden, outputs), "attn")
        yield from stack.linear("out", "linear_attn.out_proj", (values, hidden), "attn")
        dims = (Dim(self.channels), Dim(1), Dim(self.kernel))
        yield stack.tensor("conv", "linear_attn.conv1d.weight", dims)
        yield stack.vector("dt_bias", "linear_attn.dt_bias", heads, wide=True)
        yield stack.vector("a_log", "linear_attn.A_log", heads, wide=True)
        yield stack.vector("gated_norm", "linear_attn.norm.weight", Dim(self.value_dim))

    def __call__(
        self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        qkv, z, b, a = self._projected(forward, w, adapters, x)
        g = -jnp.exp(w["a_log"]) * jax.nn.softplus(a.astype(jnp.float32) + w["dt_bias"])
        mixed = Mixed(qkv, g, jax.nn.sigmoid(b.astype(jnp.float32)))
        out, cache = forward.attend.recur(cache, layer, Rule(self, w["conv"][:, 0]), mixed)
        out = rms_norm(out, w["gated_norm"], self.eps).astype(x.dtype).astype(jnp.float32)
        z = z.reshape(out.shape).astype(jnp.float32)
        out = (out * jax.nn.silu(z)).astype(x.dtype).reshape(*x.shape[:2], -1)
        return project_back(forward.mesh, self._values, forward.lora, adapters, w, "out", out), cache

    def _projected(self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array) -> list[Array]:
        """-> qkv [R, L, channels], z [R, L, values], b and a [R, L, value heads]."""
        if not self.interleaved:
            return project(forward.lora, adapters, w, ("qkv", "z", "b", "a"), x)
        by_head = (*x.shape[:2], self.num_key_heads, -1)
        qkvz, ba = (y.reshape(by_head) for y in project(forward.lora, adapters, w, ("qkvz", "ba"), x))
        values = self.values // self.num_key_heads
        q, k, v, z = jnp.split(qkvz, [self.key_dim, 2 * self.key_dim, 2 * self.key_dim + values], axis=-1)
        b, a = jnp.split(ba, 2, axis=-1)
        q, k, v, z, b, a = (y.reshape(*x.shape[:2], -1) for y in (q, k, v, z, b, a))
        return [jnp.concatenate([q, k, v], axis=-1), z, b, a]


class Rule(NamedTuple):
    """The recurrence of one layer, for each way in which tokens come in (`Attend.recur`)."""

    net: GatedDeltaNet
    kernel: Array
    """[channels, K]; the last column is for the token itself."""

    def packed(self, x: Mixed, positions: Array, segments: Array, chunks: Chunks) -> Array:
        """Training: rows of whole segments -> fp32 [R, L, value heads, value_dim]."""
        history = jnp.zeros((x.qkv.shape[0], self.net.kernel - 1, self.net.channels), x.qkv.dtype)
        return delta_rule.packed(self._inputs(x, history, positions), segments, chunks)

    def chunk(self, x: Mixed, history: Array, counts: Array) -> ChunkTransition:
        """Prefill: rows of C tokens of one sequence each, of which the first `counts` [R] are real.

        history [R, K - 1, channels]: the convolution's inputs before these.
        """
        there = jnp.arange(x.g.shape[1]) < counts[:, None]
        x = x._replace(g=jnp.where(there[..., None], x.g, 0.0), beta=jnp.where(there[..., None], x.beta, 0.0))
        inputs = self._inputs(x, history, jnp.full(x.g.shape[:2], self.net.kernel))
        same = jnp.zeros(x.g.shape[:2], jnp.int32)
        return ChunkTransition.of(inputs, same, same[:, 0])

    def step(self, x: Mixed, history: Array, state: Array) -> tuple[Write, Array]:
        """Decode: L = 1 -> (what makes the next state, fp32 [R, 1, value heads, value_dim])."""
        return delta_rule.step(self._inputs(x, history, jnp.full(x.g.shape[:2], self.net.kernel)), state)

    def history(self, x: Mixed, before: Array, counts: Array) -> Array:
        """The last K - 1 inputs of the convolution after `counts` [R] tokens."""
        rows = jnp.concatenate([before, x.qkv], axis=1)
        columns = counts[:, None] + jnp.arange(self.net.kernel - 1)
        return jnp.take_along_axis(rows, columns[..., None], axis=1)

    def _inputs(self, x: Mixed, history: Array, positions: Array) -> Inputs:
        """positions: how many tokens of the same segment come before."""
        net = self.net
        wide = jnp.concatenate([history, x.qkv], axis=1).astype(jnp.float32)
        length, total = x.qkv.shape[1], jnp.zeros(x.qkv.shape, jnp.float32)
        for back in range(net.kernel):
            first = net.kernel - 1 - back
            reaches = (positions >= back)[..., None]
            weight = self.kernel[:, first].astype(jnp.float32)
            total += jnp.where(reaches, wide[:, first : first + length], 0.0) * weight
        mixed = jax.nn.silu(total).astype(x.qkv.dtype).astype(jnp.float32)
        keys = net.num_key_heads * net.key_dim
        q, k, v = (y.reshape(*x.qkv.shape[:2], -1, d) for y, d in self._split(mixed, keys))
        group = net.num_value_heads // net.num_key_heads
        q, k = (jnp.repeat(_unit(y), group, axis=2) for y in (q, k))
        return Inputs(q * net.key_dim**-0.5, k, v, x.g, x.beta)

    def _split(self, mixed: Array, keys: int) -> list[tuple[Array, int]]:
        q, k, v = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        return [(q, self.net.key_dim), (k, self.net.key_dim), (v, self.net.value_dim)]


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + L2_EPS)
