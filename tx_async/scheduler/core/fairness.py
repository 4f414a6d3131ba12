"""Who is next: deficit round robin by levels between flows, weighted shares between classes of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Flow = tuple[str, ...]
"""Whose work it is, from the outside in: (API key, session, run). What is fair is decided level by level."""

QUANTUM_MS_MAX = 2000.0


def prefixes_of(flow: Flow) -> list[Flow]:
    """The key, its session, its run."""
    return [flow[:depth] for depth in range(1, len(flow) + 1)]


class FairQueue:
    """Least-served-first in tokens, at each level among those of one parent: deficit round robin's guarantee without
    its rounds. A key has its part of the device however many sessions it opens, a session its part of its key's, a run
    its part of its session's.

    Who was idle starts level with the least served busy one: nobody may save up a claim to a burst.
    """

    def __init__(self):
        #: every prefix of a busy flow -> tokens charged to it, on a scale shared by the children of one parent
        self._charged: dict[Flow, float] = {}

    def order(self, busy: Iterable[Flow]) -> list[Flow]:
        """The flows that have work, least served first. Flows that have none are forgotten."""
        busy = list(busy)
        children: dict[Flow, dict[Flow, None]] = {}
        for flow in busy:
            for prefix in prefixes_of(flow):
                children.setdefault(prefix[:-1], {})[prefix] = None
        charged: dict[Flow, float] = {}
        for siblings in children.values():
            level = min((self._charged[child] for child in siblings if child in self._charged), default=0.0)
            charged.update((child, self._charged.get(child, level) - level) for child in siblings)
        self._charged = charged
        return self.ranked(busy)

    def ranked(self, flows: Iterable[Flow]) -> list[Flow]:
        """Some of the flows of the last `order`, in its order; siblings that were served alike stay in theirs."""
        flows = list(flows)
        places: dict[Flow, int] = {}
        for flow in flows:
            for prefix in prefixes_of(flow):
                places.setdefault(prefix, len(places))

        def rank(flow: Flow) -> list[tuple[float, int]]:
            return [(self.charged(prefix), places[prefix]) for prefix in prefixes_of(flow)]

        return sorted(flows, key=rank)

    def charged(self, flow: Flow) -> float:
        return self._charged.get(flow, 0.0)

    def charge(self, flow: Flow, tokens: float) -> None:
        for prefix in prefixes_of(flow):
            if prefix in self._charged:
                self._charged[prefix] += tokens


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
