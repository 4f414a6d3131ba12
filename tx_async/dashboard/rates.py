"""Tokens per second of the last hour, from counters that only rise. It keeps a few numbers every ten seconds, whether
or not a page is open."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from msgspec import Struct

from tx_async.clock import Clock
from tx_async.scheduler.interface import SchedulerApi
from tx_async.wire.dashboard import Overview

INTERVAL_S = 10.0
HOUR_S = 3600.0


class Reading(Struct, frozen=True):
    at: float
    train_tokens: float
    sample_tokens: float
    train_ms: float
    sample_ms: float

    @classmethod
    def of(cls, overview: Overview, at: float) -> Reading:
        return cls(at, overview.train_tokens, overview.sample_tokens, overview.train_ms, overview.sample_ms)


class Rates:
    def __init__(self) -> None:
        #: a reading every `INTERVAL_S`, oldest first
        self._readings: deque[Reading] = deque(maxlen=int(HOUR_S / INTERVAL_S) + 1)

    def note(self, reading: Reading) -> None:
        """Keep a reading; one that comes too soon is left out."""
        if not self._readings or reading.at - self._readings[-1].at >= INTERVAL_S * 0.9:
            self._readings.append(reading)

    def hour(self) -> dict[str, list[float]]:
        return series(self._readings)

    def shares(self, now: Reading) -> dict[str, float]:
        """The share of the device's time, from 0 to 1, that each kind of work took in the last minute."""
        minute = [reading for reading in self._readings if reading.at >= now.at - 60] or [now]
        seconds = now.at - minute[0].at
        if seconds <= 0:
            return {"train": 0.0, "sample": 0.0}
        train, sample = now.train_ms - minute[0].train_ms, now.sample_ms - minute[0].sample_ms
        return {
            "train": round(min(1.0, train / seconds / 1000), 3),
            "sample": round(min(1.0, sample / seconds / 1000), 3),
        }


async def keep(rates: Rates, scheduler: SchedulerApi, clock: Clock) -> None:
    """Keep readings until cancelled."""
    while True:
        rates.note(Reading.of(scheduler.overview(), clock.now()))
        await asyncio.sleep(INTERVAL_S)


def series(readings: Sequence[Reading]) -> dict[str, list[float]]:
    """The rates per second of each interval, by the time of its end."""
    pairs = [(before, after) for before, after in pairwise(readings) if after.at > before.at]
    return {
        "at": [round(after.at, 1) for _, after in pairs],
        "train": [_rate(before.train_tokens, after.train_tokens, before, after) for before, after in pairs],
        "sample": [_rate(before.sample_tokens, after.sample_tokens, before, after) for before, after in pairs],
    }


def _rate(start: float, end: float, before: Reading, after: Reading) -> float:
    return round(max(0.0, end - start) / (after.at - before.at), 1)
