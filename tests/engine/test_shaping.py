"""Penalties, bias, minimum length and min_p as vLLM defines them, against NumPy."""

import jax
import numpy as np
import pytest

from tests.support.sampling_bench import SamplingBench
from tx_async.engine.sampler import Choices, sample, stream_key
from tx_async.engine.shaping import Shaping, counted, shaped, tally
from tx_async.engine.stops import StopStrings
from tx_async.engine.vocabulary import VocabularyParts
from tx_async.errors import InvalidRequest
from tx_async.wire.worker import LOGIT_BIAS_MAX

VOCAB, CONTEXT = 50, 24
VOCABULARY = VocabularyParts(VOCAB)
ROWS = 6


def vllm(z, prompt, answer, *, bias, stops, min_tokens, repetition, frequency, presence):
    """One row by vLLM's definitions (`vllm/v1/sample/sampler.py`): processors first, then penalties."""
    z = z.astype(np.float64).copy()
    if len(answer) < min_tokens:
        z[list(stops)] = -np.inf
    for token, value in bias.items():
        z[token] += value
    seen = sorted({*prompt, *answer})
    z[seen] = np.where(z[seen] > 0, z[seen] / repetition, z[seen] * repetition)
    counts = np.bincount(answer, minlength=VOCAB)
    return z - frequency * counts - presence * (counts > 0)


def random_row(rng):
    return {
        "bias": {int(t): float(rng.uniform(-9, 9)) for t in rng.choice(VOCAB, rng.integers(0, 5), replace=False)},
        "stops": [int(t) for t in rng.choice(VOCAB, rng.integers(0, 4), replace=False)],
        "min_tokens": int(rng.integers(0, 12)),
        "repetition": float(rng.choice([1.0, 0.5, 1.3, 4.0])),
        "frequency": float(rng.choice([0.0, rng.uniform(-2, 2)])),
        "presence": float(rng.choice([0.0, rng.uniform(-2, 2)])),
    }


def padded(lists, width, dtype: type = np.int32, unused=-1):
    array = np.full((len(lists), width), unused, dtype)
    for row, values in enumerate(lists):
        array[row, : len(values)] = values
    return array


def shaping_of_rows(rows, prompts, answers, min_p=0.0) -> Shaping:
    def column(name, dtype: type = np.float32):
        return np.array([row[name] for row in rows], dtype)

    return Shaping(
        min_p=np.full(len(rows), min_p, np.float32),
        presence=column("presence"),
        frequency=column("frequency"),
        repetition=column("repetition"),
        min_tokens=column("min_tokens", np.int32),
        num_answered=np.array([len(answer) for answer in answers], np.int32),
        num_prompt=np.array([len(prompt) for prompt in prompts], np.int32),
        text=padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], CONTEXT),
        bias_tokens=padded([list(row["bias"]) for row in rows], 8),
        bias=padded([list(row["bias"].values()) for row in rows], 8, np.float32, 0),
        held_back=padded([row["stops"] for row in rows], 8),
    )


def test_the_formulas_are_those_of_vllm_also_for_what_the_quantum_itself_has_drawn():
    rng = np.random.default_rng(0)
    run, count = jax.jit(shaped, static_argnums=4), jax.jit(counted, static_argnums=3)
    for _ in range(40):
        rows = [random_row(rng) for _ in range(ROWS)]
        prompts = [rng.integers(0, VOCAB, rng.integers(1, 8)).tolist() for _ in rows]
        answers = [rng.integers(0, VOCAB, rng.integers(0, 8)).tolist() for _ in rows]
        shaping = shaping_of_rows(rows, prompts, answers)
        told = jax.jit(tally, static_argnums=1)(shaping, VOCABULARY)
        alive = np.ones(ROWS, bool)
        for _ in range(4):
            z = (rng.standard_normal((ROWS, VOCAB)) * 5).astype(np.float32)
            expected = [vllm(z[i], prompts[i], answers[i], **row) for i, row in enumerate(rows)]
            num_new = np.array([len(answer) for answer in answers]) - shaping.num_answered
            np.testing.assert_allclose(run(z, shaping, told, num_new, VOCABULARY), expected, rtol=2e-5, atol=2e-5)
            drawn = rng.integers(0, VOCAB, ROWS).astype(np.int32)
            told = count(told, drawn, alive, VOCABULARY)
            for row in np.flatnonzero(alive):
                answers[row].append(int(drawn[row]))
            alive = alive & (rng.random(ROWS) < 0.8)


def test_a_row_that_asks_for_nothing_gets_its_own_logits_back_beside_rows_that_ask_for_everything():
    rng = np.random.default_rng(1)
    nothing = {"bias": {}, "stops": [], "min_tokens": 0, "repetition": 1.0, "frequency": 0.0, "presence": 0.0}
    rows = [nothing if i % 2 else random_row(rng) for i in range(ROWS)]
    texts = [rng.integers(0, VOCAB, 7).tolist() for _ in rows]
    shaping = shaping_of_rows(rows, texts, texts)
    z = (rng.standard_normal((ROWS, VOCAB)) * 5).astype(np.float32)

    @jax.jit
    def run(z, shaping):
        return shaped(z, shaping, tally(shaping, VOCABULARY), np.zeros(ROWS, np.int32), VOCABULARY)

    found = run(z, shaping)
    np.testing.assert_array_equal(np.asarray(found)[1::2], z[1::2])


def draws(logits, count=2048, **fields):
    rows = np.broadcast_to(np.float32(logits), (count, len(logits)))
    key = jax.jit(stream_key)(np.zeros((count, 2), np.uint32), np.arange(count))
    defaults = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0} | fields
    full = {
        name: np.full(count, value, np.int32 if name == "top_k" else np.float32) for name, value in defaults.items()
    }
    tokens = [
        jax.jit(sample, static_argnums=3)(rows, Choices(key=key, **full), np.full(count, 7), fixed)[0]
        for fixed in (False, True)
    ]
    np.testing.assert_array_equal(*tokens)
    return np.bincount(tokens[0], minlength=len(logits))


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest_after_temperature():
    """Against its definition over many distributions; only tokens within rounding of the edge may differ."""
    rng = np.random.default_rng(2)
    for _ in range(8):
        logits, temperature, min_p = rng.standard_normal(200) * 3, rng.uniform(0.5, 2), rng.uniform(0.01, 0.5)
        p = np.exp((logits - logits.max()) / temperature)
        counts = draws(logits, temperature=temperature, min_p=min_p)
        assert not counts[p < min_p * (1 - 1e-5)].any()
        assert counts[(p >= min_p * (1 + 1e-5)) & (p / p[p >= min_p].sum() > 0.01)].all()


def test_top_p_counts_its_share_of_what_min_p_has_left():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    assert np.flatnonzero(draws(logits, min_p=0.49, top_p=0.7)).tolist() == [0, 1], "0.5 of 0.75 is less than 0.7"
    assert np.flatnonzero(draws(logits, min_p=0.49, top_p=0.6)).tolist() == [0]
    assert np.flatnonzero(draws(logits, min_p=0.1, top_k=3)).tolist() == [0, 1, 2]
    assert np.flatnonzero(draws(logits, min_p=1.0)).tolist() == [0]


# ---- in the engine


@pytest.fixture(scope="module")
def bench(tiny_qwen3):
    return SamplingBench(tiny_qwen3)


PROMPT = np.arange(3, 20, dtype=np.int32)


def greedy_reference(bench, logits_of, num_tokens):
    """Token by token from training's forward, with `logits_of(z, answer)`."""
    answer: list[int] = []
    for _ in range(num_tokens):
        z = bench.logprobs([*PROMPT, *answer])[-1]
        answer.append(int(np.argmax(logits_of(z, answer))))
    return answer


SHAPED = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": ((9, 2.0),)}


def test_greedy_answers_are_the_likeliest_of_the_shaped_logits_across_quanta(bench):
    """Log-probabilities stand for logits: they differ by a constant, which only a repetition penalty would notice."""
    fields = SHAPED | {"repetition_penalty": 1.0}
    outcome = bench.sample(PROMPT, max_tokens=14, **fields)

    def logits_of(z, answer):
        counts = np.bincount(answer, minlength=len(z)) if answer else np.zeros(len(z))
        z = z - 0.7 * counts - 1.5 * (counts > 0)
        z[9] += 2.0
        return z

    assert outcome.tokens.tolist() == greedy_reference(bench, logits_of, 14)
    plain = bench.sample(PROMPT, max_tokens=14)
    assert outcome.tokens.tolist() != plain.tokens.tolist()
    expected = bench.logprobs([*PROMPT, *outcome.tokens])[len(PROMPT) - 1 : -1]
    assert np.abs(expected[np.arange(14), outcome.tokens] - outcome.logprobs).max() < 1e-4, "those of the model itself"


def test_a_plain_row_keeps_every_bit_beside_shaped_ones(bench):
    alone = bench.sample(PROMPT, max_tokens=12, temperature=1.0, seed=5, topk_logprobs=3)
    shaped_ids = [bench.admit(PROMPT, max_tokens=12, seed=n, temperature=1.0, min_p=0.1, **SHAPED) for n in range(3)]
    plain = bench.admit(PROMPT, max_tokens=12, temperature=1.0, seed=5, topk_logprobs=3)
    bench.finish()
    assert bench.outcomes[plain].same_as(alone)
    np.testing.assert_array_equal(bench.outcomes[plain].topk_logprobs, alone.topk_logprobs)
    again = bench.sample(PROMPT, max_tokens=12, seed=0, temperature=1.0, min_p=0.1, **SHAPED)
    assert again.same_as(bench.outcomes[shaped_ids[0]])


def test_no_stop_ends_an_answer_before_its_least_length(bench):
    plain = bench.sample(PROMPT, max_tokens=12)
    stop = int(plain.tokens[2])
    stopped = bench.sample(PROMPT, max_tokens=12, stop_token_ids=(stop,))
    assert len(stopped.tokens) <= 3 and stopped.stop_reason == "stop"
    longer = bench.sample(PROMPT, max_tokens=12, stop_token_ids=(stop,), min_tokens=7)
    assert len(longer.tokens) >= 7 and stop not in longer.tokens[:7]
    many = tuple(range(200)) if stop < 200 else tuple(range(50, 256))
    held_back = bench.sample(PROMPT, max_tokens=12, stop_token_ids=many, min_tokens=7)
    assert len(held_back.tokens) >= 7 and not set(many) & set(held_back.tokens[:7].tolist())


def test_a_bias_bans_and_forces(bench):
    plain = bench.sample(PROMPT, max_tokens=10)
    banned = tuple((int(token), -100.0) for token in set(plain.tokens.tolist()))
    assert not set(bench.sample(PROMPT, max_tokens=10, logit_bias=banned).tokens) & set(plain.tokens)
    forced = bench.sample(PROMPT, max_tokens=10, temperature=1.0, logit_bias=((77, 100.0),))
    assert forced.tokens.tolist() == [77] * 10 and (forced.logprobs < -1).all(), "likely only for who draws"


def test_more_than_the_tables_hold_fails_alone(bench):
    with pytest.raises(InvalidRequest, match="logit_bias"):
        bench.admit(PROMPT, logit_bias=tuple((0, 0.0) for _ in range(LOGIT_BIAS_MAX + 1)))
    with pytest.raises(InvalidRequest, match="min_tokens"):
        bench.admit(PROMPT, min_tokens=1, stop_token_ids=tuple(range(600)))


@pytest.mark.parametrize(("passed", "ends_after"), [(0, 2), (1, 2), (2, 6), (5, 6), (6, None)])
def test_a_stop_string_may_begin_but_not_end_before_the_least_length(passed, ends_after):
    """Tokens are characters, and the stop is "ab", which ends after 2 and after 6 of them."""

    def decode(tokens):
        return "".join(map(chr, tokens))

    text = [ord(character) for character in "abxyab"]
    stops = StopStrings(["ab"], decode, [])
    stops.pass_over(text[:passed])
    completed = stops.feed(text[passed:])
    assert (None if completed is None else completed + passed) == ends_after
