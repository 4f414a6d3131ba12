"""Outages of storage: when storage is asked again, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

RETRY_S = 1.0
"""The first pause; each later one is twice as long."""
PAUSE_MAX_S = 30.0


@dataclass
class Outage:
    """The outage of one thing that somebody waits for. It begins with a failure and ends with the next success."""

    #: when it began; None while all is well
    since: float | None = None
    num_failures: int = 0
    #: storage is not tried again before this time
    until: float = 0.0

    def failed(self, now: float) -> None:
        self.since = now if self.since is None else self.since
        pause = RETRY_S * 2 ** min(self.num_failures, 30)
        self.num_failures += 1
        self.until = now + min(pause, PAUSE_MAX_S)

    def over(self) -> None:
        self.since, self.num_failures, self.until = None, 0, 0.0

    def has_lasted(self, now: float) -> float:
        """Seconds since its first failure."""
        return 0.0 if self.since is None else now - self.since
