"""Ten AdamW steps end in PEFT's weights: stored ones always, live ones where torch is installed."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.support import parity, parity_training
from tx_async.models.load import load_model
from tx_async.testing.models import make_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "training.npz")
BOUND = 1e-4
program_of = functools.cache(parity_training.step_program)
families = pytest.mark.parametrize("case", parity.KINDS, ids=lambda case: case.name)


@families
def test_ten_steps_end_in_the_weights_of_peft(case, tmp_path):
    model, params = load_model(make_model(tmp_path, case.config, tokenizer=False))
    program = program_of(model)
    start = dict(parity_training.leaves_of(parity_training.start_of(case)))
    for name, adam in parity_training.ADAMS.items():
        adapter, norms = parity_training.trained(model, params, case, program, adam)
        assert norms.min() > adam.grad_clip_norm, "a clip that never clips shows nothing"
        for leaf, values in parity_training.leaves_of(adapter):
            expected = GOLDEN[f"{case.name}/{name}/{leaf}"]
            assert parity.relative_error(parity_training.sampled(values), expected) < BOUND, (name, leaf)
            assert parity.relative_error(values, start[leaf]) > 0.15, f"{leaf} hardly moved: its error would not show"


@pytest.mark.torch
@pytest.mark.parametrize("case", parity.LIVE, ids=lambda case: case.name)
def test_ten_steps_end_in_the_weights_of_peft_live(case, tmp_path):
    pytest.importorskip("torch", reason="trains beside PEFT")
    pytest.importorskip("peft", reason="trains beside PEFT")
    folder = make_model(tmp_path / "model", case.config, 1, tokenizer=False)
    model, params = load_model(folder)
    adam = parity_training.ADAMS["decay_and_clip"]
    ours, _ = parity_training.trained(model, params, case, program_of(model), adam)
    theirs = dict(parity_training.leaves_of(parity_training.reference_trained(folder, case, adam, tmp_path)))
    for leaf, values in parity_training.leaves_of(ours):
        assert parity.relative_error(values, theirs[leaf]) < BOUND, leaf
