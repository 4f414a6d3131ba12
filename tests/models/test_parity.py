"""The numbers of transformers: stored ones always, live ones where torch is installed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support import parity
from tx_async.models.load import load_model
from tx_async.testing.models import make_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "logits.npz")
BOUND = 2e-5


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_logits_equal_the_reference_for_every_switch_and_seed(case, tmp_path):
    forward = None
    for seed in parity.SEEDS:
        model, params = load_model(make_model(tmp_path / str(seed), case.config, seed, tokenizer=False))
        forward = forward or jax.jit(lambda params, tokens, model=model: parity.logits(model, params, tokens))
        ours = np.asarray(forward(params, parity.tokens_of(case, seed)))[0, -parity.STORED_POSITIONS :]
        assert parity.relative_error(ours, GOLDEN[parity.golden_name(case, seed)]) < BOUND


@pytest.mark.torch
@pytest.mark.parametrize("case", parity.FAMILIES, ids=lambda case: case.name)
def test_logits_equal_transformers_live(case, tmp_path):
    pytest.importorskip("torch", reason="compares with transformers' own forward pass")
    folder, tokens = make_model(tmp_path, case.config, 2, tokenizer=False), parity.tokens_of(case, 2, rows=2)
    model, params = load_model(folder)
    ours = jax.jit(lambda params: parity.logits(model, params, tokens))(params)
    assert parity.relative_error(ours, parity.reference_logits(folder, tokens)) < BOUND
