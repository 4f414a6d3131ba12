"""At start each kernel is tried beside the plain version; what fails or differs does not run."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tx_async.engine import kernels
from tx_async.engine.kernel_uses import choose_for
from tx_async.engine.kernels import ALL_KERNELS, NO_KERNELS, Kernels, Paged, TrainedHeads, choose
from tx_async.engine.platform import ACCELERATOR, CPU
from tx_async.models.load import from_config
from tx_async.testing.models import DEEPSEEK_V3_TINY, GPT_OSS_TINY, QWEN3_TINY

LATENT = Paged(heads=4, features=48, v_features=32)
OVER_PAGES = (kernels.paged_difference, kernels.prefill_difference)


@pytest.mark.parametrize(
    "difference",
    [
        kernels.grouped_difference,
        partial(kernels.flash_difference, TrainedHeads(16, 16, has_window=True, has_sinks=True)),
    ]
    + [partial(of, case) for of in OVER_PAGES for case in (Paged(has_sinks=True), LATENT)],
)
def test_a_self_test_finds_the_interpreted_kernel_right(difference):
    assert difference(interpret=True) <= kernels.TOLERANCE


def test_what_is_right_runs(monkeypatch):
    monkeypatch.setattr(kernels, "flash_difference", lambda trained: 1e-3)
    monkeypatch.setattr(kernels, "paged_difference", lambda paged: 1e-3)
    monkeypatch.setattr(kernels, "prefill_difference", lambda paged: 1e-3)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 1e-3)
    assert choose(ACCELERATOR) == ALL_KERNELS and choose(CPU) == NO_KERNELS


def test_a_kernel_that_is_wrong_on_one_host_runs_on_none_of_the_mesh(monkeypatch):
    monkeypatch.setattr(kernels, "flash_difference", lambda trained: 0.0)
    monkeypatch.setattr(kernels, "paged_difference", lambda paged: 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda paged: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    monkeypatch.setattr(kernels.jax, "process_count", lambda: 2)
    answers = iter([[True, True], [True, False], [False, False], [False, True]])
    monkeypatch.setattr(kernels.multihost_utils, "process_allgather", lambda found: np.array(next(answers)))
    assert choose(ACCELERATOR) == Kernels(flash_attention=True)


def test_kernels_over_pages_are_tried_with_the_models_heads(monkeypatch):
    """A block of wide heads may be more than a device's shared memory holds."""
    monkeypatch.setattr(kernels, "flash_difference", lambda trained: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda paged: 0.0)

    def tried_for(model):
        tried = []
        monkeypatch.setattr(kernels, "paged_difference", lambda paged: tried.append(paged) or 0.0)
        choose_for(model, ACCELERATOR)
        return tried

    tiny = {"narrow": QWEN3_TINY | {"head_dim": 16}, "wide": QWEN3_TINY | {"head_dim": 256}, "sinks": GPT_OSS_TINY}
    tiny |= {"latent": DEEPSEEK_V3_TINY | {"qk_rope_head_dim": 16}, "latent that does not fit": DEEPSEEK_V3_TINY}
    found = {name: tried_for(from_config(config)) for name, config in tiny.items()}
    assert found == {
        "narrow": [Paged()],
        "wide": [Paged(features=256)],
        "sinks": [Paged(has_sinks=True)],
        "latent": [LATENT],
        "latent that does not fit": [Paged()],
    }


def test_the_kernel_of_training_is_tried_with_each_kind_of_the_models_heads(monkeypatch):
    for name in ("paged_difference", "prefill_difference"):
        monkeypatch.setattr(kernels, name, lambda paged: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)

    def tried_for(config):
        tried = []
        monkeypatch.setattr(kernels, "flash_difference", lambda trained: tried.append(trained) or 0.0)
        choose_for(from_config(config), ACCELERATOR)
        return tried

    assert tried_for(QWEN3_TINY | {"head_dim": 256}) == [TrainedHeads(256, 256)]
    assert tried_for(QWEN3_TINY | {"head_dim": 24}) == [TrainedHeads()], "it does not run there"
    assert tried_for(DEEPSEEK_V3_TINY | {"qk_rope_head_dim": 16}) == [TrainedHeads(32, 16)]
    windows = TrainedHeads(16, 16, has_window=True, has_sinks=True)
    assert tried_for(GPT_OSS_TINY) == [windows, TrainedHeads(16, 16, has_sinks=True)]


def test_a_kernel_that_is_wrong_for_one_kind_of_layer_runs_in_none(monkeypatch):
    monkeypatch.setattr(kernels, "flash_difference", lambda trained: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    monkeypatch.setattr(kernels, "paged_difference", lambda paged: float("nan") if paged.v_features else 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda paged: 0.0)
    assert choose(ACCELERATOR, (Paged(), LATENT, Paged())) == replace(ALL_KERNELS, paged_attention=False)


@pytest.mark.parametrize("found", [1.0, float("nan"), RuntimeError("no such instruction")])
def test_a_kernel_that_differs_or_fails_gives_way_and_the_log_says_so(found, monkeypatch, caplog):
    def difference(trained):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(kernels, "flash_difference", difference)
    monkeypatch.setattr(kernels, "paged_difference", lambda paged: 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda paged: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        chosen = choose(ACCELERATOR)
    assert chosen == replace(ALL_KERNELS, flash_attention=False)
    assert "flash_attention" in caplog.text and len(caplog.records) == 1
