"""The sampling half of an engine driven by hand: admit, run quanta, look at what finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import parity
from tx_async.engine.adapter_slots import pad
from tx_async.engine.decode import SamplingEngine
from tx_async.engine.executables import Executables
from tx_async.engine.platform import Platform, current
from tx_async.engine.streams import SameStream
from tx_async.layers.attention import PackedAttention
from tx_async.layers.lora import LoraRows, init_weights, layer_slice
from tx_async.models.decoder import unembedding
from tx_async.models.load import load_model
from tx_async.wire.worker import (
    BASE_SLOT,
    LORA_ALPHA,
    AdapterConfig,
    EngineConfig,
    FinishedSequence,
    Sampled,
    SampleQuantum,
    SequenceSpec,
)

CONFIG: dict[str, Any] = {"max_lora_rank": 4, "max_sampler_adapters": 4, "sample_max_num_sequences": 8}


class Outcome:
    """A finished sequence; what `FinishedSequence` names by index is the array itself (None = not asked for)."""

    def __init__(self, finished: FinishedSequence, tensors: Sequence[np.ndarray]):
        self.stop_reason = finished.stop_reason
        self.num_cached_tokens = finished.num_cached_tokens

        def array(index: int) -> Any:
            return None if index < 0 else tensors[index]

        self.tokens: np.ndarray = tensors[finished.tokens_index]
        self.logprobs: np.ndarray = tensors[finished.logprobs_index]
        self.topk_token_ids, self.topk_logprobs = (
            array(finished.topk_token_ids_index),
            array(finished.topk_logprobs_index),
        )
        self.head_token_ids, self.head_probabilities = (
            array(finished.head_token_ids_index),
            array(finished.head_probabilities_index),
        )
        self.head_is_whole = array(finished.head_is_whole_index)
        self.prompt_logprobs = array(finished.prompt_logprobs_index)
        self.prompt_topk_token_ids = array(finished.prompt_topk_token_ids_index)
        self.prompt_topk_logprobs = array(finished.prompt_topk_logprobs_index)
        self.target_logprobs = array(finished.target_logprobs_index)
        self.alt_token_ids, self.alt_logprobs = array(finished.alt_token_ids_index), array(finished.alt_logprobs_index)

    def agrees_with(self, other: Outcome) -> bool:
        """The same tokens, their log-probabilities up to rounding."""
        return (
            self.stop_reason == other.stop_reason
            and self.tokens.tobytes() == other.tokens.tobytes()
            and np.allclose(self.logprobs, other.logprobs, atol=1e-5)
        )

    def same_as(self, other: Outcome) -> bool:
        """Bit for bit, NaN included."""
        return (
            self.stop_reason == other.stop_reason
            and self.tokens.tobytes() == other.tokens.tobytes()
            and self.logprobs.tobytes() == other.logprobs.tobytes()
        )


class SamplingBench:
    def __init__(self, folder: Path, platform: Platform | None = None, **config: Any):
        self.config = EngineConfig(**CONFIG | config)
        self.model, self.params = load_model(folder)
        slots, rank = self.config.max_sampler_adapters, self.config.max_lora_rank
        self.weights = init_weights(self.model.lora_targets(), slots, rank)
        self.scale = np.zeros(slots, np.float32)
        self.context = self.config.max_context_length or self.model.max_position_embeddings
        self.engine = SamplingEngine(
            self.model,
            self.params,
            self.config,
            self.context,
            str(folder),
            self.weights,
            jnp.asarray(self.scale),
            SameStream(),
            platform or current(),
        )
        if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # as the suite has it
            for program in self.engine.programs.values():
                program.executables = _executables(cache)
        self._forward = jax.jit(partial(_logprobs, self.model))
        self.outcomes: dict[int, Outcome] = {}
        self.replies: list[Sampled] = []
        self._next_id = 0

    def use_params(self, params: Any) -> None:
        self.params = params
        self.engine.use_params(params)

    def set_adapter(self, slot: int, seed: int, change: Any = None, rank: int = 0) -> None:
        """A random adapter, of the full rank if `rank` is 0; `change` is applied to each of its matrices."""
        config = AdapterConfig(rank=rank or self.config.max_lora_rank)
        adapter = parity.random_adapter(self.model, config, seed)
        if change:
            adapter = jax.tree.map(change, adapter)
        adapter = pad(self.model.lora_targets(), adapter, self.config.max_lora_rank)
        self.weights = _with_adapter(self.weights, adapter, np.int32(slot))
        self.scale = self.scale.copy()
        self.scale[slot] = LORA_ALPHA / config.rank

    def admit(self, prompt: Any, targets: np.ndarray | None = None, **fields: Any) -> int:
        """-> sequence id. `fields` of `SequenceSpec`; greedy, 8 tokens, the base model unless they say otherwise."""
        self._next_id += 1
        slot = fields.get("sampler_slot", BASE_SLOT)
        defaults = {"sampler_slot": slot, "adapter_version": f"v{slot}", "max_tokens": 8, "temperature": 0.0}
        spec = SequenceSpec(sequence_id=self._next_id, prompt_index=0, **defaults | fields)
        tensors = [np.asarray(prompt, np.int32), *([] if targets is None else [targets])]
        self.engine.admit([spec], tensors, [True] * self.config.max_sampler_adapters)
        return self._next_id

    def quantum(self, decode_steps: int = 4, prefill_tokens: int = 256) -> Sampled:
        scale = jnp.asarray(self.scale)
        command = SampleQuantum(decode_steps=decode_steps, prefill_tokens=prefill_tokens)
        reply, tensors = self.engine.quantum(command, self.weights, scale)()
        assert isinstance(reply, Sampled)
        self.engine.sequences.check()
        self.outcomes |= {finished.sequence_id: Outcome(finished, tensors) for finished in reply.finished}
        self.replies.append(reply)
        return reply

    def finish(self, decode_steps: int = 4, prefill_tokens: int = 256) -> None:
        """Run until nobody is left."""
        while any(True for _ in self.engine.sequences):
            self.quantum(decode_steps, prefill_tokens)

    def sample(self, prompt: Any, **fields: Any) -> Outcome:
        """One sequence, alone."""
        sequence_id = self.admit(prompt, **fields)
        self.finish()
        return self.outcomes[sequence_id]

    def logprobs(self, tokens: Sequence[int], slot: int = BASE_SLOT) -> np.ndarray:
        """What training's forward says, [T, V]: row i is the distribution of the token after tokens[: i + 1]."""
        rows = parity.no_lora(self.model, 1)
        if slot != BASE_SLOT:
            weights = jax.tree.map(lambda w: np.asarray(w)[:, slot : slot + 1], self.weights)
            rows = LoraRows(weights, jnp.asarray(self.scale[slot : slot + 1]))
        length = -(-len(tokens) // 64) * 64
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._forward(self.params, rows, padded))[0, : len(tokens)]


@cache
def _executables(cache: str) -> Executables:
    """As servers have them: what an engine before this one compiled is not traced again."""
    return Executables(Path(cache) / "executables")


@jax.jit
def _with_adapter(stacks: Any, adapter: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda stack, one: stack.at[:, slot].set(one), stacks, adapter)


def _logprobs(model: Any, params: Any, rows: LoraRows, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = PackedAttention(positions, jnp.ones_like(positions))
    hidden, _ = model.forward(params, rows, tokens, positions, attend)
    logits = jnp.einsum("rld,vd->rlv", hidden, unembedding(params), preferred_element_type=jnp.float32)
    if head := rows.weights.get("head"):
        logits = logits + rows.deltas(layer_slice(head), ("head",), hidden.astype(jnp.float32))[0]
    return jax.nn.log_softmax(logits)
