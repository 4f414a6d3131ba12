"""What every decoder shares: embedding, scanned stacks of pre-norm layers, final norm, and the table of its
parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.layers.attention import Attend, Cache
from tx_async.layers.block import Attention, Mlp, Run
from tx_async.layers.linear import OutFirst
from tx_async.layers.lora import Lora, LoraTarget
from tx_async.layers.norm import rms_norm
from tx_async.layers.residuals import KEPT_ONLY
from tx_async.layers.rope import Rope
from tx_async.layers.sharding import gathered_spec_of
from tx_async.layers.weights import Dim, Stack, Weight

Params = dict[str, Any]
Segments = tuple[tuple[Stack, ...], ...]


@dataclass(frozen=True)
class Decoder:
    """Parameters: embed [V, D], norm [D], head [V, D] if it is not tied (see `unembedding`), and a dict of stacked
    arrays per stack (see `weights`).

    Frozen and hashable: a model is the static part of a program, `params` are its arrays.
    """

    has_extra_layers: ClassVar[bool] = False
    """Files of this family hold layers past `num_layers` (multi-token prediction) that nothing here uses."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tied: bool
    rope: Rope
    attention: Attention
    mlps: tuple[tuple[str, Mlp], ...]
    """(kind of layer, its MLP)."""
    segments: Segments
    """Each segment is one scan; most models have a single one of a single stack."""
    mesh: Mesh | None = None
    """Where it is sharded; set by `load_model`."""

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]:
        """What one token of one layer stores: name -> (heads, features)."""
        return self.attention.cache_shapes

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(stack for segment in self.segments for stack in segment)

    def mlp_of(self, stack: Stack) -> Mlp:
        return dict(self.mlps)[stack.kind]

    @property
    def cache_layers(self) -> int:
        return self.num_layers

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter, once: what is loaded, sharded, adapted and exported."""
        hidden, vocab = Dim(self.hidden_size, "embed"), Dim(self.vocab_size, "vocab")
        weights = [
            Weight("", "embed", (vocab, hidden), ("model.embed_tokens.weight",)),
            Weight("", "norm", (Dim(self.hidden_size),), ("model.norm.weight",)),
        ]
        if not self.tied:
            weights.append(Weight("", "head", (vocab, hidden), ("lm_head.weight",)))
        for stack in self.stacks:
            weights.append(stack.vector("input_norm", "input_layernorm.weight", Dim(self.hidden_size)))
            weights.append(stack.vector("post_norm", "post_attention_layernorm.weight", Dim(self.hidden_size)))
            weights.extend(self.attention.weights(stack))
            weights.extend(self.mlp_of(stack).weights(stack))
        return tuple(weights)

    def lora_targets(self) -> dict[str, dict[str, LoraTarget]]:
        """stack -> name -> target, in the order of `weights`; the unembedding is the stack "head" of one layer."""
        targets: dict[str, dict[str, LoraTarget]] = {stack.name: {} for stack in self.stacks}
        for weight in self.weights:
            if weight.group:
                targets[weight.stack][weight.name] = weight.lora_target
        targets["head"] = {"head": LoraTarget("unembed", self.hidden_size, self.vocab_size, ("lm_head",))}
        return targets

    def for_decoding(self, params: Params) -> Params:
        """The same numbers once more, laid out for steps of few tokens on a CPU: a list of layers for each stack, since
        a scan copies each layer out of its stack, and projections as `OutFirst`. Memory: all layers' weights again."""
        return {
            "embed": params["embed"],
            "norm": params["norm"],
            "head": OutFirst(unembedding(params)),
            **{stack.name: [self._layer(params, stack, i) for i in range(len(stack.layers))] for stack in self.stacks},
        }

    def _layer(self, params: Params, stack: Stack, index: int) -> Params:
        def laid_out(weight: Weight) -> Any:
            w = params[stack.name][weight.name][index]
            return OutFirst(w.T) if weight.projects else w

        return {weight.name: laid_out(weight) for weight in self.weights if weight.stack == stack.name}

    def forward(
        self,
        params: Params,
        lora: Lora,
        tokens: Array,
        positions: Array,
        attend: Attend,
        cache: Cache = (),
        remat: bool = False,
    ) -> tuple[Array, Cache]:
        """tokens, positions int32 [R, L] -> (hidden [R, L, D] after the final norm, cache).

        remat: a layer keeps only its input for the backward pass.
        """
        x, run = self._by_rows(params["embed"][tokens]), Run(lora, self.rope(positions), attend, self.mesh)
        for segment in self.segments:
            body = partial(self._run_layers, segment, run)
            layers = tuple((jnp.array(s.layers), params[s.name], lora.weights.get(s.name, {})) for s in segment)
            if isinstance(params[segment[0].name], list):
                x, cache = _one_by_one(body, (x, cache), layers)
                continue
            # Inside of a scan the compiler cannot merge the repeated work with the first, so nothing need stop it.
            body = jax.checkpoint(body, prevent_cse=False, policy=None if remat else KEPT_ONLY)
            (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return rms_norm(x, params["norm"], self.rms_norm_eps), cache

    def _run_layers(
        self, segment: tuple[Stack, ...], run: Run, carry: tuple[Array, Cache], layers: tuple[Any, ...]
    ) -> tuple[tuple[Array, Cache], None]:
        x, cache = carry
        for stack, (index, w, adapters) in zip(segment, layers, strict=True):
            w = self._gathered(stack, w)
            out, cache = self.attention(run, w, adapters, self._norm(x, w["input_norm"]), cache, index)
            x = self._by_rows(x + out)
            x = x + self.mlp_of(stack)(run, w, adapters, self._norm(x, w["post_norm"]))
        return (self._by_rows(x), cache), None

    def _gathered(self, stack: Stack, w: Params) -> Params:
        """One layer's weights, whole along `fsdp` while it runs."""
        if self.mesh is None:
            return w
        specs = {x.name: gathered_spec_of(x, self.mesh) for x in self.weights if x.stack == stack.name}
        shardings = {name: NamedSharding(self.mesh, specs[name]) for name in w}
        return jax.lax.with_sharding_constraint(w, shardings)

    def _by_rows(self, x: Array) -> Array:
        """Rows stay on their devices, so that weights come to them and not the other way round."""
        if self.mesh is None or x.shape[0] % self.mesh.shape["fsdp"]:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec("fsdp")))

    def _norm(self, x: Array, weight: Array) -> Array:
        return rms_norm(x, weight, self.rms_norm_eps)


def unembedding(params: Params) -> Any:
    """The head [V, D]; of a tied model the embedding itself."""
    return params.get("head", params["embed"])


def _one_by_one(body: Any, carry: tuple[Array, Cache], layers: tuple[Any, ...]) -> tuple[Array, Cache]:
    """A scan over layers whose weights are a list."""
    body = jax.jit(body)  # traced once for all layers; the compiler puts it in the place of each call
    for i in range(len(layers[0][0])):
        of_layer = tuple((index[i], w[i], jax.tree.map(lambda x, i=i: x[i], lora)) for index, w, lora in layers)
        carry, _ = body(carry, of_layer)
    return carry
