"""Who is next: deficit round robin between flows, weighted shares between training and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key")

QUANTUM_MS_MAX = 2000.0


class FairQueue(Generic[Key]):
    """Least-served-first over flows, in tokens: deficit round robin's guarantee without its rounds.

    A flow that was idle starts level with the least served busy one: it may not save up a claim to a burst.
    """

    def __init__(self):
        #: flow -> tokens charged to it, on a scale shared by all flows
        self._charged: dict[Key, float] = {}

    def order(self, busy: Iterable[Key]) -> list[Key]:
        """The flows that have work, least served first. Flows that have none are forgotten."""
        busy = list(busy)
        known = [self._charged[key] for key in busy if key in self._charged]
        level = min(known, default=0.0)
        self._charged = {key: self._charged.get(key, level) - level for key in busy}
        return sorted(busy, key=self._charged.__getitem__)

    def charge(self, key: Key, tokens: float) -> None:
        if key in self._charged:
            self._charged[key] += tokens


class Shares(Generic[Key]):
    """Classes of work share the device's time by weight; an idle class leaves its share to the others.

    A quantum is charged when it is sent, so that the next one is another class's turn; and because nobody knows yet
    what it will take, with what the last one of its class took.
    """

    def __init__(self, weights: dict[Key, float]):
        self._weights = weights
        self._used = dict.fromkeys(weights, 0.0)
        self._last_ms = dict.fromkeys(weights, 0.0)

    def order(self, is_busy: Callable[[Key], bool]) -> list[Key]:
        """The classes that have work, or quanta of it at the device, least served first."""
        busy = [name for name in self._weights if is_busy(name)]
        level = min((self._used[name] for name in busy), default=0.0)
        for name in self._used:
            # Idle time is not credit: an idle class comes back level with the busy one.
            self._used[name] = self._used[name] - level if name in busy else 0.0
        return sorted(busy, key=self._used.__getitem__)

    def is_ahead(self, name: Key, num_quanta: int) -> bool:
        """By more than so many of its quanta, of the least served class of the last `order`."""
        return self._used[name] > num_quanta * self._cost(name)

    def charge(self, name: Key) -> None:
        """One of its quanta is sent."""
        self._used[name] += self._cost(name)

    def _cost(self, name: Key) -> float:
        return self._last_ms[name] / self._weights[name]

    def measured(self, name: Key, cost_ms: float) -> None:
        """What one took. One that took very long was compiled first, which is nobody's share."""
        self._last_ms[name] = min(cost_ms, QUANTUM_MS_MAX)
