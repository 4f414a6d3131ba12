"""Time as an argument, so that a simulated run is a function of its seed."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch: what records carry."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump: what time-outs and shares are measured in."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
