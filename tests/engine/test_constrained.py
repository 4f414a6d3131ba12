"""Grammars: every token is one that the grammar allows, and rows without one do not notice."""

import json

import numpy as np
import pytest

from tests.support.sampling_bench import SamplingBench
from tx_async.engine.stops import load_decoder
from tx_async.grammar import compiled, vocabulary

PROMPT = np.arange(3, 20, dtype=np.int32)
END = 256
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, 22, 333]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


def grammar_of(schema=None, lark=None) -> str:
    body = {"json_schema": schema} if lark is None else {"lark_grammar": lark}
    return json.dumps({"grammars": [{"name": "main", **body}]})


@pytest.fixture(scope="module")
def bench(tiny_qwen3):
    return SamplingBench(tiny_qwen3)


@pytest.fixture(scope="module")
def text_of(tiny_qwen3):
    return load_decoder(str(tiny_qwen3))


def fields(schema=SCHEMA, **more):
    return {"grammar": grammar_of(schema), "stop_token_ids": (END,), "max_tokens": 200, "temperature": 1.0} | more


def permitted(bench, constraint):
    bits = np.unpackbits(constraint.allowed.view(np.uint8), bitorder="little")
    return bits[: bench.model.vocab_size].astype(bool)


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5, "temperature": 5}]
)
def test_answers_obey_a_schema_however_they_are_drawn(bench, text_of, more):
    for seed in range(2):
        outcome = bench.sample(PROMPT, seed=seed, **fields(**more))
        assert outcome.stop_reason == "stop" and outcome.tokens[-1] == END
        answer = json.loads(text_of(outcome.tokens[:-1]))
        assert answer["n"] in (1, 22, 333) and len(answer["name"]) <= 5 and len(answer) == 2
    scores = bench.logprobs([*PROMPT, *outcome.tokens])[len(PROMPT) - 1 : -1]
    told = scores[np.arange(len(outcome.tokens)), outcome.tokens]
    np.testing.assert_allclose(outcome.logprobs, told, atol=1e-4, err_msg="they are those of the model itself")


def test_greedy_takes_the_likeliest_token_that_is_allowed(bench, tiny_qwen3):
    outcome = bench.sample(PROMPT, **fields(temperature=0.0))
    constraint = compiled(vocabulary(str(tiny_qwen3)), grammar_of(SCHEMA)).begin((END,), bench.model.vocab_size)
    for place, token in enumerate(outcome.tokens.tolist()):
        scores = bench.logprobs([*PROMPT, *outcome.tokens[:place]])[-1]
        assert token == np.argmax(np.where(permitted(bench, constraint), scores, -np.inf))
        if token != END:
            constraint.accept([token])


def test_neighbours_keep_every_bit(bench):
    alone = bench.sample(PROMPT, max_tokens=12, temperature=1.0, seed=5, topk_logprobs=3)
    constrained_alone = bench.sample(PROMPT, **fields(seed=1))
    constrained = [bench.admit(PROMPT, **fields(seed=n)) for n in range(3)]
    plain = bench.admit(PROMPT, max_tokens=12, temperature=1.0, seed=5, topk_logprobs=3)
    bench.finish()
    assert bench.outcomes[plain].same_as(alone)
    np.testing.assert_array_equal(bench.outcomes[plain].topk_logprobs, alone.topk_logprobs)
    assert bench.outcomes[constrained[1]].same_as(constrained_alone)


def test_a_preempted_answer_goes_on_where_it_was(bench, tiny_qwen3):
    """Pages for two sequences of four: they take turns, and each still obeys its grammar and its seed."""
    narrow = SamplingBench(tiny_qwen3, kv_cache_tokens=96, max_context_length=96)
    more = fields(max_tokens=60)
    expected = [bench.sample(PROMPT, **more | {"seed": seed}) for seed in range(4)]
    ids = [narrow.admit(PROMPT, **more | {"seed": seed}) for seed in range(4)]
    narrow.finish()
    assert sum(reply.num_preempted for reply in narrow.replies)
    assert all(narrow.outcomes[i].tokens.tolist() == one.tokens.tolist() for i, one in zip(ids, expected, strict=True))


def test_what_no_grammar_can_do_fails_alone(bench):
    ids = [
        bench.admit(PROMPT, grammar=grammar_of(lark='start: "a'), stop_token_ids=(END,)),
        bench.admit(PROMPT, grammar=grammar_of(lark='start: "a"'), max_tokens=5),
        bench.admit(PROMPT, max_tokens=3),
    ]
    bench.finish()
    failed = {number: message for reply in bench.replies for number, _, message in reply.failed}
    assert "grammar" in failed[ids[0]] and "no token" in failed[ids[1]], "no stop token can end it"
    assert len(bench.outcomes[ids[2]].tokens) == 3
