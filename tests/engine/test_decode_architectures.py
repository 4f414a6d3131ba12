"""Every architecture samples as transformers does, and as this server's trainer scores it."""

from pathlib import Path

import numpy as np
import pytest

from tests.support import parity
from tests.support.sampling_bench import SamplingBench
from tx_async.models.load import load_model
from tx_async.testing.models import make_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "greedy.npz")
BOUND = 1e-4
"""Promised: |sampled - forward| log-probability in fp32."""


def greedy(bench, case, seed):
    """All prompts at once, in chunks."""
    ids = [bench.admit(p, max_tokens=parity.GREEDY_TOKENS) for p in parity.greedy_prompts(case, seed)]
    bench.finish(prefill_tokens=64)
    return np.stack([bench.outcomes[i].tokens for i in ids])


@pytest.mark.parametrize("case", parity.KINDS, ids=lambda case: case.name)
def test_greedy_answers_equal_generates_and_logprobs_the_trainers(case, tmp_path):
    bench = None
    for seed in parity.GREEDY_SEEDS:
        folder = make_model(tmp_path / str(seed), case.config, seed, tokenizer=False)
        bench = bench or SamplingBench(folder, prefix_cache=False)
        bench.use_params(load_model(folder)[1])
        assert (greedy(bench, case, seed) == GOLDEN[parity.golden_name(case, seed)]).all()
    for slot in range(3):
        bench.set_adapter(slot, seed=slot)
    prompts = parity.greedy_prompts(case, 0)
    slots = [i % 4 - 1 for i in range(8)]
    ids = [bench.admit(p, sampler_slot=s, temperature=1.0) for p, s in zip(prompts, slots, strict=True)]
    bench.finish(prefill_tokens=64)
    for sequence_id, prompt, slot in zip(ids, prompts, slots, strict=True):
        outcome = bench.outcomes[sequence_id]
        expected = bench.logprobs([*prompt, *outcome.tokens[:-1]], slot)[len(prompt) - 1 :]
        assert np.abs(expected[np.arange(8), outcome.tokens] - outcome.logprobs).max() <= BOUND


@pytest.mark.torch
@pytest.mark.parametrize("case", parity.LIVE, ids=lambda case: case.name)
def test_greedy_answers_equal_generates_live(case, tmp_path):
    pytest.importorskip("torch", reason="compares with transformers' own generate")
    seed = 7
    folder = make_model(tmp_path, case.config, seed, tokenizer=False)
    assert (greedy(SamplingBench(folder), case, seed) == parity.reference_greedy(folder, case, seed)).all()
