"""When a supervisor believes that its process stands still, and when it blames itself."""

import math

import pytest

from tx_async.worker.pulse import FIRST_LEASE_S, PULSE_VARIABLE, Pulse, beat


class Time:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def pulse(time, monkeypatch):
    pulse = Pulse(time)
    monkeypatch.setenv(PULSE_VARIABLE, str(pulse.descriptor))
    yield pulse
    pulse.close_writer()
    pulse.close()


def ask_for(pulse, time, seconds):
    """As a supervisor does, four times a second; -> what it hears at last."""
    for _ in range(round(4 * seconds)):
        time.now += 0.25
        if (silence := pulse.silence()) is not None:
            return silence
    return None


def test_a_process_that_beats_lives_and_one_that_stops_is_silent_after_its_lease(pulse, time):
    for _ in range(10):
        beat(2.0)
        assert ask_for(pulse, time, 1.5) is None
    assert ask_for(pulse, time, 2) == 2.25


def test_before_the_server_has_answered_a_process_may_take_longer(pulse, time):
    beat(math.inf)
    assert ask_for(pulse, time, FIRST_LEASE_S) is None
    assert ask_for(pulse, time, 1) > FIRST_LEASE_S


def test_a_supervisor_that_stood_still_itself_does_not_blame_its_process(pulse, time):
    beat(2.0)
    assert pulse.silence() is None
    time.now += 1000
    assert pulse.silence() is None
    assert ask_for(pulse, time, 3) == 2.25


def test_a_supervisor_that_reads_nothing_does_not_stop_its_process(pulse, time):
    for _ in range(100_000):
        beat(2.0)
    time.now += 5
    assert pulse.silence() is None


def test_without_a_supervisor_a_beat_is_nothing(monkeypatch):
    monkeypatch.delenv(PULSE_VARIABLE, raising=False)
    beat(1.0)
