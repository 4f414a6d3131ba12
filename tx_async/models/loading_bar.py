"""Progress lines in a worker's log while weights load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

WIDTH = 20
EVERY_S = 1.0


class LoadingBar:
    """A line a second with a bar and the rate in GB/s (10⁹ bytes), and one at the end."""

    def __init__(self, total_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._total = total_bytes
        self._clock = clock
        self._began = self._said = clock()

    def report(self, done_bytes: int) -> None:
        now = self._clock()
        rate = done_bytes / max(now - self._began, 1e-9) / 1e9
        if done_bytes >= self._total:
            log.info("Loaded weights: %.2f GB in %.1f s, %.2f GB/s", self._total / 1e9, now - self._began, rate)
        elif now - self._said >= EVERY_S:
            self._said = now
            bar = ("█" * (WIDTH * done_bytes // self._total)).ljust(WIDTH, "░")
            percent = 100 * done_bytes // self._total
            log.info("Loading weights: %s %d %% of %.2f GB, %.2f GB/s", bar, percent, self._total / 1e9, rate)
