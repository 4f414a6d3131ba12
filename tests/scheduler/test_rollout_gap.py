"""The metrics that say how far the trainer is from the sampler."""

import numpy as np
import pytest

from tx_async.scheduler.training.rollout_gap import rollout_gap
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.tensors import Tensor


def gap_of(q: list[float], p: list[float]) -> dict[str, float]:
    inputs = {"logprobs": Tensor.of(np.array(q, np.float32)), "advantages": Tensor.of(np.ones(len(q), np.float32))}
    datum = Datum(np.zeros(len(q), np.int32).tobytes(), inputs)
    operation = ForwardBackward(model_id="m", seq_id=1, data=(datum,), loss_fn="importance_sampling")
    return rollout_gap(operation, [np.array(p, np.float32)])


def test_the_ratio_is_the_mean_of_the_trainer_s_over_the_sampler_s():
    gap = gap_of([-1.0, -2.0], [-1.0, -1.0])
    assert gap["ratio:mean"] == pytest.approx((1 + np.e) / 2)
    assert (gap["kl_sample_train:mean"], gap["kl_sample_train:max"]) == (-0.5, 0.0)


@pytest.mark.parametrize("placeholder", [-1e30, -500.0, -90.0])
def test_a_placeholder_for_a_logprob_leaves_the_ratio_as_finite_as_the_loss(placeholder):
    """Its ratio is clamped as the losses clamp it, to exp(20)."""
    assert gap_of([placeholder, -1.0], [-1.0, -1.0])["ratio:mean"] == pytest.approx((np.exp(20) + 1) / 2)


def test_a_logprob_that_is_not_a_number_stays_visible():
    assert np.isnan(gap_of([np.nan, -1.0], [-1.0, -1.0])["ratio:mean"])
