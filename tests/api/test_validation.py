"""What a sample may ask of the sampler beyond the SDK's own parameters: refused by name where it makes no sense."""

import math

import numpy as np
import pytest

from tx_async.api import validation
from tx_async.errors import InvalidRequest
from tx_async.testing.fake_scheduler import FAKE_BASE_MODEL
from tx_async.wire.operations import Sample
from tx_async.wire.worker import LOGIT_BIAS_MAX


def validated(**fields) -> Sample:
    prompt = np.array([5, 6], "<i4").tobytes()
    operation = Sample(sampling_session_id="", seq_id=0, prompt=prompt, max_tokens=8, **fields)
    return validation.sample(operation, FAKE_BASE_MODEL, num_samples_max=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("min_tokens", -1),
        ("min_tokens", 9),
        ("logit_bias", ((1000, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((0, 0.0) for _ in range(LOGIT_BIAS_MAX + 1))),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=field):
        validated(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 10.0},
        {"min_tokens": 8},
        {"logit_bias": ((0, -100.0), (999, 100.0))},
    ],
)
def test_what_makes_sense_stays_as_it_is(fields):
    operation = validated(**fields)
    assert {name: getattr(operation, name) for name in fields} == fields


def test_what_stable_reinforce_records_is_drawn_from_the_model_s_own_logits():
    with pytest.raises(InvalidRequest, match="record_stability_info"):
        validated(record_stability_info=True, min_p=0.1)
