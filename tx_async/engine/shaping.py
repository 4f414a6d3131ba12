"""How a request changes its logits before tokens are drawn: minimum length, bias, penalties. All are data of a row.

With z the logits of a step, in the order of vLLM's sampler (`vllm/v1/sample/sampler.py`), before temperature:

    min_tokens           z[t] = -inf                            for stop tokens t while the answer is shorter
    logit_bias           z[t] += bias[t]
    repetition_penalty   z[t] = z[t] / r if z[t] > 0 else z[t] * r    for t in prompt or answer (arXiv:1909.05858)
    frequency_penalty    z[t] -= f * count[t]                   count: how often the answer has t
    presence_penalty     z[t] -= p * (count[t] > 0)

    grammar              z[t] = -inf                            for tokens t that the grammar does not allow next

min_p is applied after temperature (`sampler.py`): it keeps the tokens whose probability is at least min_p times that of
the likeliest (arXiv:2407.01082). Log-probabilities are those of z itself. A row that asks for nothing gets its z back,
so it is drawn as in the programs without shaping; a batch of only such rows runs those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from tx_async.engine.sequences import SequenceState
from tx_async.engine.vocabulary import VocabularyParts
from tx_async.errors import InvalidRequest
from tx_async.grammar import WORD_BITS, num_words
from tx_async.wire.worker import LOGIT_BIAS_MAX, SequenceSpec

HELD_BACK_MAX = 512
"""How many stop tokens of one sequence `min_tokens` can hold back."""

EVERYTHING = np.uint32(0xFFFFFFFF)
"""A word of a row without a grammar."""

Data = Any
"""numpy on its way to the device, a traced array inside a program."""


class Shaping(NamedTuple):
    """What B rows ask for."""

    min_p: Data
    presence: Data
    frequency: Data
    repetition: Data
    """fp32 [B]"""
    min_tokens: Data
    num_answered: Data
    """int32 [B]: how many tokens the answer has when the quantum begins."""
    num_prompt: Data
    """int32 [B]"""
    text: Data
    """int32 [B, context]: prompt and answer, then -1; all -1 where nobody counts them."""
    bias_tokens: Data
    """int32 [B, LOGIT_BIAS_MAX], -1 = none."""
    bias: Data
    held_back: Data
    """int32 [B, HELD_BACK_MAX], -1 = none."""
    allowed: Data = None
    """uint32 [B, ceil(V / 32)], a bit for each token, lowest first; None where no row has a grammar."""


class Tally(NamedTuple):
    """The same by token, [B, V], or on a mesh of a device's part. The tokens that a step draws are added to the first
    two."""

    counts: Array
    """int32: counts in the answer."""
    seen: Array
    """bool: whether it is in prompt or answer."""
    bias: Array
    held_back: Array


def check_shaping(spec: SequenceSpec) -> None:
    """Raises `InvalidRequest` for more than the tables hold."""
    if len(spec.logit_bias) > LOGIT_BIAS_MAX:
        raise InvalidRequest(f"logit_bias has {len(spec.logit_bias)} entries; it takes {LOGIT_BIAS_MAX}.")
    if spec.min_tokens and len(spec.stop_token_ids) > HELD_BACK_MAX:
        raise InvalidRequest(f"min_tokens goes with at most {HELD_BACK_MAX} stop tokens.")


def shaping_of(samples: Sequence[SequenceState], rows: int, context: int, vocab: int) -> Shaping:
    """What the sequences ask for, as numpy arrays of `rows` rows; unused rows ask for nothing."""
    specs = [sample.spec for sample in samples]

    def column(values: Sequence, dtype: type, unused: float = 0) -> np.ndarray:
        array = np.full(rows, unused, dtype)
        array[: len(samples)] = values
        return array

    def table(lists: Sequence[Sequence[float]], width: int, dtype: type = np.int32, unused: float = -1) -> np.ndarray:
        array = np.full((rows, width), unused, dtype)
        for row, values in enumerate(lists):
            array[row, : len(values)] = values
        return array

    needs_history = [
        bool(spec.presence_penalty or spec.frequency_penalty or spec.repetition_penalty != 1.0) for spec in specs
    ]
    texts = [sample.tokens if needed else [] for sample, needed in zip(samples, needs_history, strict=True)]
    return Shaping(
        min_p=column([spec.min_p for spec in specs], np.float32),
        presence=column([spec.presence_penalty for spec in specs], np.float32),
        frequency=column([spec.frequency_penalty for spec in specs], np.float32),
        repetition=column([spec.repetition_penalty for spec in specs], np.float32, 1.0),
        min_tokens=column([spec.min_tokens for spec in specs], np.int32),
        num_answered=column([len(sample.tokens) - sample.num_prompt for sample in samples], np.int32),
        num_prompt=column([sample.num_prompt for sample in samples], np.int32),
        text=table(texts, context),
        bias_tokens=table([[token for token, _ in spec.logit_bias] for spec in specs], LOGIT_BIAS_MAX),
        bias=table([[bias for _, bias in spec.logit_bias] for spec in specs], LOGIT_BIAS_MAX, np.float32, 0),
        held_back=table([spec.stop_token_ids if spec.min_tokens else () for spec in specs], HELD_BACK_MAX),
        allowed=_allowed(samples, rows, vocab),
    )


def _allowed(samples: Sequence[SequenceState], rows: int, vocab: int) -> np.ndarray | None:
    if not any(sample.constraint for sample in samples):
        return None
    bits = np.full((rows, num_words(vocab)), EVERYTHING, np.uint32)
    for row, sample in enumerate(samples):
        if sample.constraint:
            bits[row] = sample.constraint.allowed
    return bits


def shapes(rows: int, context: int, vocab: int = 0) -> Shaping:
    """Arrays with the shapes of those of `shaping_of`, which take no memory. vocab: where rows have grammars."""
    one = shaping_of([], 1, 1, 0)._asdict() | {"allowed": np.zeros((1, num_words(vocab)), np.uint32)}
    if not vocab:
        del one["allowed"]
    wide = {name: array.shape[1:] for name, array in one.items()} | {"text": (context,)}
    return Shaping(**{name: np.broadcast_to(array.flat[0], (rows, *wide[name])) for name, array in one.items()})


# ---- on the device


def tally(shaping: Shaping, vocabulary: VocabularyParts) -> Tally:
    """The lists of a `Shaping` spread out over the vocabulary, when a quantum begins."""
    rows, places = jnp.arange(shaping.min_p.shape[0])[:, None], vocabulary.places

    def empty(dtype: Any) -> Array:
        return jnp.zeros((rows.shape[0], vocabulary.part_size), dtype)

    is_answer = jnp.arange(shaping.text.shape[1]) >= shaping.num_prompt[:, None]
    answer = jnp.where(is_answer, shaping.text, -1)
    return Tally(
        counts=empty(jnp.int32).at[rows, places(answer)].add(1, mode="drop"),
        seen=empty(jnp.bool_).at[rows, places(shaping.text)].set(True, mode="drop"),
        bias=empty(jnp.float32).at[rows, places(shaping.bias_tokens)].add(shaping.bias, mode="drop"),
        held_back=empty(jnp.bool_).at[rows, places(shaping.held_back)].set(True, mode="drop"),
    )


def shaped(logits: Array, shaping: Shaping, tally: Tally, num_new: Array, vocabulary: VocabularyParts) -> Array:
    """The logits [B, V] that are drawn from, `num_new` [B] tokens into the quantum."""
    is_short = shaping.num_answered + num_new < shaping.min_tokens
    z = jnp.where(is_short[:, None] & tally.held_back, -jnp.inf, logits) + tally.bias
    repetition = shaping.repetition[:, None]
    z = jnp.where(tally.seen, jnp.where(z > 0, z / repetition, z * repetition), z)
    z = z - shaping.frequency[:, None] * tally.counts
    z = z - shaping.presence[:, None] * (tally.counts > 0)
    return z if shaping.allowed is None else jnp.where(_unpacked(shaping.allowed, vocabulary), z, -jnp.inf)


def _unpacked(bits: Array, vocabulary: VocabularyParts) -> Array:
    """uint32 [B, ceil(V / 32)] -> bool [B, V]"""
    if vocabulary.is_cut:
        tokens = vocabulary.tokens
        return (bits[:, tokens // WORD_BITS] >> jnp.uint32(tokens % WORD_BITS)) & 1 > 0
    places = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    return ((bits[:, :, None] >> places) & 1).reshape(bits.shape[0], -1)[:, : vocabulary.size] > 0


def counted(tally: Tally, tokens: Array, alive: Array, vocabulary: VocabularyParts) -> Tally:
    """The tally with the tokens [B] that a step has drawn for the rows that are alive."""
    rows, places = jnp.arange(tokens.shape[0]), vocabulary.places(tokens)
    counts = tally.counts.at[rows, places].add(alive.astype(jnp.int32), mode="drop")
    return tally._replace(counts=counts, seen=tally.seen.at[rows, places].max(alive, mode="drop"))
