"""The device programs of sampling: prefill, prompt scores, decode. Pure functions of arrays, one compilation per shape.

Every row is a function of its own tokens, adapter and random stream. Unused rows have remaining = 0 (decode) or alive =
False (prefill): what they compute goes to the null page, and nobody reads it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.engine.adapter_slots import lora_scale
from tx_async.engine.kernels import NO_KERNELS, Kernels
from tx_async.engine.kv_cache import CacheLayout, Pools
from tx_async.engine.paged_attention import DecodeAttention, PagedAttention, TileStates
from tx_async.engine.platform import Platform
from tx_async.engine.sampler import TOPK_MAX, Choices, draw_many, head_of, logprobs_at, sample, stream_key
from tx_async.engine.shaping import Data, Shaping, Tally, counted, shaped, tally
from tx_async.engine.vocabulary import Cuts, VocabularyParts
from tx_async.layers.cpu import OutFirst, OwnRankActive
from tx_async.layers.linear import product
from tx_async.layers.lora import LoraActive, LoraGrouped, LoraWeights, layer_slice, tiles
from tx_async.models.decoder import unembedding
from tx_async.wire.ranks import rank_classes

STOP_TOKENS_MAX = 16
"""The stop tokens of a row that the device knows; the host finds further ones a quantum later."""


class Adapters(NamedTuple):
    """The sampler slots, and which of them this batch uses."""

    weights: LoraWeights
    scale: Data
    active: Data
    num_active: Data
    tile_start: Data
    tile_adapter: Data
    num_tiles: Data

    @property
    def without_lora(self) -> Adapters:
        """The adapters of a batch in which nobody has one."""
        return self._replace(weights={})

    def for_steps(self, platform: Platform, row_adapter: Data) -> LoraActive:
        """The active adapters of rows that run through the layers."""
        return LoraGrouped(*self, row_adapter) if platform.grouped_lora else self.for_rows(platform, row_adapter)

    def for_rows(self, platform: Platform, row_adapter: Data) -> LoraActive:
        """The active adapters of rows of any length. row_adapter: int32 [R], a sampler slot or -1."""
        if not platform.own_rank_programs:
            return LoraActive(*self, row_adapter)
        ranks = rank_classes(jax.tree.leaves(self.weights)[0].shape[-1])
        rank_class = sum((jnp.int32(self.scale < lora_scale(rank)) for rank in ranks[:-1]), jnp.zeros_like(self.active))
        return OwnRankActive(*self, row_adapter, rank_class, ranks)

    @classmethod
    def of(cls, weights: LoraWeights, scale: Data, row_adapter: np.ndarray) -> Adapters:
        """The adapters of a batch whose rows have these slots (-1 = none)."""
        used = np.unique(row_adapter[row_adapter >= 0])
        active = np.zeros(scale.shape[0], np.int32)
        active[: len(used)] = used
        start, adapter, count = tiles(row_adapter)
        return cls(weights, scale, active, np.int32(len(used)), start, adapter, np.int32(count))


class PrefillBatch(NamedTuple):
    """R rows of L prompt tokens each, of one sequence a row; see `prefill`."""

    tokens: Data
    """int32 [R, L]"""
    start: Data
    """int32 [R]: position of each row's first token, a multiple of the page size."""
    alive: Data
    """bool [R]"""
    adapter: Data
    """int32 [R]: sampler slot, -1 = none."""
    tables: Data
    """int32 [R, table_pages], or one for each of the layout's page tables."""
    states: TileStates
    """Where recurrent layers read and write their states."""


class ScoreBatch(NamedTuple):
    """T prompt positions whose tokens are to be scored; arrays are [T] unless they say otherwise; see `score`."""

    row: Data
    """int32 [T]: index in the flat hidden states of a prefill."""
    adapter: Data
    next_token: Data
    targets: Data
    """int32 [T, TOPK_MAX], -1 = none."""
    temperature: Data
    seed: Data
    """uint32 [T, 2]"""
    sample_index: Data
    position: Data
    """int32 [T]: the token that is scored."""
    any_topk: Data
    any_alt: Data


class DecodeBatch(NamedTuple):
    """B sequences, a row each; arrays are [B] unless they say otherwise; see `decode`."""

    token: Data
    """int32 [B]: each sequence's last token."""
    position: Data
    """int32 [B]: the position of that token."""
    remaining: Data
    """int32 [B]: how many tokens it may still sample; 0 for an unused row."""
    adapter: Data
    temperature: Data
    top_k: Data
    top_p: Data
    seed: Data
    """uint32 [B, 2]"""
    sample_index: Data
    stop_tokens: Data
    """int32 [B, STOP_TOKENS_MAX], -1 = none."""
    tables: Data
    """int32 [B, table_pages], or one for each of the layout's page tables."""
    any_topk: Data
    """bool: whether somebody wants the likeliest candidates of each step."""
    slot: Data
    """int32 [B]: the slot of each sequence's recurrent state."""
    any_head: Data
    """bool: whether somebody wants the probabilities that tokens were drawn with."""


class Decoded(NamedTuple):
    """First axis: steps. A row's entries are valid up to its count."""

    tokens: Data
    logprobs: Data
    topk_token_ids: Data
    """int32 [steps, B, topk]"""
    topk_logprobs: Data
    count: Data
    """int32 [B]: how many tokens were sampled."""
    head_probabilities: Data
    """fp32 [steps, B, topk]: the candidates' probabilities in the distribution that was drawn from."""
    head_is_whole: Data
    """uint8 [steps, B]: see `sampler.head_of`."""


def prefill(
    platform: Platform,
    model: Any,
    layout: CacheLayout,
    params: Any,
    adapters: Adapters,
    pools: Pools,
    batch: PrefillBatch,
    kernels: Kernels = NO_KERNELS,
) -> tuple[Array, Pools]:
    """Write the rows' keys and values; -> (hidden [R * L, D], pools)."""
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    where = (layout, batch.tables, positions, batch.alive, batch.states)
    attend = PagedAttention(*where, kernels.paged_prefill, model.mesh)
    lora = adapters.for_steps(platform, batch.adapter)
    grouped = kernels.grouped_product
    hidden, pools = model.forward(params, lora, batch.tokens, positions, attend, pools, grouped_kernel=grouped)
    return hidden.reshape(-1, hidden.shape[-1]), pools


def score(
    platform: Platform, mesh: Mesh | None, params: Any, adapters: Adapters, hidden: Array, batch: ScoreBatch
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """-> log-probabilities of the next tokens [T]; top-k ids and their log-probabilities; those of the targets; the
    alternatives' ids and log-probabilities."""
    logits = unembed(params, adapters.for_rows(platform, batch.adapter), hidden[batch.row])
    cuts = Cuts.of(mesh, logits.shape[1], logits.shape[0])
    all_rows: Any = PartitionSpec()
    of_batch = ScoreBatch(*[cuts.rows] * len(batch))._replace(any_topk=all_rows, any_alt=all_rows)
    scores = cuts.run(partial(_scores, cuts.vocabulary), (cuts.logits, of_batch), cuts.rows)
    return scores(cuts.made(logits), batch)


def _scores(
    vocabulary: VocabularyParts, logits: Array, batch: ScoreBatch
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """What `score` returns, by every device of a mesh from its part of the vocabulary."""
    logits = vocabulary.own(logits)
    some = partial(_alternatives, vocabulary, logits, batch)
    alternatives = jax.lax.cond(batch.any_alt, some, lambda: jnp.zeros_like(batch.targets))
    tokens = jnp.concatenate([batch.next_token[:, None], batch.targets, alternatives], axis=1)
    logprobs, lse = logprobs_at(logits, jnp.maximum(tokens, 0), vocabulary)
    topk_ids, topk_logprobs = _topk(vocabulary, logits, lse, batch.any_topk)
    of_next, of_targets, of_alternatives = jnp.split(logprobs, [1, 1 + batch.targets.shape[1]], axis=1)
    return of_next[:, 0], topk_ids, topk_logprobs, of_targets, alternatives, of_alternatives


def _alternatives(vocabulary: VocabularyParts, logits: Array, batch: ScoreBatch) -> Array:
    keys = stream_key(batch.seed, batch.sample_index)
    keys = jax.vmap(lambda key, i: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), i)))(
        keys, batch.position
    )
    return draw_many(logits, batch.temperature, keys, batch.targets.shape[1], vocabulary)


def decode(
    platform: Platform,
    model: Any,
    layout: CacheLayout,
    max_steps: int,
    params: Any,
    adapters: Adapters,
    pools: Pools,
    batch: DecodeBatch,
    num_steps: Array,
    shaping: Shaping | None = None,
    kernels: Kernels = NO_KERNELS,
    num_candidates: int = TOPK_MAX,
) -> tuple[Decoded, Pools]:
    """Sample at most `num_steps` ≤ max_steps tokens for every row, fewer when every row has ended."""
    rows = batch.token.shape[0]
    lora = adapters.for_steps(platform, batch.adapter)
    min_p = None if shaping is None else shaping.min_p
    choices = Choices(batch.temperature, batch.top_k, batch.top_p, stream_key(batch.seed, batch.sample_index), min_p)
    topk = min(num_candidates, model.vocab_size)
    cuts, all_rows = Cuts.of(model.mesh, model.vocab_size, rows), PartitionSpec()
    draw = cuts.run(
        partial(_draw, platform, cuts.vocabulary, num_candidates),
        (cuts.logits, cuts.rows, all_rows, cuts.rows, cuts.parts),
        (cuts.rows, cuts.parts),
    )
    out = Decoded(
        tokens=jnp.zeros((max_steps, rows), jnp.int32),
        logprobs=jnp.zeros((max_steps, rows)),
        topk_token_ids=jnp.zeros((max_steps, rows, topk), jnp.int32),
        topk_logprobs=jnp.zeros((max_steps, rows, topk)),
        count=jnp.zeros(rows, jnp.int32),
        head_probabilities=jnp.zeros((max_steps, rows, topk)),
        head_is_whole=jnp.zeros((max_steps, rows), jnp.uint8),
    )

    def step(state):
        i, token, alive, pools, out, told = state
        position = batch.position + out.count
        where = (layout, batch.tables, position[:, None], alive, batch.slot)
        attend = DecodeAttention(*where, kernels.paged_attention, model.mesh)
        inputs = params, lora, token[:, None], position[:, None], attend, pools
        hidden, pools = model.forward(*inputs, grouped_kernel=kernels.grouped_product)
        logits = cuts.made(unembed(params, lora, hidden[:, 0]))
        row = _on_every_device(model.mesh, _Row(choices, position + 1, out.count, token, alive))
        drawn, told = draw(logits, row, (batch.any_topk, batch.any_head), shaping, told)
        drawn = _on_every_device(model.mesh, drawn)
        token = drawn.token
        out = Decoded(
            tokens=out.tokens.at[i].set(token),
            logprobs=out.logprobs.at[i].set(drawn.logprob),
            topk_token_ids=out.topk_token_ids.at[i].set(drawn.topk_token_ids),
            topk_logprobs=out.topk_logprobs.at[i].set(drawn.topk_logprobs),
            count=out.count + alive,
            head_probabilities=out.head_probabilities.at[i].set(drawn.head_probabilities),
            head_is_whole=out.head_is_whole.at[i].set(drawn.head_is_whole),
        )
        stopped = jnp.any(token[:, None] == batch.stop_tokens, axis=1)
        return i + 1, token, alive & ~stopped & (out.count < batch.remaining), pools, out, told

    def goes_on(state) -> Array:
        return (state[0] < num_steps) & jnp.any(state[2])

    spread = cuts.run(lambda shaping: tally(shaping, cuts.vocabulary), (cuts.rows,), cuts.parts)
    told = None if shaping is None else spread(shaping)
    state = (jnp.int32(0), batch.token, batch.remaining > 0, pools, out, told)
    _, _, _, pools, out, _ = jax.lax.while_loop(goes_on, step, state)
    return out, pools


class _Row(NamedTuple):
    """What a step draws a row's token with, [B] each."""

    choices: Choices
    position: Array
    """That the token will have."""
    num_new: Array
    """The tokens of the quantum before it."""
    token: Array
    """The row's last one, which it keeps where it is not alive."""
    alive: Array


class _Drawn(NamedTuple):
    """The entries of one step in `Decoded`."""

    token: Array
    logprob: Array
    topk_token_ids: Array
    topk_logprobs: Array
    head_probabilities: Array
    head_is_whole: Array


def _draw(
    platform: Platform,
    vocabulary: VocabularyParts,
    num_candidates: int,
    logits: Array,
    row: _Row,
    wanted: tuple[Array, Array],
    shaping: Shaping | None,
    told: Tally | None,
) -> tuple[_Drawn, Tally | None]:
    """The tokens that follow, and the tally with them. On a mesh every device runs this, with its part of the
    vocabulary. wanted: whether anybody wants candidates, and heads."""
    logits, (any_topk, any_head) = vocabulary.own(logits), wanted
    drawn_from = None
    if shaping is not None and told is not None:
        drawn_from = shaped(logits, shaping, told, row.num_new, vocabulary)
    fixed_passes = platform.fixed_passes
    token, logprob, lse = sample(logits, row.choices, row.position, fixed_passes, drawn_from, vocabulary)
    topk_ids, topk_logprobs = _topk(vocabulary, logits, lse, any_topk, num_candidates)
    heads = _heads(vocabulary, logits, topk_ids, row.choices, any_head, fixed_passes)
    token = jnp.where(row.alive, token, row.token)
    told = None if told is None else counted(told, token, row.alive, vocabulary)
    return _Drawn(token, logprob, topk_ids, topk_logprobs, *heads), told


def _on_every_device(mesh: Mesh | None, rows: Any) -> Any:
    """What goes into a draw, of which devices have some rows each, and what comes out: layers see whole batches."""
    return rows if mesh is None else jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec()))


def unembed(params: Any, lora: LoraActive, hidden: Array) -> Array:
    """hidden [B, D] -> logits fp32 [B, V]; the adapter's part in fp32, as in training."""
    head = unembedding(params)
    logits = product(hidden, head if isinstance(head, OutFirst) else head.T, jnp.float32)
    if "head" not in lora.weights:
        return logits
    (delta,) = lora.deltas(layer_slice(lora.weights["head"]), ("head",), hidden[:, None].astype(jnp.float32))
    return logits + delta[:, 0]


def _heads(
    vocabulary: VocabularyParts, logits: Array, candidates: Array, choices: Choices, wanted: Array, fixed_passes: bool
) -> tuple[Array, Array]:
    nothing = (jnp.zeros(candidates.shape), jnp.zeros(candidates.shape[0], jnp.uint8))
    some = partial(head_of, logits, candidates, choices, fixed_passes, vocabulary)
    return jax.lax.cond(wanted, some, lambda: nothing)


def _topk(
    vocabulary: VocabularyParts, logits: Array, lse: Array, wanted: Array, num: int = TOPK_MAX
) -> tuple[Array, Array]:
    k = min(num, vocabulary.size)
    nothing = (jnp.zeros((logits.shape[0], k)), jnp.zeros((logits.shape[0], k), jnp.int32))
    values, ids = jax.lax.cond(wanted, lambda: vocabulary.top_k(logits, k), lambda: nothing)
    return ids, values - lse[:, None]


def seed_words(seed: int) -> np.ndarray:
    """Any integer seed as (low word, high word)."""
    return np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32)
