"""A decoder: embedding, a list of layers, scanned where neighbours are of one kind, a final norm, and the table of its
parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.layers.attention import Attend, Cache
from tx_async.layers.block import ForwardPass, Layer, Mlp
from tx_async.layers.cpu import OutFirst
from tx_async.layers.lora import Lora, LoraTarget, layer_slice
from tx_async.layers.norm import RmsNorm
from tx_async.layers.residuals import KEPT_ONLY, NOTHING, Recompute, in_blocks
from tx_async.layers.sharding import gathered_spec_of, of_one_layer, row_axis, spec_of
from tx_async.layers.weights import Dim, Stack, Weight, stacks_of

Params = dict[str, Any]
Segments = tuple[tuple[Stack, ...], ...]


@dataclass(frozen=True)
class Decoder:
    """A decoder's parameters are embed [V, D], norm [D], head [V, D] if it is not tied (see `unembedding`), and a dict
    of stacked arrays per stack (see `weights`).

    It is frozen and hashable: a model is the static part of a program, `params` are its arrays.
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    norm: RmsNorm
    """The final norm."""
    tied: bool
    layers: tuple[Layer, ...]
    """The kind of each layer, in order."""
    embed_scale: float = 1.0
    """Embeddings are multiplied by this factor (Gemma)."""
    skipped: tuple[str, ...] = ()
    """Name prefixes of tensors that the family's files hold and nothing here uses (multi-token prediction, a vision
    tower)."""
    interleaved_experts: bool = False
    """In the files a layer's experts are two parameters, with gate and up side by side (gpt-oss), and PEFT knows them
    by these."""
    peft_knows_experts: bool = True
    """Whether PEFT finds adapters of experts that are named one by one. It passes over Qwen3.5's, for which it has no
    table; named as parameters of a layer, vLLM could not read them."""
    mesh: Mesh | None = None
    """The mesh that it is sharded over; set by `load_model`."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def segments(self) -> Segments:
        """Each segment is one scan; most models have a single segment of a single stack."""
        return stacks_of(tuple(layer.name for layer in self.layers))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(stack for segment in self.segments for stack in segment)

    def layer_of(self, stack: Stack) -> Layer:
        return self.layers[stack.layers[0]]

    def mlp_of(self, stack: Stack) -> Mlp:
        return self.layer_of(stack).mlp

    @property
    def cache_shapes(self) -> dict[str, tuple[int, int]]:
        """What one layer with pages stores for one token: name -> (heads, features)."""
        return next((layer.mixer.keeps.pages for layer in self.layers if layer.mixer.keeps.pages), {})

    @property
    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """What one recurrent layer stores for a sequence: name -> (shape, whether it is fp32 in any case)."""
        return next((layer.mixer.keeps.state for layer in self.layers if layer.mixer.keeps.state), {})

    @property
    def state_layers(self) -> int:
        """The number of recurrent layers."""
        return sum(bool(layer.mixer.keeps.state) for layer in self.layers)

    @property
    def window_layers(self) -> dict[int, int]:
        """Of the layers with pages, how many keep those of a window of so many tokens; 0 = of all tokens."""
        return dict(Counter(layer.mixer.keeps.window for layer in self.layers if layer.mixer.keeps.pages))

    def places(self, stack: Stack) -> tuple[int, ...]:
        """The place of each layer of a stack in the cache: layers that keep the same (a state, pages, pages of an equal
        window) are numbered in order."""
        kinds = [layer.mixer.keeps.kind for layer in self.layers]
        return tuple(kinds[:i].count(kinds[i]) for i in stack.layers)

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
            weights.extend(self.layer_of(stack).weights(stack, self.hidden_size))
        return tuple(weights)

    @property
    def unembedding_weight(self) -> Weight:
        return next(weight for weight in self.weights if weight.name == ("embed" if self.tied else "head"))

    def lora_targets(self) -> dict[str, dict[str, LoraTarget]]:
        """stack -> name -> target, in the order of `weights`; the unembedding is the stack "head" of one layer."""
        targets: dict[str, dict[str, LoraTarget]] = {stack.name: {} for stack in self.stacks}
        for weight in self.weights:
            if weight.group:
                targets[weight.stack][weight.name] = weight.lora_target
        targets["head"] = {"head": LoraTarget("unembed", self.hidden_size, self.vocab_size, ("lm_head",))}
        return targets

    def for_decoding(self, params: Params) -> Params:
        """A second copy of the weights, laid out for steps of few tokens on a CPU: a list of layers for each stack,
        since a scan copies each layer out of its stack, and projections as `OutFirst`. It takes the memory of all
        layers' weights again."""
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
        recompute: Recompute = NOTHING,
        grouped_kernel: bool = False,
    ) -> tuple[Array, Cache]:
        """tokens, positions int32 [R, L] -> (hidden [R, L, D] after the final norm, cache).

        recompute: of the backward pass. grouped_kernel: experts run in their kernels.
        """
        stays_cut = isinstance(params[self.stacks[0].name], list) and self._is_short(tokens)
        x = self._placed(params["embed"][tokens], stays_cut)
        if self.embed_scale != 1.0:
            x = x * jnp.asarray(self.embed_scale, x.dtype)
        forward = ForwardPass(lora, positions, self._rotary(positions), attend, self.mesh, grouped_kernel)
        for segment in self.segments:
            layers = tuple((jnp.array(self.places(s)), params[s.name], lora.weights.get(s.name, {})) for s in segment)
            if isinstance(params[segment[0].name], list):
                bodies = [partial(self._run_layers, (stack,), forward, stays_cut) for stack in segment]
                x, cache = _one_by_one(bodies, (x, cache), layers, self._within(segment, recompute), self._in_order)
            else:
                body = partial(self._run_layers, segment, forward, stays_cut)
                x, cache = _scanned(body, (x, cache), layers, recompute)
        x = self.norm(x, params["norm"])
        return (self._cut_as_the_head(x) if stays_cut else x), cache

    def _within(self, segment: tuple[Stack, ...], recompute: Recompute) -> Recompute:
        """The same of one segment, where `keeping` counts its own layers."""
        layers = [layer for stack in segment for layer in stack.layers]
        after = self.num_layers - 1 - max(layers)
        return recompute._replace(keeping=min(max(0, recompute.keeping - after), len(layers)))

    @property
    def _in_order(self) -> bool:
        """Whether the gradients of a layer's adapters are made before the backward pass leaves the layer. With several
        stacks XLA makes those of a stack together, at its last layer, and holds what they are made of until then.
        Tensor-parallel devices add them up at the end, in one exchange."""
        return len(self.stacks) > 1 and (self.mesh is None or self.mesh.shape["tensor"] == 1)

    def _rotary(self, positions: Array) -> dict[Any, tuple[Array, Array]]:
        ropes = dict.fromkeys(layer.mixer.rope for layer in self.layers if layer.mixer.rope)
        return {rope: rope(positions) for rope in ropes}

    def _run_layers(
        self,
        segment: tuple[Stack, ...],
        forward: ForwardPass,
        stays_cut: bool,
        block_tokens: int,
        carry: tuple[Array, Cache],
        layers: tuple[Any, ...],
    ) -> tuple[tuple[Array, Cache], None]:
        x, cache = carry
        for stack, (index, w, adapters) in zip(segment, layers, strict=True):
            w, x = self._in_place(w, x) if stays_cut else (self._gathered(stack, w), x)
            layer = self.layer_of(stack)
            norms = layer.norms
            out, cache = layer.mixer(forward, w, adapters, norms("before_mixer", w, x), cache, index)
            x = self._placed(x + norms("after_mixer", w, out), stays_cut)
            x = self._placed(_with_mlp_in_blocks(layer, forward, w, adapters, x, block_tokens), stays_cut)
        return (x, cache), None

    def _is_short(self, tokens: Array) -> bool:
        """Whether a product's outputs, summed over `fsdp`, are less to exchange than the matrix: weights stay where
        they are."""
        return self.mesh is not None and self.mesh.shape["fsdp"] > 1 and tokens.size < self.hidden_size // 2

    def _in_place(self, w: Params, x: Array) -> tuple[Params, Array]:
        """One layer's weights as they lie. What is gathered of them all the same waits for x: else the compiler would
        gather those of every layer before a loop over decode steps, and hold them."""
        return jax.lax.optimization_barrier((w, x))

    def _gathered(self, stack: Stack, w: Params) -> Params:
        """One layer's weights, whole along `fsdp` while it runs."""
        if self.mesh is None:
            return w
        specs = {x.name: gathered_spec_of(x, self.mesh) for x in self.weights if x.stack == stack.name}
        shardings = {name: NamedSharding(self.mesh, specs[name]) for name in w}
        return jax.lax.with_sharding_constraint(w, shardings)

    def whole_unembedding(self, params: Params) -> Array:
        """The head, whole along `fsdp`: gathered once for all that reads it."""
        head = unembedding(params)
        if self.mesh is None:
            return head
        spec = gathered_spec_of(self.unembedding_weight, self.mesh)
        return jax.lax.with_sharding_constraint(head, NamedSharding(self.mesh, spec))

    def _cut_as_the_head(self, x: Array) -> Array:
        """So that logits are sums over devices of what each has of the head, which then need not be gathered."""
        assert self.mesh is not None
        features = spec_of(self.unembedding_weight, self.mesh)[-1]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, None, features)))

    def _placed(self, x: Array, stays_cut: bool) -> Array:
        """Keep rows on their devices, so that weights come to them and not the other way round; or, where weights stay
        cut, whole on all of them."""
        if self.mesh is None:
            return x
        rows = row_axis(self.mesh, x.shape[0])
        if rows is None and not stays_cut:
            return x
        spec = PartitionSpec(None if stays_cut else rows)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def tree_of(leaves: dict[Weight, Any]) -> Params:
    """What belongs to each weight, in the form of `params`: top-level weights beside a dict per stack."""
    paths = {(weight.stack, weight.name) if weight.stack else (weight.name,): leaf for weight, leaf in leaves.items()}
    return unflatten_dict(paths)


def unembedding(params: Params) -> Any:
    """The head [V, D]; in a tied model, the embedding itself."""
    return params.get("head", params["embed"])


def layers_apart(params: Params) -> Params:
    """The same weights as a list of layers for each stack. The stacks are gone afterwards and their memory is free."""

    def apart(x: Any) -> list[Any]:
        sharding = of_one_layer(x.sharding)
        if isinstance(x, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)] * x.shape[0]
        take = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False), out_shardings=sharding)
        layers = jax.block_until_ready([take(x, np.int32(i)) for i in range(x.shape[0])])
        x.delete()
        return layers

    def of_stack(stack: Params) -> list[Params]:
        columns = {name: apart(x) for name, x in stack.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return {name: of_stack(x) if isinstance(x, dict) else x for name, x in params.items()}


def _with_mlp(layer: Layer, forward: ForwardPass, w: Params, adapters: Any, x: Array) -> Array:
    out = layer.mlp(forward, w, adapters, layer.norms("before_mlp", w, x))
    return x + layer.norms("after_mlp", w, out)


def _with_mlp_in_blocks(
    layer: Layer, forward: ForwardPass, w: Params, adapters: Any, x: Array, block_tokens: int
) -> Array:
    """block_tokens: as in `Recompute`."""
    if not block_tokens or x.shape[0] * x.shape[1] <= block_tokens:
        return _with_mlp(layer, forward, w, adapters, x)
    run = partial(_with_mlp_of_block, layer, forward.mesh, forward.grouped_kernel)
    lora: Any = forward.lora
    return in_blocks(run, adapters, (w, replace(lora, weights={})), x, block_tokens)


def _with_mlp_of_block(
    layer: Layer, mesh: Mesh | None, grouped_kernel: bool, adapters: Any, frozen: Any, x: Array
) -> Array:
    w, lora = frozen
    forward: Any = ForwardPass(lora, None, {}, None, mesh, grouped_kernel)  # type: ignore[arg-type]
    return _with_mlp(layer, forward, w, adapters, x)


@jax.custom_vjp
def _adapters_first(x: Array, adapters: Any) -> tuple[Array, Any]:
    """What enters a layer, unchanged. In the backward pass the gradients of its adapters are made before that of x goes
    on."""
    return x, adapters


_adapters_first.defvjp(
    lambda x, adapters: ((x, adapters), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


def _one_by_one(
    bodies: list[Any], carry: tuple[Array, Cache], layers: tuple[Any, ...], recompute: Recompute, in_order: bool
) -> tuple[Array, Cache]:
    """Layers whose weights are a list, with a body for each stack. Each is computed again by itself: several different
    ones together would all be held at once. in_order: see `_in_order`."""
    each = [((index[i], w[i], layer_slice(lora, i)),) for i in range(len(layers[0][0])) for index, w, lora in layers]
    # The compiler could merge the recomputation with the first computation: the default of `checkpoint` prevents that.
    # Each body is traced once for all its layers; the compiler inlines it at each call.
    keeping = [jax.jit(jax.checkpoint(partial(body, 0), policy=KEPT_ONLY)) for body in bodies]
    again = [jax.jit(jax.checkpoint(partial(body, recompute.block_tokens))) for body in bodies]

    def step(run: list[Any], i: int, carry: tuple[Array, Cache], layer: Any) -> tuple[Array, Cache]:
        (x, cache), ((index, w, adapters),) = carry, layer
        if in_order:
            x, adapters = _adapters_first(x, adapters)
        return run[i % len(bodies)]((x, cache), ((index, w, adapters),))[0]

    def together(start: int, carry: tuple[Array, Cache], group: list[Any]) -> tuple[Array, Cache]:
        for i, layer in enumerate(group, start):
            carry = step(again, i, carry, layer)
        return carry

    size, num_again = recompute.layers, len(each) - recompute.keeping if recompute.layers else 0
    for start in range(0, num_again, max(1, size)):
        group = each[start : min(start + size, num_again)]
        run = partial(together, start)
        carry = jax.checkpoint(run)(carry, group) if size > 1 else run(carry, group)
    for i, layer in enumerate(each[num_again:], num_again):
        carry = step(keeping, i, carry, layer)
    return carry


def _scanned(
    body: Any, carry: tuple[Array, Cache], layers: tuple[Any, ...], recompute: Recompute
) -> tuple[Array, Cache]:
    """Layers whose weights are stacked: they are not computed again in groups of `Recompute.layers`, but of the next
    lower number that divides theirs, and all of them or none."""
    # Inside of a scan the compiler cannot merge the recomputation with the first, so nothing need prevent it.
    policy = None if recompute.layers else KEPT_ONLY
    body = jax.checkpoint(partial(body, recompute.block_tokens), prevent_cse=False, policy=policy)
    number, group = len(layers[0][0]), recompute.layers
    group = next(size for size in range(max(1, min(group, number)), 0, -1) if number % size == 0)
    if group > 1:
        layers = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), layers)
        body = jax.checkpoint(partial(_scan, body), prevent_cse=False)
    carry, _ = _scan(body, carry, layers)
    return carry


def _scan(body: Any, carry: tuple[Array, Cache], layers: Any) -> tuple[tuple[Array, Cache], None]:
    carry, _ = jax.lax.scan(body, carry, layers)
    return carry, None
