"""At start each kernel is tried beside the plain version; what fails or differs does not run."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from tx_async.engine import kernels
from tx_async.engine.kernels import ALL_KERNELS, NO_KERNELS, Kernels, choose
from tx_async.engine.platform import ACCELERATOR, CPU


@pytest.mark.parametrize(
    "difference",
    [kernels.flash_difference, kernels.paged_difference, kernels.prefill_difference, kernels.grouped_difference],
)
def test_a_self_test_finds_the_interpreted_kernel_right(difference):
    assert difference(interpret=True) <= kernels.TOLERANCE


def test_what_is_right_runs(monkeypatch):
    monkeypatch.setattr(kernels, "flash_difference", lambda: 1e-3)
    monkeypatch.setattr(kernels, "paged_difference", lambda head: 1e-3)
    monkeypatch.setattr(kernels, "prefill_difference", lambda head: 1e-3)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 1e-3)
    assert choose(ACCELERATOR) == ALL_KERNELS and choose(CPU) == NO_KERNELS


def test_a_kernel_that_is_wrong_on_one_host_runs_on_none_of_the_mesh(monkeypatch):
    monkeypatch.setattr(kernels, "flash_difference", lambda: 0.0)
    monkeypatch.setattr(kernels, "paged_difference", lambda head: 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda head: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    monkeypatch.setattr(kernels.jax, "process_count", lambda: 2)
    answers = iter([[True, True], [True, False], [False, False], [False, True]])
    monkeypatch.setattr(kernels.multihost_utils, "process_allgather", lambda found: np.array(next(answers)))
    assert choose(ACCELERATOR) == Kernels(flash_attention=True)


def test_kernels_over_pages_are_tried_with_the_models_heads(monkeypatch):
    """A block of wide heads may be more than a device's shared memory holds."""
    tried = []
    for name in ("flash_difference", "grouped_difference"):
        monkeypatch.setattr(kernels, name, lambda: 0.0)
    for name in ("paged_difference", "prefill_difference"):
        monkeypatch.setattr(kernels, name, lambda head: tried.append(head) or 0.0)
    choose(ACCELERATOR, head=256)
    choose(ACCELERATOR, head=576)
    assert tried == [256, 256, 64, 64]


@pytest.mark.parametrize("found", [1.0, float("nan"), RuntimeError("no such instruction")])
def test_a_kernel_that_differs_or_fails_gives_way_and_the_log_says_so(found, monkeypatch, caplog):
    def difference():
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(kernels, "flash_difference", difference)
    monkeypatch.setattr(kernels, "paged_difference", lambda head: 0.0)
    monkeypatch.setattr(kernels, "prefill_difference", lambda head: 0.0)
    monkeypatch.setattr(kernels, "grouped_difference", lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        chosen = choose(ACCELERATOR)
    assert chosen == replace(ALL_KERNELS, flash_attention=False)
    assert "flash_attention" in caplog.text and len(caplog.records) == 1
