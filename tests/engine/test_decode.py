"""Sampling as its users see it: the right tokens, whoever else is there, whatever is cached, preempted or cancelled."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.sampling_bench import SamplingBench
from tx_async.engine import decode
from tx_async.engine.platform import current
from tx_async.errors import InvalidRequest
from tx_async.wire.operations import SUPPORT_TOKENS_MAX
from tx_async.wire.worker import PromptScores, SampleQuantum

VOCAB = 256
BOUND = 1e-4
"""Promised: |sampled - forward| log-probability in fp32."""


MAX_RANK = 12
CRAMPED = {"kv_cache_tokens": 176, "max_context_length": 160, "max_lora_rank": MAX_RANK}
"""Of each engine with few pages: they have the same programs, which the first one compiles."""


def with_adapters(bench, slots=range(4)):
    """Adapters of odd slots fill them; the others are of a rank that has a program of its own."""
    for slot in slots:
        bench.set_adapter(slot, seed=slot, rank=MAX_RANK if slot % 2 else 4)
    return bench


@pytest.fixture(scope="module")
def bench(tiny_qwen3):
    """Room for everybody; slots 0 to 3 hold different adapters."""
    return with_adapters(SamplingBench(tiny_qwen3, max_lora_rank=MAX_RANK))


@pytest.fixture(scope="module")
def cramped(tiny_qwen3):
    """So few pages that sequences preempt each other all the time."""
    return with_adapters(SamplingBench(tiny_qwen3, **CRAMPED))


def prompts(count, seed=0, low=1, high=60):
    rng = np.random.default_rng([seed, 3])
    return [rng.integers(0, VOCAB, rng.integers(low, high)).astype(np.int32) for _ in range(count)]


# ---- the numbers


def test_weights_that_are_too_large_to_keep_twice_are_decoded_as_they_are(tiny_qwen3, bench, monkeypatch):
    (prompt,) = prompts(1)
    laid_out = bench.sample(prompt)
    assert bench.engine.decode_params is not bench.engine.params
    monkeypatch.setattr(decode, "COPY_BYTES_MAX", 0)
    large = SamplingBench(tiny_qwen3, max_lora_rank=MAX_RANK)
    assert large.engine.decode_params is large.engine.params
    assert large.sample(prompt).agrees_with(laid_out)


def test_greedy_tokens_are_the_likeliest_and_logprobs_are_the_trainers(bench):
    """P7, with a full batch of strangers, chunked prefill and a page boundary at every place."""
    ids = {bench.admit(p, sampler_slot=i % 5 - 1): (p, i % 5 - 1) for i, p in enumerate(prompts(17, low=1, high=100))}
    bench.finish(prefill_tokens=48)
    for sequence_id, (prompt, slot) in ids.items():
        outcome = bench.outcomes[sequence_id]
        everything = [*prompt, *outcome.tokens]
        expected = bench.logprobs(everything[:-1], slot)[len(prompt) - 1 :]
        assert (expected.argmax(-1) == outcome.tokens).all()
        assert np.abs(expected[np.arange(8), outcome.tokens] - outcome.logprobs).max() <= BOUND


def test_sampled_logprobs_are_the_untempered_models(bench):
    outcome = bench.sample(prompts(1)[0], temperature=2.5, top_k=20, top_p=0.8, max_tokens=30, sampler_slot=2)
    everything = [*prompts(1)[0], *outcome.tokens]
    expected = bench.logprobs(everything[:-1], 2)[-30:]
    assert np.abs(expected[np.arange(30), outcome.tokens] - outcome.logprobs).max() <= BOUND


def test_topk_sample_logprobs_list_the_likeliest_first(bench):
    prompt = prompts(1)[0]
    outcome = bench.sample(prompt, temperature=1.0, topk_logprobs=5, sampler_slot=1)
    expected = bench.logprobs([*prompt, *outcome.tokens[:-1]], 1)[len(prompt) - 1 :]
    assert outcome.topk_token_ids.shape == outcome.topk_logprobs.shape == (8, 5)
    assert (outcome.topk_token_ids == np.argsort(-expected, axis=-1)[:, :5]).all()
    assert np.abs(outcome.topk_logprobs - np.sort(-expected, axis=-1)[:, :5] * -1).max() <= BOUND


# ---- whoever else is there


def test_a_sequence_among_hundreds_is_the_sequence_alone(bench, cramped):
    """Random arrivals, lengths, adapters, sampling parameters, cancellations and preemptions on both engines: whatever
    finishes is what the same sequence gives on an engine to itself. Bit for bit, where nothing was preempted: who comes
    back has his own tokens prefilled, and a prefill rounds otherwise than a decode step."""
    alone = {}
    requests = [random_request(i) for i in range(40)]
    for i, (prompt, fields) in enumerate(requests):
        alone[i] = bench.sample(prompt, **fields)
    for crowded, seed in ((bench, 1), (cramped, 2), (cramped, 3)):
        rng = np.random.default_rng(seed)
        admitted, cancelled = {}, set()
        for i in rng.integers(0, len(requests), 100):
            prompt, fields = requests[i]
            admitted[crowded.admit(prompt, **fields)] = i
            if rng.random() < 0.4:
                crowded.quantum(int(rng.integers(1, 9)), int(rng.choice([16, 64, 256])))
            if rng.random() < 0.1:
                victim = int(rng.choice(list(admitted)))
                crowded.engine.cancel([victim])
                cancelled.add(victim)
        crowded.finish()
        for sequence_id, i in admitted.items():
            if sequence_id in crowded.outcomes:
                outcome = crowded.outcomes[sequence_id]
                assert outcome.same_as(alone[i]) if crowded is bench else outcome.agrees_with(alone[i]), requests[i]
            else:
                assert sequence_id in cancelled
    assert sum(reply.num_preempted for reply in cramped.replies) >= 10


def test_prefill_rows_of_several_pages_compute_what_rows_of_one_page_do(bench, tiny_qwen3):
    """As an accelerator has them; the last one reaches beyond the page tables."""
    wide = replace(current(), prefill_tile_tokens=64, prefill_rows=(4,))
    tiled = with_adapters(SamplingBench(tiny_qwen3, wide, max_context_length=160, max_lora_rank=MAX_RANK))
    asked = [*prompts(3, seed=5, low=40, high=120), np.arange(152)]
    for scores in (PromptScores(logprobs=True), None):  # the second time from the cache, as far as it goes
        found = []
        for one in (bench, tiled):
            ids = [one.admit(p, sampler_slot=i % 3 - 1, prompt_scores=scores) for i, p in enumerate(asked)]
            one.finish(prefill_tokens=112)
            found.append([one.outcomes[sequence_id] for sequence_id in ids])
        for of_pages, of_tiles in zip(*found, strict=True):
            assert of_tiles.agrees_with(of_pages)
            if scores:
                np.testing.assert_allclose(of_tiles.prompt_logprobs, of_pages.prompt_logprobs, atol=1e-5)


def random_request(i):
    rng = np.random.default_rng([i, 17])
    shared = prompts(1, seed=99, low=40, high=41)[0]
    prompt = rng.integers(0, VOCAB, rng.integers(1, 70))
    if rng.random() < 0.5:
        prompt = np.concatenate([shared, prompt[: rng.integers(1, 30)]])
    fields = {
        "sampler_slot": int(rng.integers(-1, 4)),
        "max_tokens": int(rng.integers(1, 50)),
        "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
        "top_k": int(rng.choice([-1, 1, 5, 40])),
        "top_p": float(rng.choice([0.3, 0.9, 1.0])),
        "seed": int(rng.integers(-(2**40), 2**62)),
        "sample_index": int(rng.integers(0, 4)),
        "stop_token_ids": tuple(rng.integers(0, 320, rng.integers(0, 3)).tolist()),
    }
    return prompt, fields


def test_an_adapter_full_of_nan_harms_only_its_own_sequences(bench, tiny_qwen3):
    """Its keys and values lie in pages that others get later, and its rows share every batch."""
    hostile = SamplingBench(tiny_qwen3, **CRAMPED)
    with_adapters(hostile, range(3))
    hostile.set_adapter(3, seed=3, change=lambda w: np.full_like(w, np.nan))
    ids = {}
    for i, prompt in enumerate(prompts(12, high=90)):
        hostile.admit(prompt[::-1], sampler_slot=3, temperature=1.0, max_tokens=12)
        ids[hostile.admit(prompt, sampler_slot=i % 4 - 1, temperature=1.0, seed=i, max_tokens=20)] = i
    hostile.finish()
    for sequence_id, i in ids.items():
        alone = bench.sample(prompts(12, high=90)[i], sampler_slot=i % 4 - 1, temperature=1.0, seed=i, max_tokens=20)
        assert hostile.outcomes[sequence_id].agrees_with(alone)
        assert np.isfinite(alone.logprobs).all()


def test_samples_of_a_seed_repeat_and_differ_among_each_other(bench):
    prompt = prompts(1)[0]
    first, again = (
        [bench.sample(prompt, temperature=1.0, seed=5, sample_index=i, max_tokens=12).tokens for i in range(3)]
        for _ in range(2)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({tokens.tobytes() for tokens in first}) == 3
    assert (bench.sample(prompt, temperature=1.0, seed=5 + 2**32, max_tokens=12).tokens != first[0]).any()


def test_two_quanta_in_flight_give_what_one_at_a_time_gives(bench):
    """The worker issues the next command before it has waited for the one before."""
    wanted = [bench.sample(p, temperature=1.0, seed=i, max_tokens=20) for i, p in enumerate(prompts(10))]
    ids = [bench.admit(p, temperature=1.0, seed=i, max_tokens=20) for i, p in enumerate(prompts(10))]
    outcomes, pending = {}, []
    while len(outcomes) < len(ids):
        quantum = SampleQuantum(decode_steps=4, prefill_tokens=64)
        pending.append(bench.engine.quantum(quantum, bench.weights, bench.scale))
        if len(pending) > 2:
            reply, tensors = pending.pop(0)()
            outcomes |= {finished.sequence_id: tensors[finished.tokens_index] for finished in reply.finished}
    while pending:
        pending.pop(0)()
    assert all((outcomes[i] == alone.tokens).all() for i, alone in zip(ids, wanted, strict=True))


# ---- prefixes


def test_samples_of_one_prompt_prefill_it_once(bench):
    prompt = np.arange(75) % 251
    before = len(bench.replies)
    ids = [bench.admit(prompt, temperature=1.0, seed=1, sample_index=i, adapter_version="fresh") for i in range(16)]
    bench.finish()
    assert sum(reply.num_prefilled_tokens for reply in bench.replies[before:]) == 74
    assert len({bench.outcomes[i].tokens.tobytes() for i in ids}) == 16
    assert bench.outcomes[ids[0]].num_cached_tokens == 0


def test_a_conversation_prefills_only_what_is_new(bench):
    """Each turn's prompt is all that was said; full pages of it are found again, whatever decoded or prefilled them."""
    prompt, computed = list(range(100, 150)), []
    for turn in range(8):
        before = len(bench.replies)
        outcome = bench.sample(prompt, max_tokens=20, adapter_version="conversation")
        computed.append(sum(reply.num_prefilled_tokens for reply in bench.replies[before:]))
        assert outcome.num_cached_tokens == (0 if turn == 0 else len(prompt) - 1 - computed[-1])
        prompt = [*prompt, *outcome.tokens, *range(turn, turn + 15)]
    assert computed[0] == 49
    assert max(computed[1:]) <= 15 + 16


def test_versions_do_not_share_pages(bench):
    prompt = np.arange(65)
    bench.sample(prompt, sampler_slot=0, adapter_version="a")
    assert bench.sample(prompt, sampler_slot=1, adapter_version="b").num_cached_tokens == 0
    assert bench.sample(prompt, sampler_slot=0, adapter_version="a").num_cached_tokens == 64


def test_results_are_the_same_without_the_cache(bench, tiny_qwen3):
    plain = with_adapters(SamplingBench(tiny_qwen3, prefix_cache=False, max_lora_rank=MAX_RANK))
    for i in range(12):
        prompt, fields = random_request(i)
        warm = [bench.sample(prompt, **fields) for _ in range(2)][1]
        cold = plain.sample(prompt, **fields)
        assert cold.num_cached_tokens == 0
        assert cold.same_as(warm)


# ---- endings


def test_a_stop_token_ends_a_sequence_and_is_its_last_token(bench):
    free = bench.sample([1, 2, 3], temperature=1.0, seed=3, max_tokens=40)
    stop = int(free.tokens[10])
    first = int(np.flatnonzero(free.tokens == stop)[0])
    stopped = bench.sample([1, 2, 3], temperature=1.0, seed=3, max_tokens=40, stop_token_ids=(stop,))
    assert stopped.stop_reason == "stop"
    assert (stopped.tokens == free.tokens[: first + 1]).all()
    assert len(stopped.logprobs) == first + 1


def test_more_stop_tokens_than_the_device_knows(bench):
    free = bench.sample([1, 2, 3], temperature=1.0, seed=3, max_tokens=40)
    stop = int(free.tokens[10])
    first = int(np.flatnonzero(free.tokens == stop)[0])
    others = [token for token in range(320) if token not in free.tokens][:30]
    outcome = bench.sample([1, 2, 3], temperature=1.0, seed=3, max_tokens=40, stop_token_ids=(*others, stop))
    assert outcome.stop_reason == "stop"
    assert (outcome.tokens == free.tokens[: first + 1]).all()


def test_a_stop_string_ends_a_sequence_after_the_token_that_completes_it(bench, tiny_qwen3):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    free = bench.sample([1, 2, 3], temperature=1.0, seed=4, max_tokens=60)
    place = next(i for i in range(20, 60) if free.tokens[i] < 256 and tokenizer.decode(free.tokens[i]).isascii())
    text = tokenizer.decode(free.tokens[place])
    outcome = bench.sample([1, 2, 3], temperature=1.0, seed=4, max_tokens=60, stop_strings=("never said", text))
    first = next(n for n in range(1, 61) if text in tokenizer.decode(free.tokens[:n]))
    assert outcome.stop_reason == "stop"
    assert (outcome.tokens == free.tokens[:first]).all()


def test_the_context_bounds_a_completion(cramped):
    outcome = cramped.sample(np.arange(150), max_tokens=10_000)
    assert outcome.stop_reason == "length"
    assert len(outcome.tokens) == 10


def test_a_cancelled_sequence_leaves_and_its_pages_come_back(cramped):
    cramped.finish()
    ids = [cramped.admit(p, max_tokens=50) for p in prompts(20, high=50)]
    cramped.quantum()
    cramped.engine.cancel(ids)
    assert not list(cramped.engine.sequences)
    assert cramped.quantum().finished == ()
    assert cramped.engine.sequences.cache.num_available == cramped.engine.layout.num_pages - 1


# ---- what is known of prompts


@pytest.mark.parametrize("length", [1, 2, 17, 33, 150])
def test_prompt_scores_are_the_models(bench, length):
    prompt = prompts(1, seed=length, low=length, high=length + 1)[0]
    rng = np.random.default_rng(length)
    targets = rng.integers(-1, 320, (length - 1, 3)).astype(np.int32)
    scores = PromptScores(logprobs=True, topk=4, targets_index=1, alt_tokens_k=6)
    outcome = bench.sample(prompt, targets=targets, sampler_slot=1, temperature=1.0, prompt_scores=scores)
    expected = bench.logprobs(prompt, 1)[:-1]
    assert np.isnan(outcome.prompt_logprobs[0])
    assert np.allclose(outcome.prompt_logprobs[1:], expected[np.arange(length - 1), prompt[1:]], atol=BOUND)
    assert (outcome.prompt_topk_token_ids[0] == 0).all()
    assert (outcome.prompt_topk_logprobs[0] == -99999.0).all()
    assert (outcome.prompt_topk_token_ids[1:] == np.argsort(-expected, axis=-1)[:, :4]).all()
    assert np.allclose(outcome.prompt_topk_logprobs[1:], -np.sort(-expected, axis=-1)[:, :4], atol=BOUND)
    listed = np.take_along_axis(expected, np.maximum(targets, 0), axis=1)
    assert np.allclose(outcome.target_logprobs, np.where(targets < 0, 0.0, listed), atol=BOUND)
    assert outcome.alt_token_ids.shape == outcome.alt_logprobs.shape == (length - 1, 6)
    alternatives = np.take_along_axis(expected, outcome.alt_token_ids, axis=1)
    assert np.allclose(outcome.alt_logprobs, alternatives, atol=BOUND)


def test_last_n_scores_only_the_last_positions_and_uses_the_cache(bench):
    prompt = np.arange(3, 103)
    bench.sample(prompt, adapter_version="last")
    outcome = bench.sample(prompt, adapter_version="last", prompt_scores=PromptScores(logprobs=True, topk=2, last_n=7))
    assert np.isnan(outcome.prompt_logprobs[:-7]).all()
    assert (outcome.prompt_topk_logprobs[:-7] == -99999.0).all()
    expected = bench.logprobs(prompt)[92:-1]
    assert np.allclose(outcome.prompt_logprobs[-7:], expected[np.arange(7), prompt[-7:]], atol=BOUND)
    assert outcome.num_cached_tokens == 80  # a copy of the last page would leave position 92 without its hidden state


def test_prompt_scores_survive_preemption(cramped):
    prompt, scores = np.arange(100) + 7, PromptScores(logprobs=True)
    alone = cramped.sample(prompt, prompt_scores=scores, max_tokens=30).prompt_logprobs
    ids = [cramped.admit(p, max_tokens=60) for p in prompts(5, seed=4, low=30, high=50)]
    scored = cramped.admit(prompt, prompt_scores=scores, max_tokens=30)
    cramped.finish(prefill_tokens=32)
    assert np.allclose(cramped.outcomes[scored].prompt_logprobs, alone, equal_nan=True, atol=1e-5)
    assert all(i in cramped.outcomes for i in ids)


def test_alternatives_follow_the_tempered_distribution(bench):
    """Many draws at one position, chi-squared against the exact distribution over the likeliest tokens and the rest."""
    prompt, counts = np.array([5, 6]), np.zeros(320)
    for seed in range(40):
        scores = PromptScores(alt_tokens_k=100)
        outcome = bench.sample(prompt, max_tokens=1, temperature=1.5, seed=seed, prompt_scores=scores)
        counts += np.bincount(outcome.alt_token_ids[0], minlength=320)
    expected = np.exp(bench.logprobs(prompt)[0] / 1.5)
    assert chi_squared(counts, expected / expected.sum()) < 4.5


def chi_squared(counts, probabilities):
    """Standardised: about N(0, 1) when the counts come from the probabilities; rare outcomes are merged."""
    expected = counts.sum() * probabilities
    common = expected >= 5
    merged = lambda x: np.append(x[common], x[~common].sum())  # noqa: E731
    observed, expected = merged(counts), np.maximum(merged(expected), 1e-9)
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), common.sum()
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.6, "temperature": 1.7}],
    ids=str,
)
def test_samples_follow_the_exact_distribution(bench, fields):
    fields = {"temperature": 1.0} | fields
    prompt = np.array([9, 8, 7])
    ids = [bench.admit(prompt, max_tokens=1, seed=11, sample_index=i, **fields) for i in range(1500)]
    bench.finish(1)
    counts = np.bincount([bench.outcomes[i].tokens[0] for i in ids], minlength=320)
    exact = exact_distribution(bench.logprobs(prompt)[-1], **fields)
    assert counts[exact == 0].sum() == 0
    assert chi_squared(counts, exact) < 4.5


@pytest.mark.parametrize(
    ("fields", "head_tokens", "width", "is_whole"),
    [
        ({}, 8, 8, 0),
        ({"temperature": 0.6}, 8, 8, 0),
        ({"top_k": 6}, 8, 6, 1),
        ({"top_k": 30, "top_p": 0.9}, 8, 8, 2),
        ({"temperature": 0.0}, 8, 1, 1),
        ({"top_k": 200}, SUPPORT_TOKENS_MAX, 200, 1),
        ({"top_p": 0.99}, SUPPORT_TOKENS_MAX, None, 1),
    ],
    ids=str,
)
def test_a_recorded_head_is_what_was_drawn_from(bench, fields, head_tokens, width, is_whole):
    """Beside a neighbour that records nothing, over two quanta."""
    prompt, fields = prompts(1)[0], {"temperature": 1.0} | fields
    recorded = bench.admit(prompt, max_tokens=6, seed=4, sampler_slot=1, head_tokens=head_tokens, **fields)
    bench.admit(prompt, max_tokens=6, seed=5)
    bench.finish(4)
    outcome = bench.outcomes[recorded]
    expected = bench.logprobs([*prompt, *outcome.tokens[:-1]], 1)[len(prompt) - 1 :]
    width = width or (outcome.head_probabilities > 0).sum(1).max()
    assert outcome.head_token_ids.shape == outcome.head_probabilities.shape == (6, width)
    assert (outcome.head_is_whole == is_whole).all()
    if is_whole == 1:
        np.testing.assert_allclose(outcome.head_probabilities.sum(1), 1, atol=1e-5)
    for logprobs, ids, probabilities in zip(expected, outcome.head_token_ids, outcome.head_probabilities, strict=True):
        greedy = np.where(np.arange(320) == logprobs.argmax(), 1.0, 0.0)
        exact = exact_distribution(logprobs, **fields) if fields["temperature"] else greedy
        mine = probabilities > 0  # a step that has fewer than another has unused cells
        assert (ids[mine] == np.argsort(-logprobs, kind="stable")[: mine.sum()]).all()
        np.testing.assert_allclose(probabilities[mine], exact[ids[mine]], atol=1e-5)


def exact_distribution(logprobs, temperature, top_k=-1, top_p=1.0):
    p = np.exp(logprobs.astype(np.float64) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k if top_k > 0 else len(p)]
    share = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: np.searchsorted(share, top_p) + 1]
    exact = np.zeros_like(p)
    exact[kept] = p[kept] / p[kept].sum()
    return exact


# ---- programs


def test_no_workload_compiles_a_program_that_was_not_known_at_start(tiny_qwen3):
    from tx_async.engine.compilation import CompilationCounter

    bench = SamplingBench(tiny_qwen3, **CRAMPED)
    bench.set_adapter(1, seed=1)
    for program in bench.engine.programs.values():
        program.executables = None  # so that the counter sees each one
    bench.sample([1, 2, 3])
    known, counter = num_compiled(bench), CompilationCounter()
    scores = PromptScores(logprobs=True, topk=3, alt_tokens_k=2)
    for i in range(30):
        prompt, fields = random_request(i)
        fields |= {"sampler_slot": 1, "topk_logprobs": i % 4, "prompt_scores": scores if i % 5 == 0 else None}
        bench.admit(prompt, **fields)
        bench.quantum()
    bench.finish()
    counter.close()
    assert counter.count == num_compiled(bench) - known


def num_compiled(bench):
    return sum("not compiled" not in repr(program) for program in bench.engine.programs.values())


def test_a_prompt_that_fills_the_context_is_scored_and_nothing_is_sampled(cramped):
    """compute_logprobs of what the server itself has sampled to the end of the context."""
    prompt = prompts(1, seed=8, low=160, high=161)[0]
    outcome = cramped.sample(prompt, max_tokens=0, prompt_scores=PromptScores(logprobs=True), topk_logprobs=2)
    assert outcome.stop_reason == "length" and len(outcome.tokens) == len(outcome.logprobs) == 0
    expected = cramped.logprobs(prompt)[:-1]
    assert np.allclose(outcome.prompt_logprobs[1:], expected[np.arange(159), prompt[1:]], atol=BOUND)
    with pytest.raises(InvalidRequest, match="160"):
        cramped.admit(prompt)
