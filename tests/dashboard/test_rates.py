"""Curves from counters, and what is another than a second ago."""

from tx_async.dashboard.picture import change
from tx_async.dashboard.rates import HOUR_S, INTERVAL_S, Rates, Reading, series


def reading(at: float, train: float = 0.0, sample: float = 0.0, **more: float) -> Reading:
    return Reading(at, train, sample, more.get("train_ms", 0.0), more.get("sample_ms", 0.0))


def test_rates_are_per_second_of_their_interval():
    assert series([reading(0), reading(10, 50), reading(30, 50, 100)]) == {
        "at": [10, 30],
        "train": [5, 0],
        "sample": [0, 5],
    }


def test_a_counter_that_begins_anew_is_no_negative_rate():
    assert series([reading(0, 90), reading(10, 5)])["train"] == [0]


def test_an_hour_is_kept_and_no_more():
    rates = Rates()
    for i in range(1_000):
        rates.note(reading(i * INTERVAL_S, i))
        rates.note(reading(i * INTERVAL_S + 1, i))
    kept = rates.hour()["at"]
    assert len(kept) == HOUR_S / INTERVAL_S and kept[-1] == 9_990


def test_shares_are_of_the_last_minute():
    rates = Rates()
    for i in range(20):
        rates.note(reading(i * 10.0, train_ms=i * 5_000.0, sample_ms=0.0 if i < 15 else (i - 14) * 1_000.0))
    assert rates.shares(reading(190.0, train_ms=95_000.0, sample_ms=5_000.0)) == {"train": 0.5, "sample": 0.083}
    assert Rates().shares(reading(5.0)) == {"train": 0.0, "sample": 0.0}


def test_a_change_names_what_has_gone():
    before = {"a": 1, "b": [2], "runs": {"x": {"steps": 1}, "y": {"steps": 2}}}
    after = {"a": 1, "b": [3], "runs": {"x": {"steps": 2}}}
    assert change(before, after) == {"b": [3], "runs": {"x": {"steps": 2}, "y": None}}
    assert change(after, after) == {}
