"""What programs need on one device beside weights, slots and cache: bounds, by formulas that a test holds against
compiled programs. `memory_plan.py` chooses by them which shapes are offered, and how much each computes again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp

from tx_async.engine.head import CHUNK_TOKENS
from tx_async.engine.kernel_uses import KernelUse, uses
from tx_async.engine.kernels import Kernels
from tx_async.engine.platform import Platform
from tx_async.layers.grouped import block_shape
from tx_async.layers.residuals import NOTHING, Recompute
from tx_async.layers.sharding import spec_of
from tx_async.layers.weights import Stack, Weight
from tx_async.models.decoder import Decoder
from tx_async.wire.operations import SUPPORT_TOKENS_MAX
from tx_async.wire.worker import EngineConfig

BLOCK_TOKENS = 4096
"""What an MLP works on at once where its layer is computed again: enough to keep a device busy."""
LAYER_BYTES, LAYER_BYTES_PLAIN = 3, 8
"""For each number that a layer which is computed again makes of a token: it and its gradient, some of them in fp32; of
attention in the plain version, and of a recurrence, which works in fp32, more. An MLP needs as much for those of a
block."""


class Features(NamedTuple):
    """How many numbers layers make for each token, on one device."""

    mixer_kept: int = 0
    """What token mixers keep for the backward pass: outputs of products, low ranks, attention's output."""
    mixer: int = 0
    """All that they make."""
    mlp_kept: int = 0
    """The same of MLPs."""
    mlp: int = 0
    state_bytes: int = 0
    """Of recurrent layers: what the states before each chunk of a row take, for each of its tokens."""

    @property
    def kept(self) -> int:
        return self.mixer_kept + self.mlp_kept

    @property
    def made(self) -> int:
        return self.mixer + self.mlp


@dataclass(frozen=True)
class Temporaries:
    """The bounds for one model on one device of a mesh."""

    model: Decoder
    config: EngineConfig
    platform: Platform
    kernels: Kernels
    mesh: Any
    token_bytes: int
    """Bytes that a token occupies in the KV cache of one layer."""
    adapter_elements: int
    """Numbers of one adapter, the head's included."""

    @property
    def ways(self) -> tuple[Recompute, ...]:
        """How a row can be trained, each in less memory and more time than the one before."""
        group = min(range(2, self.model.num_layers + 1), key=self._borders, default=1)
        return NOTHING, Recompute(1, BLOCK_TOKENS), Recompute(group, BLOCK_TOKENS)

    def of_training(self, rows: int, length: int, recompute: Recompute) -> int:
        """Of one forward_backward, with few targets for each token: A and B of each row and their gradients, fp32, and
        what the layers need, or what they keep while the head works on a chunk.

        Layers need tokens · layers · (what a layer keeps) + what one makes, with gradients. Where they are computed
        again: what stands between groups of layers and between the layers of a group, and all that one makes, its MLP
        for a block of tokens.
        """
        here, hidden, narrow = self._rows_here(rows), self.model.hidden_size, self._itemsize
        tokens, adapters = here * length, 2 * 4 * here * self.adapter_elements
        head = self._of_head(here, length)
        kept = max(one.kept for one in self._by_stack.values()) + hidden
        made = max(sum(one.made for one in period) for period in self._periods) + 2 * hidden
        if not recompute.layers:
            return tokens * (self.model.num_layers * kept + 2 * made) * narrow + adapters + head
        is_whole = not recompute.block_tokens or tokens <= recompute.block_tokens
        mlp = max(one.mlp for period in self._periods for one in period)
        others = max(sum(one.mlp for one in period) for period in self._periods) - mlp if is_whole else 0
        block = tokens if is_whole else recompute.block_tokens
        held = LAYER_BYTES_PLAIN if self.model.state_layers else LAYER_BYTES
        mixers = max(sum(self._mixer_bytes(one) for one in period) for period in self._periods)
        # Of an MLP that does not run in blocks what it made is held until the gradient comes to it.
        layer = tokens * (mixers + self._waiting_bytes) + block * (LAYER_BYTES_PLAIN * mlp + held * others)
        around = tokens * 2 * hidden * narrow  # the last layer's output and its gradient
        borders = self._borders(recompute.layers) * tokens * hidden * narrow
        # Those that keep come last: the others are computed again when nothing of them is held any more.
        number = min(recompute.keeping, self.model.num_layers)
        keeping = tokens * (number * (kept - hidden) + 2 * made) * narrow if number else 0
        return adapters + borders + max(layer, head + max(keeping, around))

    def _mixer_bytes(self, one: Features) -> int:
        """For each token, of a layer's mixer that is computed again and of what enters and leaves it."""
        is_wide = one.state_bytes or "training attention" in self._plain
        bytes_each = LAYER_BYTES_PLAIN if is_wide else LAYER_BYTES
        return bytes_each * (one.mixer + 2 * self.model.hidden_size) + one.state_bytes

    @cached_property
    def _waiting_bytes(self) -> int:
        """For each token, what gradients of adapters are made of at the end (`Decoder._in_order`)."""
        if not self.model.state_layers or self.mesh.shape["tensor"] == 1:
            return 0
        layers = [self._by_stack[stack.name] for stack in self.model.stacks for _ in stack.layers]
        return sum(one.mixer + self.model.hidden_size for one in layers) * self._itemsize

    def _of_head(self, rows: int, length: int) -> int:
        """Of a chunk: logits, two more of their size, and their gradient in the weights' dtype. Of each row: another B,
        filled up to a size that products split evenly."""
        chunks = min(-(-rows * length // CHUNK_TOKENS), length)
        tokens = rows * -(-length // chunks)
        axis, _ = spec_of(self.model.unembedding_weight, self.mesh)
        vocab = self.model.vocab_size // (self.mesh.shape[axis] if axis else 1)
        return vocab * (tokens * (3 * 4 + self._itemsize) + 4 * rows * self.config.max_lora_rank)

    def keeping_most(self, rows: int, length: int, room: int) -> Recompute:
        """The way that computes as few layers again as fit into so many bytes. Stacked layers all do the same."""
        most = self.model.num_layers - 1 if self._is_list else 0
        ways = (Recompute(1, BLOCK_TOKENS, keeping) for keeping in range(most, 0, -1))
        return next((way for way in ways if self.of_training(rows, length, way) <= room), Recompute(1, BLOCK_TOKENS))

    def of_wide_targets(self, rows: int, length: int) -> int:
        """What the most targets for each token add: targets, weights, log-probabilities and two copies of them, and one
        of each where several rows are cut into chunks together."""
        arrays = 5 if rows == 1 else 8
        return arrays * 4 * self._rows_here(rows) * length * (1 + SUPPORT_TOKENS_MAX)

    @cached_property
    def of_sampling(self) -> int:
        """Of decode, prefill and prompt scores: logits several times over, the most candidates that a step tells, a
        prefill's inner features, and a chunk of pages where no kernel reads them in place."""
        rows = max(self.config.sample_max_num_sequences, 128)
        steps = self.config.decode_steps or self.platform.decode_steps
        tokens = self.config.prefill_chunk_tokens or self.platform.prefill_tokens
        made = max(one.made for one in self._by_stack.values()) + 2 * self.model.hidden_size
        logits = 6 * rows * self.model.vocab_size * 4
        candidates = 2 * 3 * 4 * steps * rows * SUPPORT_TOKENS_MAX
        return logits + candidates + 3 * tokens * made * self._itemsize + self._page_chunks(rows, tokens)

    def _page_chunks(self, rows: int, prefill_tokens: int) -> int:
        chunk, tile = self.platform.cache_chunk_tokens, self.config.kv_page_size
        heads = max((weight.dims[0].units for weight in self.model.weights if weight.name == "o"), default=0)
        pages = 3 * chunk * self.token_bytes
        decode = rows * pages if "decode attention" in self._plain else 0
        prefill = -(-prefill_tokens // tile) * pages + 3 * 4 * prefill_tokens * heads * chunk
        return max(decode, prefill if "prefill attention" in self._plain else 0)

    @cached_property
    def kernel_uses(self) -> tuple[KernelUse, ...]:
        mesh = self.mesh if self.mesh.size > 1 else None
        return uses(self.kernels, self.model, self.config, self.platform, mesh)

    @property
    def _plain(self) -> set[str]:
        """Tasks of which some layers run in the plain version."""
        return {use.task for use in self.kernel_uses if use.plain}

    def _borders(self, group: int) -> int:
        """Of how many layers what enters them is kept, where every `group` of them are computed again together."""
        steps = [len(segment[0].layers) for segment in self.model.segments]
        if not self._is_list:
            counts, divisors = steps, [max(n for n in range(1, min(group, k) + 1) if k % n == 0) for k in steps]
        else:
            counts = [k * len(segment) for k, segment in zip(steps, self.model.segments, strict=True)]
            divisors = [min(group, count) for count in counts]
        groups = sum(-(-count // size) for count, size in zip(counts, divisors, strict=True))
        return groups + max(divisors) - 1

    @property
    def _is_list(self) -> bool:
        return self.platform.layers_apart

    def _rows_here(self, rows: int) -> int:
        fsdp = self.mesh.shape["fsdp"]
        return rows // fsdp if rows % fsdp == 0 else rows

    @property
    def _dtype(self) -> str:
        return self.config.dtype or self.platform.dtype

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self._dtype).itemsize

    @cached_property
    def _periods(self) -> list[list[Features]]:
        """The layers that run, and are computed again, as one: those of a scan's step; in a list, each alone."""
        if self._is_list:
            return [[one] for one in self._by_stack.values()]
        return [[self._by_stack[stack.name] for stack in segment] for segment in self.model.segments]

    @cached_property
    def _by_stack(self) -> dict[str, Features]:
        return {stack.name: self._features_of(stack) for stack in self.model.stacks}

    def _features_of(self, stack: Stack) -> Features:
        layer = self.model.layer_of(stack)
        of_mlp = {weight.name for weight in layer.mlp.weights(stack)}
        mine = [weight for weight in self.model.weights if weight.stack == stack.name and len(weight.dims) == 2]
        mixer = [self._numbers_of(weight, layer) for weight in mine if weight.name not in of_mlp]
        mlp = [self._numbers_of(weight, layer) for weight in mine if weight.name in of_mlp]
        attention = max((weight.dims[0].size for weight in mine if weight.name == "o"), default=0)
        attention //= self.mesh.shape["tensor"]
        (mixer_kept, made), (mlp_kept, inner) = _sums(mixer), _sums(mlp)
        return Features(mixer_kept + attention, made + attention, mlp_kept, inner, self._state_bytes(layer))

    def _state_bytes(self, layer: Any) -> int:
        heads, *rest = layer.mixer.keeps.state["state"][0] if layer.mixer.keeps.state else (0,)
        tensor = self.mesh.shape["tensor"]
        chunk, _ = self.platform.rule_chunks(BLOCK_TOKENS)
        return 4 * heads * math.prod(rest) // (chunk * (1 if heads % tensor else tensor))

    def _numbers_of(self, weight: Weight, layer: Any) -> tuple[int, int]:
        """(how many are kept, how many are made) by one product and its adapter."""
        *_, outputs = spec_of(weight, self.mesh)
        out = weight.dims[1].size // (self.mesh.shape[outputs] if outputs else 1)
        rank = self.config.max_lora_rank if weight.group else 0
        if not weight.num_experts:
            return out + rank, out + rank
        times = self._expert_rows(weight.num_experts, layer.mlp.router.num_experts_per_tok)
        if weight.name != "down":
            return 0, round(times * (out + rank))
        return round(times * out), round(times * (out + rank + self.model.hidden_size))  # the tokens themselves, too

    def _expert_rows(self, num_experts: int, per_token: int) -> float:
        """In how many rows a token stands on each device, those that fill blocks included."""
        axis = self.mesh.shape["expert"]
        pieces = 1 if num_experts % axis else axis
        blocks, size = block_shape(BLOCK_TOKENS * per_token, num_experts // pieces, pieces)
        return blocks * size / BLOCK_TOKENS


def _sums(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    kept, made = 0, 0
    for one_kept, one_made in pairs:
        kept, made = kept + one_kept, made + one_made
    return kept, made
